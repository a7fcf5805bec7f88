"""Weights that are learned: their rules, and the space of them; loads no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from bdense.knobs import KnobError, Knobs, knob
from bdense.weights.space import BASELINE, Choice, Range, Uniform, WeightSpace

if TYPE_CHECKING:
    from bdense.weights.weighting import BranchWeighting

ScaleRule = Literal["uncertainty", "gradient-norm"]
Rule = Literal[ScaleRule, "alignment", "anneal"]
SCALE_RULES: tuple[Rule, ...] = get_args(ScaleRule)
RULES: tuple[Rule, ...] = get_args(Rule)
GRADIENT_RULES: tuple[Rule, ...] = ("gradient-norm", "alignment")
MAX_STRENGTH = 10.0


def require_strength(strength: float, rule: str | None = None) -> None:
    """Raise a ``KnobError`` for an exponent beyond ``MAX_STRENGTH`` or that the rule lacks."""
    if not abs(strength) <= MAX_STRENGTH:
        raise KnobError(
            "strength", f"must lie in -{MAX_STRENGTH:g}..{MAX_STRENGTH:g}, got {strength}"
        )
    if strength < 0 and rule not in (None, *SCALE_RULES):
        raise KnobError(
            "strength",
            f"{strength:g} would reverse the rule {rule}, which has no reverse; let it be 0 or "
            "more",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedSpace(WeightSpace):
    """Weights that follow the student's own losses or gradients while it trains."""

    name: ClassVar[str] = "learned"

    rules: tuple[Rule, ...] = knob(
        SCALE_RULES,
        "rules that weights are learned by, of: a branch counts by 1 / scale, which is its mean "
        "loss (uncertainty) or the norm of its gradient (gradient-norm); by the cosine of its "
        "gradient with the last branch's, if that is above 0 (alignment); or by what is left of "
        "the training (anneal)",
    )
    strength: Range = knob(
        Range(low=-1.0, high=1.5),
        "exponent of the rule: 0 is uniform, 1 the rule itself, below 0 the reverse of a scale",
    )
    memory: int = knob(
        100, "updates until an old one counts 1 / e in what is averaged; not for anneal", low=1
    )

    def __post_init__(self) -> None:
        Knobs.__post_init__(self)
        if not self.rules or len(set(self.rules)) < len(self.rules):
            raise KnobError(
                "rules",
                f"{list(self.rules)} must name one rule or more, each once; leave it out for "
                f"{' and '.join(SCALE_RULES)}",
            )
        for rule in self.rules:
            for bound in (self.strength.low, self.strength.high):
                require_strength(bound, rule)

    def distributions(self) -> Mapping[str, Uniform | Choice]:
        return {
            "rule": Choice(self.rules),
            "strength": Uniform(self.strength.low, self.strength.high),
        }

    def reads(self, params: Mapping[str, Any]) -> bool:
        # What is stored has the memory too.
        return WeightSpace.reads(self, params) or params.keys() == {"rule", "strength", "memory"}

    def own_weighting(self, params: Mapping[str, Any], num_branches: int) -> "BranchWeighting":
        from bdense.weights.weighting import LearnedWeights

        return LearnedWeights(
            num_branches,
            rule=params["rule"],
            strength=params["strength"],
            memory=self._memory(params),
        )

    @property
    def axes(self) -> tuple[str, ...]:
        return ("strength", *self.rules)

    def coordinates(self, params: Mapping[str, Any]) -> tuple[float, ...] | None:
        """The strength; then 1 for the rule chosen and 0 for the others."""
        if "rule" not in params:
            return None
        return (float(params["strength"]), *(float(params["rule"] == r) for r in self.rules))

    def label(self, params: Mapping[str, Any]) -> str:
        if BASELINE in params:
            return WeightSpace.label(self, params)
        return f"{params['rule']}, strength {params['strength']:.3f}"

    def stored(self, params: Mapping[str, Any], num_branches: int) -> dict[str, Any]:
        return dict(params) if BASELINE in params else {**params, "memory": self._memory(params)}

    def _memory(self, params: Mapping[str, Any]) -> int:
        return int(params.get("memory", self.memory))

    @property
    def needs_gradients(self) -> bool:
        return not set(GRADIENT_RULES).isdisjoint(self.rules)

    def identity(self) -> dict[str, Any]:
        # Optuna holds a categorical parameter to its first choices, in their order.
        return {"name": self.name, "memory": self.memory, "rules": list(self.rules)}
