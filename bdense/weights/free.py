"""Spaces of several coordinates: a weight for each branch, or a slope for each interval."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from bdense.errors import InputError
from bdense.knobs import knob
from bdense.weights.log_linear import normalised_weights
from bdense.weights.space import BASELINE, UNIFORM, Choice, Range, Uniform, WeightSpace

if TYPE_CHECKING:
    from bdense.weights.weighting import BranchWeighting
# Of a space without a method: SFD's defaults.
_USUAL_BRANCHES, _USUAL_INTERVALS = 4, 2


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

        self.require_fitting(params, num_branches, 1)
        ratios = [float(params[name]) for name in _log_ratios(num_branches)]
        logs = torch.tensor([*ratios, 0.0], dtype=torch.float64)
        return FixedWeights(num_branches * torch.softmax(logs, dim=0))

    @property
    def axes(self) -> tuple[str, ...]:
        return _log_ratios(self.branches or _USUAL_BRANCHES)

    def require_fitting(
        self, params: Mapping[str, Any], num_branches: int, num_intervals: int
    ) -> None:
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
