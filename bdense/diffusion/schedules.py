"""Time grids: decreasing noise levels t_0 > t_1 > ... > t_N = sigma_min.

The teacher's fine grid is the student's, subdivided K-fold in the same parameterisation, so its
row K * n is the student's t_n. Everything is computed in float64.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bdense.arguments import require_types
from bdense.errors import InputError

_MOST_INTERVALS = 100_000

# VP schedule: the smallest time of the continuous process (Song et al. 2021, appendix C).
VP_EPSILON = 1e-3


def require_grid(num_intervals: int) -> None:
    """Refuse a number of intervals that no grid of levels has."""
    if num_intervals < 1:
        raise InputError(f"a grid needs at least 1 interval, got {num_intervals}")
    if num_intervals > _MOST_INTERVALS:
        raise InputError(
            f"a grid of levels has at most {_MOST_INTERVALS} intervals, got {num_intervals}; take "
            "fewer (nfe, steps, substeps)"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How noise levels are spaced between ``sigma_max`` and ``sigma_min``.

    Attributes:
        kind: ``polynomial`` (Karras et al. 2022, eq. 5), ``logsnr`` (uniform in log sigma) or
            ``time_uniform`` (uniform in the VP process' time, to the power 1 / rho).
        rho: Exponent; 7 is polynomial's, give 1 with time_uniform. ``logsnr`` does not use it.
    """

    kind: str = "polynomial"
    rho: float = 7.0
    sigma_min: float = 0.006
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        require_types(self)
        self._require_kind()
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise InputError(
                f"a schedule needs 0 < sigma_min < sigma_max, got sigma_min={self.sigma_min}, "
                f"sigma_max={self.sigma_max}"
            )
        if not 0 < self.rho < math.inf:
            raise InputError(f"schedule rho must be positive and finite, got {self.rho}")
        self._require_levels()

    def grid(self, num_intervals: int) -> Tensor:
        """[num_intervals + 1] float64 noise levels, from sigma_max down to sigma_min.

        The grid of N K intervals holds that of N.
        """
        require_grid(num_intervals)
        position = torch.arange(num_intervals + 1, dtype=torch.float64) / num_intervals
        return self._levels(position)

    def _require_kind(self) -> None:
        if self.kind not in _GRIDS:
            raise InputError(
                f"schedule kind {self.kind!r} is unknown; choose from {sorted(_GRIDS)}"
            )

    def _require_levels(self) -> None:
        """Refuse an exponent whose powers are beyond float64."""
        try:
            with torch.device("cpu"):  # a study is checked on the meta device, without values
                first, last = self.grid(1).tolist()
        except OverflowError:
            first = last = math.inf
        if not 0 < last < first < math.inf:
            raise InputError(
                f"schedule rho={self.rho:g} with levels from {self.sigma_max:g} to "
                f"{self.sigma_min:g} is beyond float64; choose a rho nearer to 7, and levels that "
                "are less far apart"
            )

    def _levels(self, position: Tensor) -> Tensor:
        """sigma at positions from 0, the highest level, to 1, the lowest."""
        return _GRIDS[self.kind](self, position)

    def start(self, noise: Tensor) -> Tensor:
        """[B, C, H, W] noise of the first level, without what is left of an image there."""
        return self.grid(1)[0] * noise

    def describe(self) -> dict[str, Any]:
        """Plain values, which ``bdense.diffusion.sampling.schedule_from`` reads back."""
        return asdict(self)

    def text(self) -> str:
        """For people."""
        return f"{self.kind} levels from {self.sigma_max:g} to {self.sigma_min:g}"


def _polynomial(schedule: Schedule, position: Tensor) -> Tensor:
    high = schedule.sigma_max ** (1 / schedule.rho)
    low = schedule.sigma_min ** (1 / schedule.rho)
    grid: Tensor = (high + position * (low - high)) ** schedule.rho
    return grid


def _logsnr(schedule: Schedule, position: Tensor) -> Tensor:
    high, low = math.log(schedule.sigma_max), math.log(schedule.sigma_min)
    return torch.exp(high + position * (low - high))


def _time_uniform(schedule: Schedule, position: Tensor) -> Tensor:
    # sigma(t)^2 = exp(beta_d t^2 / 2 + beta_min t) - 1 with sigma(1) = sigma_max and
    # sigma(VP_EPSILON) = sigma_min (Karras et al. 2022, table 1, VP column).
    at_one = math.log1p(schedule.sigma_max**2)
    at_epsilon = math.log1p(schedule.sigma_min**2)
    beta_d = 2 * (at_epsilon / VP_EPSILON - at_one) / (VP_EPSILON - 1)
    beta_min = at_one - beta_d / 2
    time = (1 + position * (VP_EPSILON ** (1 / schedule.rho) - 1)) ** schedule.rho
    return torch.expm1(beta_d * time**2 / 2 + beta_min * time).sqrt()


_GRIDS: dict[str, Callable[[Schedule, Tensor], Tensor]] = {
    "polynomial": _polynomial,
    "logsnr": _logsnr,
    "time_uniform": _time_uniform,
}
