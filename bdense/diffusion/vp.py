"""Variance-preserving processes as schedules of noise levels, which PD halves; their losses.

z_u = alpha_u x_0 + s_u eps, alpha^2 + s^2 = 1, for times u from 1 (noise) to 0 (clean). In our
coordinates x = z / alpha and sigma = s / alpha = exp(-logsnr / 2), so that a DDIM step is an
Euler step, and the last level, at u = 0, is sigma = 0: there the last prediction is the image.
"""

import abc
import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from bdense.diffusion import LevelWeight
from bdense.diffusion.schedules import Schedule, require_grid
from bdense.errors import InputError
from bdense.files import plain_json


class VPSchedule(abc.ABC):
    """A process by its noise level at each time; grids of n steps are even in u.

    The grid of N K steps holds that of N, bit for bit.
    """

    kind: ClassVar[str]

    @property
    @abc.abstractmethod
    def sigma_min(self) -> float:
        """The lowest level above 0."""

    @property
    @abc.abstractmethod
    def sigma_max(self) -> float:
        """The highest level."""

    @abc.abstractmethod
    def level(self, u: Tensor) -> Tensor:
        """sigma at times u in (0, 1], float64 of the same shape."""

    def options(self) -> dict[str, Any]:
        """The fields as plain values."""
        return plain_json(asdict(self))  # type: ignore[call-overload]

    def draw(self, u: Tensor) -> Tensor:
        """Levels to train at, for u uniform in [0, 1): float64 of the same shape."""
        # 1 - u lies in (0, 1]: the clean end has no noise to learn from.
        return self.level(1 - u)

    def grid(self, num_intervals: int) -> Tensor:
        """[num_intervals + 1] float64: u = 1, .., 1 / n, and 0 at the end."""
        require_grid(num_intervals)
        u = torch.arange(num_intervals, 0, -1, dtype=torch.float64) / num_intervals
        return torch.cat([self.level(u), u.new_zeros(1)])

    def start(self, noise: Tensor) -> Tensor:
        """The state at u = 1 of z ~ N(0, 1): z / alpha = sqrt(1 + sigma^2) z."""
        highest = self.level(torch.ones((), dtype=torch.float64))
        return (1 + highest**2).sqrt() * noise

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, **self.options()}

    def text(self) -> str:
        return f"{self.kind} levels, even in time"


# How noise levels are spaced.
Levels: TypeAlias = Schedule | VPSchedule


@dataclass(frozen=True, kw_only=True)
class CosineSchedule(VPSchedule):
    """logsnr(u) = -2 ln tan(a u + b) (Salimans & Ho 2022, arXiv 2202.00512): sigma = tan(a u + b).

    Attributes:
        logsnr_min, logsnr_max: At u = 1 and u = 0.
    """

    kind: ClassVar[str] = "cosine"

    logsnr_min: float = -20.0
    logsnr_max: float = 20.0

    def __post_init__(self) -> None:
        if not -math.inf < self.logsnr_min < self.logsnr_max < math.inf:
            raise InputError(
                f"a cosine schedule needs logsnr_min < logsnr_max, got {self.logsnr_min} and "
                f"{self.logsnr_max}"
            )

    def level(self, u: Tensor) -> Tensor:
        b = math.atan(math.exp(-self.logsnr_max / 2))
        a = math.atan(math.exp(-self.logsnr_min / 2)) - b
        return torch.tan(a * u.double() + b)

    @property
    def sigma_min(self) -> float:
        return math.exp(-self.logsnr_max / 2)

    @property
    def sigma_max(self) -> float:
        return math.exp(-self.logsnr_min / 2)


def snr_weight(sigma: Tensor, kind: LevelWeight) -> Tensor:
    """The weight of |D - x_0|^2 (Salimans & Ho 2022, section 4), for SNR = 1 / sigma^2.

    Args:
        sigma: Levels above 0, of any shape.
        kind: "constant" is 1: the error of the image. "snr" is SNR: the error of the noise.
            "snr_trunc" is max(SNR, 1): the larger of the two. "v" is SNR + 1: the error of
            v = alpha eps - s x_0, which is their sum.

    Returns:
        Weights of the shape and dtype of ``sigma``.
    """
    snr = sigma**-2
    if kind == "constant":
        return torch.ones_like(sigma)
    if kind == "snr":
        return snr
    if kind == "snr_trunc":
        return snr.clamp(min=1)
    return snr + 1
