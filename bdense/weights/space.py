"""What a search draws branch weights w_1..w_K from; importing this loads no torch.

k counts from 1; branch K is the interval's end point.
"""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeAlias, cast

from bdense.errors import InputError
from bdense.knobs import KnobError, Knobs, is_number, knob

if TYPE_CHECKING:
    from bdense.weights.weighting import BranchWeighting

# Values w_1..w_K, or a list of them for each interval; as files and results hold them.
BranchWeights: TypeAlias = list[float] | list[list[float]]

# An arm of every space: {"baseline": PLAIN} trains branch K only, {"baseline": UNIFORM} has
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
        if not is_number(value):
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

    def require_fitting(
        self, params: Mapping[str, Any], num_branches: int, num_intervals: int
    ) -> None:
        """Raise an ``InputError`` if the parameters give no weights at that K and S."""
        return

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

        Returns:
            One branch for plain distillation, else K.

        Raises:
            InputError: ``params`` are not of this space.
        """
        import torch

        from bdense.weights.weighting import FixedWeights

        baseline = params.get(BASELINE)
        if baseline is None:
            if not self.reads(params):
                raise InputError(
                    f"{self.name} weights have the parameters {', '.join(self.distributions())}, "
                    f"got {', '.join(params) or 'none'}"
                )
            return self.own_weighting(params, num_branches)
        count = num_branches if baseline == UNIFORM else 1
        return FixedWeights(torch.ones(count, dtype=torch.float64))

    def reads(self, params: Mapping[str, Any]) -> bool:
        """Whether ``params`` are of this space: a draw, something stored, or a baseline."""
        if BASELINE in params:
            return params[BASELINE] in (PLAIN, UNIFORM)
        return params.keys() == self.distributions().keys()

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
        """The parameters at these coordinates; the others take their lowest value."""
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

        Raises:
            InputError: The space was declared for another K or S.
        """
        return self

    def check(self, num_branches: int) -> None:
        """Raise an ``InputError`` if the bounds exclude every point."""
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


def by_interval(weights: BranchWeights) -> list[list[float]]:
    """A list for each interval, or a single one for all of them."""
    several = bool(weights) and isinstance(weights[0], list)
    return cast(list[list[float]], weights if several else [weights])


def _short(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
