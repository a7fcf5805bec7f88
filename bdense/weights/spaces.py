"""Spaces of branch weights w_1..w_K, and the log-linear ones; importing this loads no torch.

B-DENSE (arXiv 2602.15971), appendix A.1: log w_k = a k + b. k counts from 1; branch K is the
interval's end point.
"""

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeAlias, cast

from bdense.arguments import require_types
from bdense.errors import InputError
from bdense.knobs import KnobError, Knobs, knob
from bdense.weights.rules import GRADIENT_RULES, SCALE_RULES, Rule, require_strength

if TYPE_CHECKING:
    from torch import Tensor

    from bdense.weights.weighting import BranchWeighting

# Values w_1..w_K, or a list of them for each interval; as files and results hold them.
BranchWeights: TypeAlias = list[float] | list[list[float]]

# An arm of every space: {"baseline": PLAIN} trains branch K alone, {"baseline": UNIFORM} has
# w_k = 1.
BASELINE, PLAIN, UNIFORM = "baseline", "plain", "uniform"


@dataclass(frozen=True, slots=True)
class Uniform:
    """A parameter drawn from a closed interval; with ``log`` its logarithm is uniform."""

    low: float
    high: float
    log: bool = False

    def at(self, share: float) -> float:
        """The value at a share of the interval, from 0 to 1."""
        if self.log:
            return float(self.low * (self.high / self.low) ** share)
        return self.low + share * (self.high - self.low)

    def require(self, name: str, value: Any) -> None:  # noqa: ANN401  as the user gave it
        """Raise an ``InputError`` for a value outside it, or no number."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{name} must be a number, got {value!r}")
        if not self.low <= value <= self.high:
            raise InputError(
                f"{name} {value:g} lies outside weights.{name}, {self.low:g} to {self.high:g}"
            )

    @property
    def is_one_point(self) -> bool:
        """Whether it has a single value."""
        return self.low == self.high


@dataclass(frozen=True, slots=True)
class Choice:
    """A parameter that takes one of several words."""

    options: tuple[str, ...]

    def require(self, name: str, value: Any) -> None:  # noqa: ANN401  as the user gave it
        """Raise an ``InputError`` for a word that is not among them."""
        if value not in self.options:
            raise InputError(f"{name} must be {' or '.join(self.options)}, got {value}")

    @property
    def is_one_point(self) -> bool:
        """Whether there is a single word."""
        return len(self.options) == 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Range(Knobs):
    """A closed interval to search; low = high fixes the value."""

    low: float = knob(help="smallest value")
    high: float = knob(help="largest value")

    def __post_init__(self) -> None:
        Knobs.__post_init__(self)
        if self.low > self.high:
            raise KnobError("low", f"{self.low:g} is above high {self.high:g}; swap them")


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace(Knobs, abc.ABC):
    """What a search draws a trial's parameters from, and where they lie among each other."""

    name: ClassVar[str]

    @abc.abstractmethod
    def distributions(self) -> Mapping[str, Uniform | Choice]:
        """What a sampler draws: parameter name to distribution."""

    def coordinates(self, params: Mapping[str, Any]) -> tuple[float, ...] | None:
        """Where the parameters lie for a surrogate and for plots; a number for each of ``axes``.

        Points with equal coordinates train the same student. None where parameters have no place
        among the others.
        """
        return None

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the coordinates; empty for a space without geometry."""
        return ()

    def shown(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters of a baseline by name, as far as it has any, for a table."""
        at = self.coordinates(params)
        return {} if at is None else dict(zip(self.axes, at, strict=True))

    def label(self, params: Mapping[str, Any]) -> str:
        """The parameters in a few words, such as ``a 0.071``."""
        return ", ".join(f"{name} {_short(value)}" for name, value in params.items())

    def excess(self, params: Mapping[str, Any], num_branches: int) -> float:
        """How far they lie beyond the space's own bound; above 0 they are not trained."""
        return 0.0

    def stored(self, params: Mapping[str, Any], num_branches: int) -> dict[str, Any]:
        """What a result keeps of its parameters; it means the same without the space."""
        return dict(params)

    @property
    def is_one_point(self) -> bool:
        """Whether all draws are the same."""
        return all(each.is_one_point for each in self.distributions().values())

    def identity(self) -> dict[str, Any]:
        """What must be equal for results of two searches to be of one study; bounds may differ."""
        return {"name": self.name}


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSpace(SearchSpace):
    """Where branch weights are searched.

    A member is a frozen dataclass of knobs, each with a default, that gives ``name``,
    ``distributions`` and ``own_weighting``; the rest has defaults. The parameters ``params`` that
    the methods take are a draw from ``distributions``, what ``stored`` made of one, or a baseline
    (``{"baseline": "plain"}`` or ``{"baseline": "uniform"}``).
    """

    by_method: ClassVar[bool] = False  # whether its parameters depend on the method's K or S

    @abc.abstractmethod
    def own_weighting(self, params: Mapping[str, Any], num_branches: int) -> "BranchWeighting":
        """Weights of parameters that are not a baseline's."""

    def weighting(self, params: Mapping[str, Any], num_branches: int) -> "BranchWeighting":
        """The weights that a student is trained with; loads torch.

        Args:
            params: See the class.
            num_branches: K of the method with branches.

        Returns:
            One branch for plain distillation, else K.

        Raises:
            InputError: ``params`` are not of this space.
        """
        from bdense.weights.weighting import FixedWeights

        baseline = params.get(BASELINE)
        if baseline is None:
            self.require_read(params)
            return self.own_weighting(params, num_branches)
        return FixedWeights(uniform_weights()(num_branches if baseline == UNIFORM else 1))

    def reads(self, params: Mapping[str, Any]) -> bool:
        """Whether ``params`` are of this space: a draw, something stored, or a baseline."""
        if BASELINE in params:
            return params[BASELINE] in (PLAIN, UNIFORM)
        return params.keys() == self.distributions().keys()

    def require_read(self, params: Mapping[str, Any]) -> None:
        """Raise an ``InputError`` for parameters of another space."""
        if not self.reads(params):
            raise InputError(
                f"{self.name} weights have the parameters {', '.join(self.distributions())}, "
                f"got {', '.join(params) or 'none'}"
            )

    @property
    def box(self) -> tuple[Uniform, ...]:
        """The range of each coordinate, for a search over these rather than over parameters.

        Raises:
            InputError: The space has no coordinates, or not of weights that are fixed beforehand.
        """
        distributions = self.distributions()
        ranges = [distributions.get(axis) for axis in self.axes]
        found = tuple(each for each in ranges if isinstance(each, Uniform))
        if not found or len(found) < len(ranges):
            raise InputError(
                f"{self.name} weights have no coordinates that a student can be told; choose "
                "normalised, log-linear or free ones, or search without one_shot"
            )
        return found

    def at(self, point: Sequence[float]) -> dict[str, Any]:
        """Parameters of these coordinates; what is no coordinate takes its lowest value."""
        lowest: dict[str, Any] = {
            name: each.low if isinstance(each, Uniform) else each.options[0]
            for name, each in self.distributions().items()
        }
        return lowest | dict(zip(self.axes, map(float, point), strict=True))

    def label(self, params: Mapping[str, Any]) -> str:
        if BASELINE in params:
            return {PLAIN: "plain", UNIFORM: "uniform weights"}[params[BASELINE]]
        return SearchSpace.label(self, params)

    def of_method(self, num_branches: int, num_intervals: int) -> Self:
        """The space for K branches and S intervals, where its parameters depend on them.

        Args:
            num_branches: K of the method with branches.
            num_intervals: S, see ``Method.num_intervals``.

        Raises:
            InputError: It is of other numbers.
        """
        return self

    def check(self, num_branches: int) -> None:
        """Raise an ``InputError`` if the bounds exclude every point."""
        return

    def require_fitting(
        self, params: Mapping[str, Any], num_branches: int, num_intervals: int
    ) -> None:
        """Raise an ``InputError`` if the parameters give no weights at that K and S."""
        return

    def at_another_k(self, params: Mapping[str, Any], searched_at: int, num_branches: int) -> str:
        """What weights that were searched at one K mean at another, in words; "" for the same."""
        return ""

    @property
    def needs_gradients(self) -> bool:
        """Whether some of its weightings need the branches' gradients."""
        return False


def require_point(
    space: SearchSpace, params: Mapping[str, Any], num_branches: int
) -> dict[str, Any]:
    """A point that a user asks for, checked against the space.

    Returns:
        Its parameters, in the order of the space's.

    Raises:
        InputError: A parameter is missing, unknown or out of bounds, or the weights exceed the
            bound of the space.
    """
    distributions = space.distributions()
    if params.keys() != distributions.keys():
        raise InputError(
            f"{space.name} weights have the parameters {', '.join(distributions)}, got "
            f"{', '.join(params) or 'none'}; give each of them and no other"
        )
    for name, distribution in distributions.items():
        distribution.require(name, params[name])
    over = space.excess(params, num_branches)
    if over > 0:
        raise InputError(
            f"the weights of {space.label(params)} exceed the bound of the space by {over:.4g}; "
            "choose others, or raise weights.largest"
        )
    return {
        name: float(params[name]) if isinstance(each, Uniform) else params[name]
        for name, each in distributions.items()
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _GivenSpace(WeightSpace):
    """Log-linear weights, fixed before the training starts."""

    a: Range = knob(Range(low=-0.5, high=3.0), "slope of log w_k = a k + b")
    largest: float | None = knob(
        None, "largest weight allowed: points beyond it are not trained", above=0
    )

    @abc.abstractmethod
    def weights(self, params: Mapping[str, Any], num_branches: int) -> "LogLinearWeights":
        """(a, b) of the parameters."""

    @abc.abstractmethod
    def lightest(self) -> dict[str, float]:
        """The point whose largest weight is the smallest."""

    def reads(self, params: Mapping[str, Any]) -> bool:
        # What is stored has both a and b.
        return WeightSpace.reads(self, params) or params.keys() == {"a", "b"}

    def own_weighting(self, params: Mapping[str, Any], num_branches: int) -> "BranchWeighting":
        from bdense.weights.weighting import FixedWeights

        return FixedWeights(self.weights(params, num_branches)(num_branches))

    @property
    def axes(self) -> tuple[str, ...]:
        return ("a",)

    def coordinates(self, params: Mapping[str, Any]) -> tuple[float, ...] | None:
        """The slope. Adam's update does not depend on b, and uniform weights are a = 0."""
        if BASELINE in params:
            return (0.0,) if params[BASELINE] == UNIFORM else None
        return (float(params["a"]),) if "a" in params else None

    def excess(self, params: Mapping[str, Any], num_branches: int) -> float:
        if self.largest is None or BASELINE in params:
            return 0.0
        return max(self.weights(params, num_branches).values(num_branches)) - self.largest

    def stored(self, params: Mapping[str, Any], num_branches: int) -> dict[str, Any]:
        if BASELINE in params:
            return dict(params)
        weights = self.weights(params, num_branches)
        return {"a": weights.a, "b": weights.b}

    def require_fitting(
        self, params: Mapping[str, Any], num_branches: int, num_intervals: int
    ) -> None:
        if not 0 < sum(self.weights(params, num_branches).values(num_branches)) < math.inf:
            raise InputError(
                f"the weights of {self.label(params)} have no positive, finite sum at K = "
                f"{num_branches}; give others by --weights A,B"
            )

    def at_another_k(self, params: Mapping[str, Any], searched_at: int, num_branches: int) -> str:
        given = self.weights(params, num_branches)
        values = given.values(num_branches)
        shares = " ".join(f"{value / sum(values):.3g}" for value in values)
        there, here = (
            f"w_{k}/w_1 = {given.last_to_first(k):.4g} at K = {k}"
            for k in (searched_at, num_branches)
        )
        return (
            f"log w_k = {given.a:.4g} k {'-' if given.b < 0 else '+'} {abs(given.b):.4g} is taken "
            f"literally: {there}, where it was searched, becomes {here}, in shares {shares}"
        )

    def check(self, num_branches: int) -> None:
        over = self.excess(self.lightest(), num_branches)
        if over > 0 and self.largest is not None:
            raise InputError(
                f"weights.largest {self.largest:g} rules out the whole space, whose smallest "
                f"largest weight is {self.largest + over:.4g}; raise weights.largest or lower the "
                "bounds"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLinearSpace(_GivenSpace):
    """log w_k = a k + b, with both a and b searched: the paper's."""

    name: ClassVar[str] = "log-linear"

    b: Range = knob(Range(low=-6.0, high=0.0), "offset of log w_k = a k + b")

    def distributions(self) -> Mapping[str, Uniform | Choice]:
        return {
            "a": Uniform(self.a.low, self.a.high),
            "b": Uniform(self.b.low, self.b.high),
        }

    def weights(self, params: Mapping[str, Any], num_branches: int) -> "LogLinearWeights":
        return LogLinearWeights(a=params["a"], b=params["b"])

    def lightest(self) -> dict[str, float]:
        return {"a": self.a.low, "b": self.b.low}


@dataclass(frozen=True, slots=True, kw_only=True)
class NormalisedSpace(_GivenSpace):
    """log w_k = a k + b, with a searched and b such that the weights' sum is K."""

    name: ClassVar[str] = "normalised"

    a: Range = knob(Range(low=-1.0, high=2.0), "slope of log w_k = a k + b")

    def distributions(self) -> Mapping[str, Uniform | Choice]:
        return {"a": Uniform(self.a.low, self.a.high)}

    def weights(self, params: Mapping[str, Any], num_branches: int) -> "LogLinearWeights":
        if "b" in params:
            return LogLinearWeights(a=params["a"], b=params["b"])
        return normalised_weights(params["a"], num_branches)

    def lightest(self) -> dict[str, float]:
        return {"a": min(max(0.0, self.a.low), self.a.high)}


@dataclass(frozen=True, slots=True, kw_only=True)
class _AroundUniform(WeightSpace):
    """A space whose parameters are its coordinates, with uniform weights at 0."""

    by_method: ClassVar[bool] = True

    def coordinates(self, params: Mapping[str, Any]) -> tuple[float, ...] | None:
        if BASELINE in params:
            return (0.0,) * len(self.axes) if params[BASELINE] == UNIFORM else None
        if params.keys() != {*self.axes}:
            return None
        return tuple(float(params[name]) for name in self.axes)


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeSpace(_AroundUniform):
    """Any positive weights of sum K, by the logarithms l_k = log(w_k / w_K), k = 1 .. K - 1."""

    name: ClassVar[str] = "free"

    branches: int | None = knob(None, "number of branches K", low=2, none="the method's")
    log_ratio: Range = knob(
        Range(low=-3.0, high=3.0),
        "log(w_k / w_K) of each branch but the last: all 0 are uniform weights",
    )

    def distributions(self) -> Mapping[str, Uniform | Choice]:
        bounds = Uniform(self.log_ratio.low, self.log_ratio.high)
        return dict.fromkeys(self.axes, bounds)

    def reads(self, params: Mapping[str, Any]) -> bool:
        # What is stored may be of another K.
        is_own = len(params) > 0 and params.keys() == {*_log_ratios(len(params) + 1)}
        return is_own or WeightSpace.reads(self, params)

    def own_weighting(self, params: Mapping[str, Any], num_branches: int) -> "BranchWeighting":
        import torch

        from bdense.weights.weighting import FixedWeights

        self._require_branches(params, num_branches)
        ratios = [float(params[name]) for name in _log_ratios(num_branches)]
        logs = torch.tensor([*ratios, 0.0], dtype=torch.float64)
        return FixedWeights(num_branches * torch.softmax(logs, dim=0))

    @property
    def axes(self) -> tuple[str, ...]:
        return _log_ratios(self.branches or _USUAL_BRANCHES)

    def require_fitting(
        self, params: Mapping[str, Any], num_branches: int, num_intervals: int
    ) -> None:
        self._require_branches(params, num_branches)

    def _require_branches(self, params: Mapping[str, Any], num_branches: int) -> None:
        if len(params) + 1 != num_branches:
            raise InputError(
                f"free weights of {len(params) + 1} branches do not fit a method of "
                f"{num_branches}; search them at that number, or choose normalised weights"
            )

    def of_method(self, num_branches: int, num_intervals: int) -> Self:
        if num_branches < 2:
            raise InputError(
                "weights: free needs a method of 2 branches or more, and this one has 1; raise "
                "method.substeps, or choose normalised weights"
            )
        if self.branches not in (None, num_branches):
            raise InputError(
                f"weights.branches is {self.branches}, and the method has {num_branches} "
                f"branches; leave it out, or set it to {num_branches}"
            )
        return replace(self, branches=num_branches)


# Of a space without a method: SFD's defaults.
_USUAL_BRANCHES, _USUAL_INTERVALS = 4, 2


def _log_ratios(num_branches: int) -> tuple[str, ...]:
    return tuple(f"l_{k}" for k in range(1, num_branches))


@dataclass(frozen=True, slots=True, kw_only=True)
class PerIntervalSpace(_AroundUniform):
    """log w_k = a_s k + b_s, with a slope searched for each interval s = 1 .. S; sums are K."""

    name: ClassVar[str] = "per-interval"

    intervals: int | None = knob(None, "number of trained intervals S", low=2, none="the method's")
    a: Range = knob(
        Range(low=-1.0, high=2.0),
        "slope of log w_k = a k + b in each interval: all 0 are uniform weights",
    )

    def distributions(self) -> Mapping[str, Uniform | Choice]:
        return dict.fromkeys(self.axes, Uniform(self.a.low, self.a.high))

    def reads(self, params: Mapping[str, Any]) -> bool:
        # What is stored may be of another S.
        is_own = len(params) > 0 and params.keys() == {*_slopes(len(params))}
        return is_own or WeightSpace.reads(self, params)

    def own_weighting(self, params: Mapping[str, Any], num_branches: int) -> "BranchWeighting":
        import torch

        from bdense.weights.weighting import FixedWeights

        slopes = [float(params[name]) for name in _slopes(len(params))]
        return FixedWeights(
            torch.stack([normalised_weights(a, num_branches)(num_branches) for a in slopes])
        )

    @property
    def axes(self) -> tuple[str, ...]:
        return _slopes(self.intervals or _USUAL_INTERVALS)

    def require_fitting(
        self, params: Mapping[str, Any], num_branches: int, num_intervals: int
    ) -> None:
        if len(params) != num_intervals:
            raise InputError(
                f"weights of {len(params)} intervals do not fit a method that trains "
                f"{num_intervals} in every iteration; search them there, or choose normalised "
                "weights"
            )

    def of_method(self, num_branches: int, num_intervals: int) -> Self:
        if num_intervals < 2:
            raise InputError(
                "weights: per-interval needs a method that trains the same intervals, 2 or more, "
                "in every iteration, as sfd does for one nfe; choose normalised weights"
            )
        if self.intervals not in (None, num_intervals):
            raise InputError(
                f"weights.intervals is {self.intervals}, and the method trains {num_intervals} "
                f"intervals; leave it out, or set it to {num_intervals}"
            )
        return replace(self, intervals=num_intervals)


def _slopes(num_intervals: int) -> tuple[str, ...]:
    return tuple(f"a_{s}" for s in range(1, num_intervals + 1))


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


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLinearWeights:
    """w_k = exp(a k + b).

    a = 0 gives all branches the same weight; a -> inf leaves the end point alone, which is plain
    distillation. b scales the whole loss, which does not change Adam's update.
    """

    a: float
    b: float = 0.0

    def __post_init__(self) -> None:
        require_types(self)
        for name in ("a", "b"):
            if not math.isfinite(getattr(self, name)):
                raise InputError(
                    f"branch weight {name} must be a finite number, got {getattr(self, name)}"
                )

    def values(self, num_branches: int) -> list[float]:
        """w_1..w_K; 0 or infinity where float64 ends.

        Raises:
            InputError: K is below 1.
        """
        if num_branches < 1:
            raise InputError(f"num_branches (K) must be at least 1, got {num_branches}")
        return [_exp(self.a * k + self.b) for k in range(1, num_branches + 1)]

    def last_to_first(self, num_branches: int) -> float:
        """w_K / w_1; infinite where float64 ends."""
        return _exp(self.a * (num_branches - 1))

    def __call__(self, num_branches: int) -> "Tensor":
        """[K] float64: ``values`` as a tensor."""
        import torch

        return torch.tensor(self.values(num_branches), dtype=torch.float64)


def uniform_weights() -> LogLinearWeights:
    """w_k = 1 for every branch."""
    return LogLinearWeights(a=0.0, b=0.0)


def normalised_weights(a: float, num_branches: int) -> LogLinearWeights:
    """The weights of slope ``a`` whose sum is K: b = ln K - ln sum_k exp(a k).

    Raises:
        InputError: ``a`` is not finite, or K is below 1.
    """
    # Checks both.
    LogLinearWeights(a=a).values(num_branches)
    largest = max(a, a * num_branches)
    total = math.fsum(math.exp(a * k - largest) for k in range(1, num_branches + 1))
    return LogLinearWeights(a=a, b=math.log(num_branches) - largest - math.log(total))


def by_interval(weights: BranchWeights) -> list[list[float]]:
    """A list for each interval, or a single one for all of them."""
    several = bool(weights) and isinstance(weights[0], list)
    return cast(list[list[float]], weights if several else [weights])


def _exp(exponent: float) -> float:
    try:
        return math.exp(exponent)
    except OverflowError:
        return math.inf


def _short(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
