"""ODE solvers in EDM's coordinates: dx / d sigma = (x - D(x; sigma)) / sigma.

A solver yields the state after each interval of a grid. ``trajectory`` keeps them all, ``solve``
keeps the last. To add one, write a dataclass with ``order``, ``nfe`` and ``steps``, name it in
``solver_names.SOLVERS`` and build it in ``make_solver``.

B batch, C channels, H x W pixels, n intervals; t the level stepped from, t' the level stepped to.
"""

import itertools
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from bdense.diffusion.denoiser import Denoiser
from bdense.diffusion.solver_names import SOLVERS as SOLVERS
from bdense.diffusion.solver_names import refuse_clipping, refuse_thresholding, solver_order
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
            sigmas: [n + 1] float64 on the CPU, decreasing, positive; ddim's may end at 0.
        """
        ...


def slope(denoise: Denoiser, x: Tensor, t: Tensor) -> Tensor:
    """d = (x - D(x; t)) / t: dx / dt, and the predicted noise. [B, C, H, W], 1 NFE."""
    return (x - denoise(x, t)) / t


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
        """x' = x + (t' - t) d."""
        for t, t_next in itertools.pairwise(sigmas):
            x = x + (t_next - t) * slope(denoise, x, t)
            yield x


@dataclass(frozen=True, slots=True, kw_only=True)
class DDIM:
    """Euler's step as Song et al. 2020 (arXiv 2010.02502) write it; the grid may end at 0.

    The same but for rounding, and exact where Euler's is not: at levels of some thousands, and at
    t' = 0, where it is D itself.

    Attributes:
        clip: Clamp D to [-1, 1]; the noise follows from the clamped D, as in Salimans & Ho 2022.
    """

    clip: bool = False

    @property
    def order(self) -> int:
        """1."""
        return 1

    def nfe(self, num_intervals: int) -> int:
        """One evaluation an interval."""
        return num_intervals

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor) -> Iterator[Tensor]:
        """x' = D + (t' / t) (x - D)."""
        for t, t_next in itertools.pairwise(sigmas):
            denoised = denoise(x, t)
            if self.clip:
                denoised = denoised.clamp(-1, 1)
            x = denoised + (t_next / t) * (x - denoised)
            yield x


@dataclass(frozen=True, slots=True)
class Heun:
    """Second order, 2 NFE an interval: the mean of the slopes at both ends.

    Karras et al. 2022, algorithm 1. The grid ends above 0, so the last interval costs 2 as well.
    """

    @property
    def order(self) -> int:
        """2."""
        return 2

    def nfe(self, num_intervals: int) -> int:
        """Two evaluations an interval."""
        return 2 * num_intervals

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor) -> Iterator[Tensor]:
        """x' = x + (t' - t) (d + d') / 2, where d' is the slope at the end of Euler's step."""
        for t, t_next in itertools.pairwise(sigmas):
            d = slope(denoise, x, t)
            x_euler = x + (t_next - t) * d
            d_next = slope(denoise, x_euler, t_next)
            x = x + (t_next - t) * (d + d_next) / 2
            yield x


@dataclass(frozen=True, slots=True, kw_only=True)
class DPM2:
    """DPM-Solver-2 (Lu et al. 2022, arXiv 2206.00927, algorithm 4), 2 NFE an interval.

    Attributes:
        r: Where in log t the second slope is taken: near 0 at t, at 1 at t', which makes it
            Heun's. 1/2, the geometric mean, uses that slope alone.
    """

    r: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.r <= 1:
            raise InputError(f"dpm2 takes its second slope at 0 < r <= 1, got r={self.r}; try 0.5")

    @property
    def order(self) -> int:
        """2."""
        return 2

    def nfe(self, num_intervals: int) -> int:
        """Two evaluations an interval."""
        return 2 * num_intervals

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor) -> Iterator[Tensor]:
        """x' = x + (t' - t) (d_mid / 2r + (1 - 1 / 2r) d), with t_mid = t'^r t^(1 - r)."""
        for t, t_next in itertools.pairwise(sigmas):
            t_mid = t_next**self.r * t ** (1 - self.r)
            d = slope(denoise, x, t)
            x_mid = x + (t_mid - t) * d
            d_mid = slope(denoise, x_mid, t_mid)
            x = x + (t_next - t) * (d_mid / (2 * self.r) + (1 - 1 / (2 * self.r)) * d)
            yield x


# Adams-Bashforth on equal steps: what the newest slope, the one before it, ... weigh, by order.
_ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class IPNDM:
    """iPNDM (Zhang & Chen 2022, arXiv 2204.13902, appendix B.2), 1 NFE an interval.

    Adams-Bashforth with the coefficients of equal steps, whatever the grid's steps are.

    Attributes:
        max_order: 2, 3 or 4 slopes a step; the first steps use what history there is.
    """

    max_order: int = 4

    def __post_init__(self) -> None:
        solver_order("ipndm", self.max_order)

    @property
    def order(self) -> int:
        """2, whatever ``max_order``.

        Neighbouring steps differ by a factor of 1 + O(1 / n), which the coefficients, those of
        equal steps, know nothing of: with more slopes the error is smaller, but falls no faster.
        """
        return 2

    def nfe(self, num_intervals: int) -> int:
        """One evaluation an interval, whatever the order."""
        return num_intervals

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor) -> Iterator[Tensor]:
        """x' = x + (t' - t) (c_1 d + c_2 d_-1 + ...)."""
        history: list[Tensor] = []  # d at the newest level first
        for t, t_next in itertools.pairwise(sigmas):
            history = [slope(denoise, x, t), *history[: self.max_order - 1]]
            coefficients = _ADAMS_BASHFORTH[len(history) - 1]
            x = x + (t_next - t) * sum(c * d for c, d in zip(coefficients, history, strict=True))
            yield x


@dataclass(frozen=True, slots=True, kw_only=True)
class DPMSolverPP:
    """DPM-Solver++ multistep (Lu et al. 2022, arXiv 2211.01095), 1 NFE an interval.

    Attributes:
        max_order: 1, 2 or 3 predictions a step; the first steps use what history there is.
        prediction: What is extrapolated in log t: ``data`` (D; DPM-Solver++) or ``noise``
            ((x - D) / t; the multistep DPM-Solver).
        lower_order_final: The last step is of order 1, the one before of order 2 at most.
        thresholding: Clamp every predicted image to its own 99.5 % quantile and rescale to
            [-1, 1] (Saharia et al. 2022). Off by default: the published SFD runs never had it.
    """

    max_order: int = 3
    prediction: Literal["data", "noise"] = "data"
    lower_order_final: bool = True
    thresholding: bool = False

    def __post_init__(self) -> None:
        solver_order("dpmpp", self.max_order)
        if self.prediction not in ("data", "noise"):
            raise InputError(
                f"dpmpp's prediction is 'data' or 'noise', got {self.prediction!r}; choose one"
            )
        if self.thresholding and self.prediction == "noise":
            raise InputError(
                "thresholding clamps images, got it with prediction='noise'; drop it or predict "
                "'data'"
            )

    @property
    def order(self) -> int:
        """``max_order``, but 2 at most, with either prediction.

        The third-order update as published, and as every checkpoint's authors ran it, has half of
        the last term of the expansion: its error is smaller, but falls no faster.
        """
        return min(self.max_order, 2)

    def nfe(self, num_intervals: int) -> int:
        """One evaluation an interval, whatever the order."""
        return num_intervals

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor) -> Iterator[Tensor]:
        """Exponential integrator in lambda = -log t with divided differences of D, or of d."""
        num_intervals = len(sigmas) - 1
        lambdas = [-math.log(t) for t in sigmas.tolist()]
        step = _data_step if self.prediction == "data" else _noise_step
        history: list[Tensor] = []  # the prediction at the newest level first
        for i in range(num_intervals):
            history = [self._predict(denoise, x, sigmas[i]), *history[:2]]
            order = min(self.max_order, i + 1)
            if self.lower_order_final:
                order = min(order, num_intervals - i)
            levels = lambdas[max(i + 1 - order, 0) : i + 2]
            x = step(x, _differences(history[:order], levels), levels)
            yield x

    def _predict(self, denoise: Denoiser, x: Tensor, t: Tensor) -> Tensor:
        if self.prediction == "noise":
            return slope(denoise, x, t)
        denoised = denoise(x, t)
        return dynamic_threshold(denoised) if self.thresholding else denoised


def _differences(history: list[Tensor], lambdas: list[float]) -> list[Tensor]:
    """m0, D1 and D2, as many as there is history: the prediction and its differences over h."""
    m0, *older = history
    if not older:
        return [m0]
    h = lambdas[-1] - lambdas[-2]
    r0 = (lambdas[-2] - lambdas[-3]) / h
    d1_0 = (m0 - history[1]) / r0
    if len(older) == 1:
        return [m0, d1_0]
    r1 = (lambdas[-3] - lambdas[-4]) / h
    d1_1 = (history[1] - history[2]) / r1
    d1 = d1_0 + r0 / (r0 + r1) * (d1_0 - d1_1)
    d2 = (d1_0 - d1_1) / (r0 + r1)
    return [m0, d1, d2]


def _data_step(x: Tensor, differences: list[Tensor], lambdas: list[float]) -> Tensor:
    """One step of order ``len(differences)``; ``lambdas`` ends with the level stepped to."""
    h = lambdas[-1] - lambdas[-2]
    ratio = math.exp(-h)  # t' / t
    phi_1 = math.expm1(-h)
    phi_2 = phi_1 / h + 1
    phi_3 = phi_2 / h - 0.5
    m0, *higher = differences
    if not higher:
        return ratio * x - phi_1 * m0
    if len(higher) == 1:
        return ratio * x - phi_1 * m0 - 0.5 * phi_1 * higher[0]
    return ratio * x - phi_1 * m0 + phi_2 * higher[0] - phi_3 * higher[1]


def _noise_step(x: Tensor, differences: list[Tensor], lambdas: list[float]) -> Tensor:
    """One step of order ``len(differences)``; ``lambdas`` ends with the level stepped to."""
    h = lambdas[-1] - lambdas[-2]
    t_next = math.exp(-lambdas[-1])
    phi_1 = math.expm1(h)
    phi_2 = phi_1 / h - 1
    phi_3 = phi_2 / h - 0.5
    m0, *higher = differences
    if not higher:
        return x - t_next * (phi_1 * m0)
    if len(higher) == 1:
        return x - t_next * (phi_1 * m0 + 0.5 * phi_1 * higher[0])
    return x - t_next * (phi_1 * m0 + phi_2 * higher[0] + phi_3 * higher[1])


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


def make_solver(
    name: str, *, order: int | None = None, thresholding: bool = False, clip: bool = False
) -> Solver:
    """The solver of that name.

    Args:
        name: One of ``SOLVERS``.
        order: One of ``SOLVERS[name]``; None for the highest.
        thresholding: Of dpmpp's predictions.
        clip: Of ddim's predictions.

    Raises:
        InputError: The name is unknown, or that solver has no such option.
    """
    max_order = solver_order(name, order)
    if thresholding:
        refuse_thresholding(name)
    if clip:
        refuse_clipping(name)
    if name == "ddim":
        return DDIM(clip=clip)
    if name == "heun":
        return Heun()
    if name == "dpm2":
        return DPM2()
    if name == "ipndm":
        return IPNDM(max_order=max_order)
    if name == "dpmpp":
        return DPMSolverPP(max_order=max_order, thresholding=thresholding)
    return Euler()
