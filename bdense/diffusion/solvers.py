"""Solvers in EDM's coordinates, of the ODE dx / d sigma = (x - D(x; sigma)) / sigma.

A solver yields the state after each interval of a grid. ``trajectory`` keeps them all, ``solve``
keeps the last. To add one, write a ``Solver`` and name it in ``bdense.diffusion.SOLVERS`` or in an
entry point of the group ``bdense.solvers``. Stochastic ones have ``STOCHASTIC_SOLVERS`` and the
group ``bdense.stochastic_solvers``. Importing this module loads no torch.

B batch, C channels, H x W pixels, n intervals; t the level stepped from, t' the level stepped to.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from bdense.diffusion import SOLVERS, STOCHASTIC_SOLVERS
from bdense.errors import InputError
from bdense.knobs import KnobError, Knobs, knob, knobs_of

if TYPE_CHECKING:
    from torch import Tensor

    from bdense.diffusion.denoiser import Denoiser

# Unit noise [B, C, H, W] of interval i, which depends only on the seed, the image and i.
StepNoise = Callable[[int], "Tensor"]


def no_noise(interval: int) -> Tensor:
    """For walks that must be deterministic.

    Raises:
        InputError: Always: a stochastic solver asked for noise.
    """
    raise InputError(
        "this solver draws noise in every interval, and is used where states must follow from the "
        "first one alone; take a deterministic one"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Solver(Knobs):
    """What every solver promises: a frozen dataclass whose options are knobs.

    Attributes:
        name: In ``SOLVERS`` or ``STOCHASTIC_SOLVERS`` of ``bdense.diffusion``.
        evaluations: Of the network, in each interval.
        reaches_zero: Whether the last level may be 0.
    """

    name: ClassVar[str]
    evaluations: ClassVar[int] = 1
    reaches_zero: ClassVar[bool] = False

    @property
    def order(self) -> int:
        """Halving every step divides the error by 2 ** order. 1 unless overridden."""
        return 1

    def step(self, denoise: Denoiser, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """The state at t' of a solver whose steps follow from the state at t alone."""
        raise NotImplementedError

    def steps(
        self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: StepNoise = no_noise
    ) -> Iterator[Tensor]:
        """Yield the state [B, C, H, W] at sigmas[1], sigmas[2], ...; overridden, or by ``step``.

        Args:
            denoise: D(x; sigma).
            x: [B, C, H, W] state at ``sigmas[0]``; its dtype is kept.
            sigmas: [n + 1] float64 on the CPU, decreasing and positive; the last may be 0 where
                ``reaches_zero``.
            noise: What a stochastic solver adds in each interval; deterministic ones ignore it.
        """
        for t, t_next in itertools.pairwise(sigmas):
            x = self.step(denoise, x, t, t_next)
            yield x

    def nfe(self, num_intervals: int) -> int:
        """Network evaluations for a grid of that many intervals."""
        return self.evaluations * num_intervals

    def sequential_nfe(self, num_intervals: int) -> int:
        """Those one after another, where some are made as one batch. All unless overridden."""
        return self.nfe(num_intervals)

    def require_intervals(self, num_intervals: int) -> None:
        """Raise an ``InputError`` for a grid of a number of intervals that it is not made for."""

    def text(self) -> str:
        """Its learned numbers, for people; empty where it has none."""
        return ""

    def describe(self) -> dict[str, Any]:
        """Plain values from which ``solver_from`` makes an equal solver."""
        return {"solver": self.name, **asdict(self)}


def slope(denoise: Denoiser, x: Tensor, t: Tensor) -> Tensor:
    """d = (x - D(x; t)) / t: dx / dt, and the predicted noise. [B, C, H, W], 1 NFE."""
    return (x - denoise(x, t)) / t


@dataclass(frozen=True, slots=True, kw_only=True)
class Euler(Solver):
    """First order, 1 NFE an interval; DDIM (Song et al. 2020) in these coordinates."""

    name: ClassVar[str] = "euler"
    reaches_zero: ClassVar[bool] = True

    def step(self, denoise: Denoiser, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """x' = x + (t' - t) d."""
        return x + (t_next - t) * slope(denoise, x, t)


@dataclass(frozen=True, slots=True, kw_only=True)
class DDIM(Solver):
    """Euler's step as Song et al. 2020 (arXiv 2010.02502) write it; the grid may end at 0.

    Equal to Euler's but for rounding, and exact where that is not: at levels of some thousands,
    and at t' = 0, where it is D itself. With ``clip`` the noise follows from the clamped D, as in
    Salimans & Ho 2022.
    """

    name: ClassVar[str] = "ddim"
    reaches_zero: ClassVar[bool] = True

    clip: bool = knob(False, "clamp predicted images to [-1, 1]")

    def step(self, denoise: Denoiser, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """x' = D + (t' / t) (x - D)."""
        denoised = denoise(x, t)
        if self.clip:
            denoised = denoised.clamp(-1, 1)
        return denoised + (t_next / t) * (x - denoised)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heun(Solver):
    """Second order, 2 NFE an interval: the mean of the slopes at both ends.

    Karras et al. 2022, algorithm 1. The grid ends above 0, so the last interval costs 2 as well.
    """

    name: ClassVar[str] = "heun"
    evaluations: ClassVar[int] = 2
    order: ClassVar[int] = 2

    def step(self, denoise: Denoiser, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """x' = x + (t' - t) (d + d') / 2, where d' is the slope at the end of Euler's step."""
        d = slope(denoise, x, t)
        x_euler = x + (t_next - t) * d
        d_next = slope(denoise, x_euler, t_next)
        return x + (t_next - t) * (d + d_next) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class DPM2(Solver):
    """DPM-Solver-2 (Lu et al. 2022, arXiv 2206.00927, algorithm 4), 2 NFE an interval.

    Near r = 0 the second slope is taken at t, at r = 1 at t', which makes it Heun's. 1/2, the
    geometric mean, uses only that slope.
    """

    name: ClassVar[str] = "dpm2"
    evaluations: ClassVar[int] = 2
    order: ClassVar[int] = 2

    r: float = knob(0.5, "where in log t the second slope is taken", above=0, high=1)

    def step(self, denoise: Denoiser, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """x' = x + (t' - t) (d_mid / 2r + (1 - 1 / 2r) d), with t_mid = t'^r t^(1 - r)."""
        t_mid = t_next**self.r * t ** (1 - self.r)
        d = slope(denoise, x, t)
        x_mid = x + (t_mid - t) * d
        d_mid = slope(denoise, x_mid, t_mid)
        return x + (t_next - t) * (d_mid / (2 * self.r) + (1 - 1 / (2 * self.r)) * d)


# Adams-Bashforth on equal steps: what the newest slope, the one before it, ... weigh, by order.
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class IPNDM(Solver):
    """iPNDM (Zhang & Chen 2022, arXiv 2204.13902, appendix B.2), 1 NFE an interval.

    Adams-Bashforth with the coefficients of equal steps, whatever the grid's steps are. The first
    steps use what history there is.
    """

    name: ClassVar[str] = "ipndm"
    reaches_zero: ClassVar[bool] = True
    # Whatever max_order: the coefficients are those of equal steps, and neighbouring steps differ
    # by a factor of 1 + O(1 / n). With more slopes the error is smaller, but falls no faster.
    order: ClassVar[int] = 2

    max_order: int = knob(4, "slopes that a step uses at most", low=2, high=4)

    def steps(
        self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: StepNoise = no_noise
    ) -> Iterator[Tensor]:
        """x' = x + (t' - t) (c_1 d + c_2 d_-1 + ...)."""
        history: list[Tensor] = []  # d at the newest level first
        for t, t_next in itertools.pairwise(sigmas):
            history = [slope(denoise, x, t), *history[: self.max_order - 1]]
            coefficients = ADAMS_BASHFORTH[len(history) - 1]
            x = x + (t_next - t) * sum(c * d for c, d in zip(coefficients, history, strict=True))
            yield x


@dataclass(frozen=True, slots=True, kw_only=True)
class DPMSolverPP(Solver):
    """DPM-Solver++ multistep (Lu et al. 2022, arXiv 2211.01095), 1 NFE an interval.

    What is extrapolated in log t is D (``prediction`` data; DPM-Solver++) or (x - D) / t (noise;
    the multistep DPM-Solver). The first steps use what history there is. ``thresholding`` clamps
    each predicted image to its 99.5 % quantile (Saharia et al. 2022); the published SFD runs never
    had it.
    """

    name: ClassVar[str] = "dpmpp"

    max_order: int = knob(3, "predictions that a step uses at most", low=1, high=3)
    prediction: Literal["data", "noise"] = knob("data", "what is extrapolated")
    lower_order_final: bool = knob(True, "take the last step with order 1, the one before with 2")
    thresholding: bool = knob(
        False, "clamp predicted images to their 99.5 % quantile and rescale them to [-1, 1]"
    )

    def __post_init__(self) -> None:
        Solver.__post_init__(self)
        if self.thresholding and self.prediction == "noise":
            raise KnobError(
                "thresholding",
                "clamps images, got it with prediction='noise'; drop it or predict 'data'",
            )

    @property
    def order(self) -> int:
        """``max_order``, at most 2, with either prediction.

        The third-order update as published, and as every checkpoint's authors ran it, has half of
        the last term of the expansion: its error is smaller, but falls no faster.
        """
        return min(self.max_order, 2)

    def steps(
        self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: StepNoise = no_noise
    ) -> Iterator[Tensor]:
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


def dynamic_threshold(denoised: Tensor) -> Tensor:
    """Clamp each image to s = max(99.5 % quantile of |x|, 1) and divide by s: [B, C, H, W]."""
    limit = denoised.abs().flatten(1).quantile(0.995, dim=1).clamp(min=1)
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


def trajectory(solver: Solver, denoise: Denoiser, x: Tensor, sigmas: Tensor) -> Tensor:
    """Every state of the walk, the start included.

    Args:
        x: [B, C, H, W] state at ``sigmas[0]``.
        sigmas: [n + 1] float64 on the CPU.

    Returns:
        [n + 1, B, C, H, W].

    Raises:
        InputError: The solver is stochastic.
    """
    import torch

    with torch.no_grad():
        return torch.stack([x, *solver.steps(denoise, x, sigmas)])


def solve(
    solver: Solver, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: StepNoise = no_noise
) -> Tensor:
    """The last state of the walk: [B, C, H, W]; arguments as of ``Solver.steps``."""
    import torch

    with torch.no_grad():
        return deque(solver.steps(denoise, x, sigmas, noise), maxlen=1).pop()


def make_solver(name: str, *, order: int | None = None, **options: Any) -> Solver:  # noqa: ANN401
    """The solver of that name.

    Args:
        name: In ``SOLVERS`` or ``STOCHASTIC_SOLVERS``.
        order: ``max_order`` of a solver that has it, else its order; None for the highest.
        options: The solver's other knobs. One that is False or None may be given to any solver.

    Raises:
        InputError: The name is unknown, or that solver has no such option or order.
    """
    kind = _solver_class(name)
    known = knobs_of(kind)
    given = {key: value for key, value in options.items() if value not in (None, False)}
    if order is not None and "max_order" in known:
        given["max_order"] = order
    elif order is not None and order != (only := kind().order):
        others = _with_option("max_order")
        raise InputError(
            f"{name} only has order {only}, got {order}; leave it out, or take {others}"
        )
    for key in given:
        if key not in known:
            raise InputError(f"{name} has no {key}; leave it out, or take {_with_option(key)}")
    try:
        return kind.read(given)
    except KnobError as error:
        option = "order" if error.name == "max_order" else error.name
        raise InputError(f"{name}'s {option} {error.problem}") from error


def _solver_class(name: str) -> type[Solver]:
    # SOLVERS first: a name that is not built in is looked up in all installed packages.
    is_stochastic = name not in SOLVERS and name in STOCHASTIC_SOLVERS
    return (STOCHASTIC_SOLVERS if is_stochastic else SOLVERS)[name]


def _with_option(name: str) -> str:
    return " or ".join(each for each in SOLVERS if name in knobs_of(SOLVERS[each]))


def solver_from(description: Mapping[str, Any]) -> Solver:
    """The solver that ``Solver.describe`` wrote down.

    Raises:
        InputError: No solver is registered under its name, or its options are others.
    """
    options = dict(description)
    return _solver_class(options.pop("solver")).read(options, "solver")
