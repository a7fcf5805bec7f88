"""Log-linear branch weights, log w_k = a k + b, and the spaces of them; loads no torch.

B-DENSE (arXiv 2602.15971), appendix A.1.
"""

import abc
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from bdense.arguments import checked, require_types
from bdense.errors import InputError
from bdense.knobs import knob
from bdense.weights.space import BASELINE, UNIFORM, Choice, Range, Uniform, WeightSpace

if TYPE_CHECKING:
    from torch import Tensor

    from bdense.weights.weighting import BranchWeighting

_MOST_BRANCHES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLinearWeights:
    """w_k = exp(a k + b).

    a = 0 gives all branches the same weight; a -> inf leaves only the end point, which is plain
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

    @checked
    def values(self, num_branches: int) -> list[float]:
        """w_1..w_K; 0 or infinity where float64 ends.

        Raises:
            InputError: K is not a number, is below 1, or is more than any student has.
        """
        if not 1 <= num_branches <= _MOST_BRANCHES:
            raise InputError(
                f"num_branches (K) must lie in 1..{_MOST_BRANCHES}, got {num_branches}"
            )
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


def _exp(exponent: float) -> float:
    try:
        return math.exp(exponent)
    except OverflowError:
        return math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class _GivenSpace(WeightSpace):
    """Log-linear weights, fixed before the training starts."""

    a: Range = knob(Range(low=-0.5, high=3.0), "slope of log w_k = a k + b")
    largest: float | None = knob(
        None, "largest weight allowed: points beyond it are not trained", above=0
    )

    @abc.abstractmethod
    def weights(self, params: Mapping[str, Any], num_branches: int) -> LogLinearWeights:
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
                f"{num_branches}; give others"
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

    def weights(self, params: Mapping[str, Any], num_branches: int) -> LogLinearWeights:
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

    def weights(self, params: Mapping[str, Any], num_branches: int) -> LogLinearWeights:
        if "b" in params:
            return LogLinearWeights(a=params["a"], b=params["b"])
        return normalised_weights(params["a"], num_branches)

    def lightest(self) -> dict[str, float]:
        return {"a": min(max(0.0, self.a.low), self.a.high)}
