"""DDPM's discrete noise schedules, read as continuous ones (Ho et al. 2020, arXiv 2006.11239).

A network was trained at times 0, 1, ..., T - 1, with z_t = alpha_t x_0 + s_t eps, alpha_t^2 =
alpha_bar_t and s_t^2 = 1 - alpha_bar_t. Between two of them log alpha_bar is a straight line and
the network is given the fractional time; so it is between the first and the clean image, at time
-1 with alpha_bar = 1. In our coordinates x = z / alpha, so that
sigma^2 = (1 - alpha_bar) / alpha_bar = exp(-log alpha_bar) - 1.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from bdense.diffusion.schedules import Schedule
from bdense.diffusion.vp import VPSchedule
from bdense.errors import InputError

_T = "num_train_timesteps"
_MOST_TIMES = 1_000_000  # a file's number, which is taken as memory
# Cosine betas (Nichol & Dhariwal 2021, equation 17), at most this each.
_COSINE_OFFSET, _LARGEST_BETA = 0.008, 0.999
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


@dataclass(frozen=True, kw_only=True)
class DDPMSchedule(VPSchedule):
    """T levels of noise; field names and meanings are those of diffusers' schedulers.

    As a process its time u is (t + 1) / T: 1024 steps on T = 1000 fall between the trained times.

    Attributes:
        num_train_timesteps: T.
        beta_schedule: ``linear``: betas at equal distances (DDPM); ``scaled_linear``: their
            square roots; ``squaredcos_cap_v2``: from a cosine, without beta_start and beta_end.
        trained_betas: All T betas themselves, in place of a schedule.
    """

    kind: ClassVar[str] = "ddpm"

    num_train_timesteps: int = 1000
    beta_schedule: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    trained_betas: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.trained_betas is not None:
            object.__setattr__(self, "trained_betas", tuple(map(float, self.trained_betas)))
        if not 2 <= self.num_train_timesteps <= _MOST_TIMES:
            raise InputError(f"{_T} must be 2 to {_MOST_TIMES}, got {self.num_train_timesteps}")
        if self.beta_schedule not in BETA_SCHEDULES:
            raise InputError(
                f"beta_schedule must be one of {', '.join(BETA_SCHEDULES)}, "
                f"got {self.beta_schedule!r}"
            )
        betas = self._betas()
        if len(betas) != self.num_train_timesteps:
            raise InputError(
                f"trained_betas has {len(betas)} values and {_T} is {self.num_train_timesteps}; "
                "give one for each"
            )
        if not bool(((betas > 0) & (betas < 1)).all()):
            raise InputError(
                f"all betas must lie between 0 and 1, got {float(betas.min()):g} to "
                f"{float(betas.max()):g} (beta_schedule={self.beta_schedule!r}, "
                f"beta_start={self.beta_start}, beta_end={self.beta_end})"
            )

    def log_alpha_bar(self, time: Tensor) -> Tensor:
        """log alpha_bar at fractional times in -1..T - 1, float64 of the shape of ``time``."""
        table = _table(self, time.device)
        place = time.double() + 1
        below = place.floor().clamp(0, len(table) - 2).long()
        return torch.lerp(table[below], table[below + 1], place - below)

    def sigma(self, time: Tensor) -> Tensor:
        """Noise level at fractional times in -1..T - 1, float64."""
        return (-self.log_alpha_bar(time)).expm1().sqrt()

    def level(self, u: Tensor) -> Tensor:
        """sigma at u = (t + 1) / T in (0, 1], float64 of the same shape."""
        return self.sigma(u.double() * self.num_train_timesteps - 1)

    def draw(self, u: Tensor) -> Tensor:
        """Levels to train at, for u uniform in [0, 1): those of the T times, each as likely."""
        return self.sigma((u.double() * self.num_train_timesteps).floor())

    def time(self, sigma: Tensor) -> Tensor:
        """Fractional time of noise levels, float64; 0 below the first level, T - 1 above the last.

        The network was trained at no other times.
        """
        table = _table(self, sigma.device)
        wanted = -torch.log1p(sigma.double() ** 2)
        # The table falls; searchsorted wants it rising.
        after = torch.searchsorted(-table, -wanted.contiguous()).clamp(1, len(table) - 1)
        upper, lower = table[after - 1], table[after]
        place = after - 1 + (upper - wanted) / (upper - lower)
        return (place - 1).clamp(0, len(table) - 2)

    @property
    def sigma_min(self) -> float:
        """The level at time 0."""
        return math.sqrt(math.expm1(-float(_table(self, torch.device("cpu"))[1])))

    @property
    def sigma_max(self) -> float:
        """The level at time T - 1."""
        return math.sqrt(math.expm1(-float(_table(self, torch.device("cpu"))[-1])))

    def _betas(self) -> Tensor:
        """[T] float64, on the CPU whatever torch's default device is."""
        count, cpu = self.num_train_timesteps, torch.device("cpu")
        if self.trained_betas is not None:
            return torch.tensor(self.trained_betas, dtype=torch.float64, device=cpu)
        if self.beta_schedule == "squaredcos_cap_v2":
            bounds = torch.arange(count + 1, dtype=torch.float64, device=cpu) / count
            angle = (bounds + _COSINE_OFFSET) / (1 + _COSINE_OFFSET) * (math.pi / 2)
            alpha_bar = angle.cos() ** 2
            return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=_LARGEST_BETA)
        # A negative beta is refused by the caller; its root would be by Python.
        power = 2 if self.beta_schedule == "scaled_linear" and self.beta_start > 0 else 1
        first, last = self.beta_start ** (1 / power), self.beta_end ** (1 / power)
        return torch.linspace(first, last, count, dtype=torch.float64, device=cpu) ** power


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscreteSchedule(Schedule):
    """Levels that are even in the time of a DDPM, with fractions, between two levels of noise.

    Attributes:
        process: Of the network, or None where it is not known yet (``of``).
    """

    kind: str = "discrete"
    rho: float = 1.0
    process: DDPMSchedule | None = None

    def of(self, process: VPSchedule | None) -> "DiscreteSchedule":
        """These levels of the process that a network was trained on.

        Raises:
            InputError: It was trained on no DDPM.
        """
        if not isinstance(process, DDPMSchedule):
            raise InputError(
                "schedule discrete needs a network of a DDPM (precond ddpm), whose times it "
                "divides; choose another schedule"
            )
        return replace(self, process=process)

    def describe(self) -> dict[str, Any]:
        process = {} if self.process is None else self.process.options()
        bounds = {"sigma_min": self.sigma_min, "sigma_max": self.sigma_max}
        return {"kind": self.kind, **bounds, "process": process}

    def _require_kind(self) -> None:
        if self.kind != "discrete" or self.rho != 1:
            raise InputError(
                f"schedule discrete has no exponent, got rho={self.rho:g}; leave it out"
            )

    def _require_levels(self) -> None:
        """They lie between the bounds, once there is a process."""

    def _levels(self, position: Tensor) -> Tensor:
        if self.process is None:
            raise InputError("schedule discrete has no levels without a network's process")
        bounds = torch.tensor([self.sigma_max, self.sigma_min], dtype=torch.float64)
        high, low = self.process.time(bounds)
        levels: Tensor = self.process.sigma(torch.lerp(high, low, position))
        # The ends as they were given, and not by way of their times.
        return torch.cat([bounds[:1], levels[1:-1], bounds[1:]])


@functools.lru_cache(maxsize=16)
def _table(schedule: DDPMSchedule, device: torch.device) -> Tensor:
    """log alpha_bar at times -1..T - 1: [T + 1] float64, kept: no call copies it to a GPU."""
    with torch.no_grad():
        steps = torch.log1p(-schedule._betas())
        return torch.cat([steps.new_zeros(1), steps.cumsum(0)]).to(device)
