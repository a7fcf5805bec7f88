"""ODE solvers in EDM's coordinates: dx / d sigma = (x - D(x; sigma)) / sigma.

A solver yields the state after each interval of a grid. ``trajectory`` keeps them all, ``solve``
keeps the last. To add one, write a dataclass with ``order``, ``nfe`` and ``steps`` and name it in
``SOLVERS``.

B batch, C channels, H x W pixels, n intervals.
"""

import itertools
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bdense.denoiser import Denoiser
from bdense.errors import InputError


class Solver(Protocol):
    """What every solver promises."""

    @property
    def order(self) -> int:
        """Halving every step divides the error by 2 ** order."""
        ...

    def nfe(self, num_intervals: int) -> int:
        """Network evaluations for a grid of that many intervals."""
        ...

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor) -> Iterator[Tensor]:
        """Yield the state [B, C, H, W] at sigmas[1], sigmas[2], ...

        Args:
            denoise: D(x; sigma).
            x: [B, C, H, W] state at ``sigmas[0]``; its dtype is kept.
            sigmas: [n + 1] float64 on the CPU, decreasing, positive.
        """
        ...


@dataclass(frozen=True, slots=True)
class Euler:
    """First order, 1 NFE an interval; DDIM (Song et al. 2020) in these coordinates."""

    @property
    def order(self) -> int:
        """1."""
        return 1

    def nfe(self, num_intervals: int) -> int:
        """One evaluation an interval."""
        return num_intervals

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor) -> Iterator[Tensor]:
        """x' = x + (t' - t) (x - D) / t."""
        for t, t_next in itertools.pairwise(sigmas):
            x = x + (t_next - t) * ((x - denoise(x, t)) / t)
            yield x


@dataclass(frozen=True, slots=True, kw_only=True)
class DPMSolverPP:
    """DPM-Solver++ multistep in data prediction (Lu et al. 2022, algorithm 2), 1 NFE an interval.

    Attributes:
        max_order: 1, 2 or 3 predictions a step; the first steps use what history there is.
        lower_order_final: The last step is of order 1, the one before of order 2 at most.
        thresholding: Clamp every prediction to its own 99.5 % quantile and rescale to [-1, 1]
            (Saharia et al. 2022). Off by default: the published SFD runs never had it.
    """

    max_order: int = 3
    lower_order_final: bool = True
    thresholding: bool = False

    def __post_init__(self) -> None:
        if self.max_order not in (1, 2, 3):
            raise InputError(f"dpmpp has orders 1, 2 and 3, got {self.max_order}")

    @property
    def order(self) -> int:
        """``max_order``, but 2 at most.

        The third-order update as published, and as every checkpoint's authors ran it, has half of
        the last term of the expansion: its error is smaller, but falls no faster.
        """
        return min(self.max_order, 2)

    def nfe(self, num_intervals: int) -> int:
        """One evaluation an interval, whatever the order."""
        return num_intervals

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor) -> Iterator[Tensor]:
        """Exponential integrator in lambda = -log t with divided differences of D."""
        num_intervals = len(sigmas) - 1
        lambdas = [-math.log(t) for t in sigmas.tolist()]
        history: list[Tensor] = []  # D at the newest level first
        for i in range(num_intervals):
            denoised = denoise(x, sigmas[i])
            if self.thresholding:
                denoised = dynamic_threshold(denoised)
            history = [denoised, *history[:2]]
            order = min(self.max_order, i + 1)
            if self.lower_order_final:
                order = min(order, num_intervals - i)
            x = _dpmpp_step(x, history[:order], lambdas[max(i + 1 - order, 0) : i + 2])
            yield x


def _dpmpp_step(x: Tensor, history: list[Tensor], lambdas: list[float]) -> Tensor:
    """One step of order ``len(history)``; ``lambdas`` ends with the level stepped to."""
    h = lambdas[-1] - lambdas[-2]
    ratio = math.exp(-h)  # t' / t
    phi_1 = math.expm1(-h)
    m0 = history[0]
    if len(history) == 1:
        return ratio * x - phi_1 * m0
    r0 = (lambdas[-2] - lambdas[-3]) / h
    first = (m0 - history[1]) / r0
    if len(history) == 2:
        return ratio * x - phi_1 * m0 - 0.5 * phi_1 * first
    r1 = (lambdas[-3] - lambdas[-4]) / h
    older = (history[1] - history[2]) / r1
    phi_2 = phi_1 / h + 1
    phi_3 = phi_2 / h - 0.5
    d1 = first + r0 / (r0 + r1) * (first - older)
    d2 = (first - older) / (r0 + r1)
    return ratio * x - phi_1 * m0 + phi_2 * d1 - phi_3 * d2


def dynamic_threshold(denoised: Tensor, quantile: float = 0.995) -> Tensor:
    """Clamp each image to s = max(its ``quantile`` of |x|, 1) and divide by s: [B, C, H, W]."""
    limit = torch.quantile(denoised.abs().flatten(1), quantile, dim=1).clamp(min=1)
    limit = limit[:, None, None, None]
    return denoised.clamp(-limit, limit) / limit


def analytical_first_step(denoise: Denoiser, first: Tensor) -> Denoiser:
    """A denoiser that answers at ``first`` without the network (AFS; Dockhorn et al. 2022).

    There the slope is x / sqrt(1 + t^2), so D = x - t x / sqrt(1 + t^2); it saves one NFE.
    """

    def denoise_or_guess(x: Tensor, sigma: Tensor) -> Tensor:
        if sigma.dim() == 0 and bool(sigma == first):
            return x - first * analytical_slope(x, first)
        return denoise(x, sigma)

    return denoise_or_guess


def analytical_slope(x: Tensor, sigma: Tensor) -> Tensor:
    """x / sqrt(1 + sigma^2): the slope of the ODE where noise drowns the data of unit variance."""
    return x / (1 + sigma**2).sqrt()


@torch.no_grad()
def trajectory(
    solver: Solver, denoise: Denoiser, x: Tensor, sigmas: Tensor, *, denoise_to_zero: bool = False
) -> Tensor:
    """Every state of the walk, the start included.

    Args:
        solver: Which rule to step by.
        denoise: D(x; sigma).
        x: [B, C, H, W] state at ``sigmas[0]``.
        sigmas: [n + 1] float64 on the CPU.
        denoise_to_zero: Append D at the last level, for one more NFE.

    Returns:
        [n + 1, B, C, H, W], or [n + 2, ...] with ``denoise_to_zero``.
    """
    states = [x, *solver.steps(denoise, x, sigmas)]
    if denoise_to_zero:
        states.append(denoise(states[-1], sigmas[-1]))
    return torch.stack(states)


@torch.no_grad()
def solve(solver: Solver, denoise: Denoiser, x: Tensor, sigmas: Tensor) -> Tensor:
    """The last state of the walk alone: [B, C, H, W]."""
    return deque(solver.steps(denoise, x, sigmas), maxlen=1).pop()


SOLVERS = ("euler", "dpmpp")


def make_solver(name: str, *, order: int = 3, thresholding: bool = False) -> Solver:
    """The solver of that name; ``order`` and ``thresholding`` concern dpmpp alone."""
    if name == "euler":
        return Euler()
    if name == "dpmpp":
        return DPMSolverPP(max_order=order, thresholding=thresholding)
    raise InputError(f"solver {name!r} is unknown; choose from {list(SOLVERS)}")
