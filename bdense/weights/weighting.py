"""Branch weights that are learned while the student trains, beside those that are given.

B-DENSE (arXiv 2602.15971) leaves learning them to future work. The rules here set

    w_k = K u_k^strength / sum_j u_j^strength,

so their sum is K, as in the normalised search. strength 0 is uniform (0^0 = 1: a conflicting
branch counts only there), 1 the rule itself. u_k is 1 / s_k with a running mean s_k of the
branch's scale, or a running mean of its agreement with branch K, or what is left of the training.
K branches.
"""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from operator import attrgetter
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from bdense.arguments import require_types
from bdense.errors import InputError
from bdense.knobs import KnobError
from bdense.weights.learned import GRADIENT_RULES, RULES, require_strength

# Without AFS a branch may start at its target, where its L1 loss is rounding noise. No scale
# counts as smaller than this share of the largest.
SMALLEST_SCALE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """An update's branches, before it is made; [K] on the training device.

    Attributes:
        losses: Unweighted.
        progress: Share of the stage's iterations that are done, 0 <= p < 1.
        gradient_norms: Of the unweighted losses at the features that all branches share; None
            where the weighting does not need gradients.
        cosines: Of these gradients with branch K's; None likewise.
    """

    losses: Tensor
    progress: float
    gradient_norms: Tensor | None = None
    cosines: Tensor | None = None


class BranchWeighting(Protocol):
    """Where an update's branch weights come from."""

    @property
    def num_branches(self) -> int:
        """K."""

    @property
    def learns(self) -> bool:
        """Whether the weights change in training."""

    @property
    def needs_gradients(self) -> bool:
        """Whether ``observe`` wants the branches' gradients."""

    def observe(self, seen: Observed) -> None:
        """See an update's branches before it is made."""

    def weights(self) -> Tensor:
        """[K] float64 w_1..w_K of the next update, or [S, K] of each of an iteration's S."""

    def state(self) -> dict[str, Tensor]:
        """What ``restore`` needs to go on as if never stopped."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from ``state``."""

    def describe(self) -> dict[str, Any]:
        """Plain values; equal descriptions make equal runs."""


@dataclass(frozen=True, eq=False)
class FixedWeights:
    """Weights that were given: [K] for every update, or [S, K] for each of an iteration's S."""

    learns: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = False

    values: Tensor

    def __post_init__(self) -> None:
        require_types(self)
        # Converted here once, not at every update.
        object.__setattr__(self, "values", self.values.double())
        usable = (self.values >= 0) & self.values.isfinite()
        is_shaped = self.values.dim() in (1, 2) and self.values.numel() > 0
        if not is_shaped or not bool(usable.all() and self.values.any(-1).all()):
            raise InputError(
                f"branch weights must be finite numbers >= 0, one for each branch and not all 0, "
                f"got {self.values.tolist()}"
            )

    @property
    def num_branches(self) -> int:
        return self.values.shape[-1]

    def observe(self, seen: Observed) -> None:
        pass

    def weights(self) -> Tensor:
        return self.values

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        pass

    def describe(self) -> dict[str, Any]:
        return {"fixed": self.values.tolist()}


@dataclass(eq=False)
class LearnedWeights:
    """Weights from what is seen of each branch; uniform until the first update is seen.

    ``uncertainty``: s_k is the branch's mean L1 loss. With |r| Laplace distributed at a scale of
    its own, the likelihood sum_k |r_k| / s_k + ln s_k is best there (Kendall et al. 2018, arXiv
    1705.07115, eq. 7, with L1 for L2 and the optimum in closed form).

    ``gradient-norm``: s_k is the norm of the branch's gradient at the features that all branches
    share, the head's input, so that w_k makes these norms equal (Chen et al. 2018, arXiv
    1711.02257, without its training rates).

    ``alignment``: u_k is the mean cosine of that gradient with branch K's, 0 where it is below: a
    branch that conflicts with the one that is kept counts nothing (Du et al. 2018, arXiv
    1812.02224, which weighs an auxiliary task so).

    ``anneal``: u_k falls linearly from 1 to 0 over the stage for all branches but K.

    Attributes:
        strength: Exponent of u_k.
        memory: Updates over which an old one's share in a mean falls to 1 / e; not of ``anneal``.
    """

    learns: ClassVar[bool] = True

    num_branches: int
    _: KW_ONLY
    rule: str
    strength: float = 1.0
    memory: int = 100

    def __post_init__(self) -> None:
        if self.num_branches < 1:
            raise InputError(f"num_branches (K) must be at least 1, got {self.num_branches}")
        if self.rule not in RULES:
            raise KnobError("rule", f"must be one of {', '.join(RULES)}, got {self.rule}")
        require_strength(self.strength, self.rule)
        if self.memory < 1:
            raise InputError(f"weight memory must be at least 1 update, got {self.memory}")
        self._sum: Tensor | None = None
        self._seen = 0.0

    @property
    def needs_gradients(self) -> bool:
        return self.rule in GRADIENT_RULES

    def observe(self, seen: Observed) -> None:
        rule = _RULES[self.rule]
        keep = 1 - 1 / self.memory if rule.averages else 0.0
        value = rule.signal(seen)
        before = torch.zeros_like(value, dtype=torch.float64) if self._sum is None else self._sum
        self._sum = keep * before + value
        self._seen = keep * self._seen + 1

    def weights(self) -> Tensor:
        if self._sum is None:
            return torch.ones(self.num_branches, dtype=torch.float64)
        mean = self._sum / self._seen
        return self.num_branches * _RULES[self.rule].shares(mean, self.strength)

    def state(self) -> dict[str, Tensor]:
        if self._sum is None:
            return {}
        return {"sum": self._sum, "seen": torch.tensor(self._seen, dtype=torch.float64)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        if state:
            self._sum, self._seen = state["sum"], float(state["seen"])

    def describe(self) -> dict[str, Any]:
        return {"rule": self.rule, "strength": self.strength, "memory": self.memory}


def _rest(seen: Observed) -> Tensor:
    return torch.full_like(seen.losses, 1 - seen.progress, dtype=torch.float64)


def _by_scale(scale: Tensor, strength: float) -> Tensor:
    """[K] shares proportional to s_k^-strength."""
    scale = scale.maximum(SMALLEST_SCALE * scale.max()).clamp(min=torch.finfo(scale.dtype).tiny)
    return torch.softmax(-strength * scale.log(), dim=0)


def _beside_the_last(usefulness: Tensor, strength: float) -> Tensor:
    """[K] shares proportional to u_k^strength, with 1 for branch K and 0 for u_k below 0."""
    powers = usefulness.clamp(min=0) ** strength
    powers[-1] = 1.0
    return powers / powers.sum()


@dataclass(frozen=True, slots=True)
class _Rule:
    """What is seen of the branches, [K], and the shares that follow from its mean or its last."""

    signal: Callable[[Observed], Any]
    shares: Callable[[Tensor, float], Tensor]
    averages: bool = True


_RULES = {
    "uncertainty": _Rule(attrgetter("losses"), _by_scale),
    "gradient-norm": _Rule(attrgetter("gradient_norms"), _by_scale),
    "alignment": _Rule(attrgetter("cosines"), _beside_the_last),
    "anneal": _Rule(_rest, _beside_the_last, averages=False),
}
