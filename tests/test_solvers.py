"""Solvers: the contract of each, and their parts by hand."""

import math

import pytest
import torch

from bdense.diffusion import SOLVERS
from bdense.diffusion.epd import EPD
from bdense.diffusion.sampling import step_noise
from bdense.diffusion.solvers import (
    DDIM,
    DPM2,
    IPNDM,
    DPMSolverPP,
    Euler,
    Heun,
    make_solver,
    trajectory,
)
from bdense.errors import InputError
from bdense.methods.consistency import MultistepConsistency
from tests.contracts.solvers import (
    SolverContract,
    StochasticSolverContract,
    error,
    grid,
    start,
)
from tests.example_package import Renoise
from tests.plugins import example_package
from tests.small import GaussianDenoiser

__all__ = ["example_package"]

MULTISTEP = [
    *(IPNDM(max_order=order) for order in (2, 3, 4)),
    *(
        DPMSolverPP(max_order=order, prediction=prediction)
        for prediction in ("data", "noise")
        for order in (1, 2, 3)
    ),
]
ONE_EVALUATION = [Euler(), DDIM(), *MULTISTEP]
TWO_EVALUATIONS = [Heun(), DPM2(), DPM2(r=0.3), EPD()]
# Around the midpoint, in unequal shares.
TWO_POINTS = EPD(r=((0.2, 0.6),), w=((0.25, 0.75),), o=((1.0, 1.0),), s=((1.0, 1.0),))
NOT_LOWERED = [
    DPMSolverPP(max_order=order, prediction=prediction, lower_order_final=False)
    for prediction in ("data", "noise")
    for order in (1, 2, 3)
]


class TestEverySolver(SolverContract):
    @pytest.fixture(params=[*ONE_EVALUATION, *TWO_EVALUATIONS, TWO_POINTS, *NOT_LOWERED], ids=repr)
    def solver(self, request):
        return request.param


# ---- stochastic solvers ----


@pytest.mark.usefixtures("example_package")
class TestStochasticSolver(StochasticSolverContract):
    @pytest.fixture(params=[Renoise(strength=0.5), MultistepConsistency()], ids=repr)
    def solver(self, request):
        return request.param


def test_a_stochastic_solver_draws_noise_of_each_image_and_interval():
    """Fed the exact consistency function of N(0, 1), which maps N(0, 1 + t^2) to N(0, 1), every
    state has the variance 1 + t^2 - t_N^2."""

    def consistency(x, t):
        return x / (1 + t**2).sqrt()

    sigmas, noise = grid(4), step_noise(0, range(4096), (1, 1, 1))
    x = (1 + sigmas[0] ** 2).sqrt() * noise(9).double()
    states = [*Renoise().steps(consistency, x, sigmas, noise)]
    for t, state in zip(sigmas[1:], states, strict=True):
        assert (state / (1 + t**2 - sigmas[-1] ** 2).sqrt()).std().item() == pytest.approx(1, 0.04)
    flat = torch.cat([noise(0), noise(1)], dim=1).flatten(1)
    assert flat.T.corrcoef()[0, 1].abs() < 0.05


# ---- convergence ----


def test_the_third_order_update_is_better_than_the_second_and_no_faster():
    """It has half of its last term."""
    for prediction in ("data", "noise"):
        second, third = (
            error(DPMSolverPP(max_order=order, prediction=prediction), 160) for order in (2, 3)
        )
        assert third / second == pytest.approx(1 / 3, rel=0.05)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_adams_bashforth_is_exact_for_polynomials_on_equal_steps(order):
    """The slope k t^(k - 1), whatever x, leads along t^k once there are k slopes."""
    sigmas = torch.linspace(9, 1, 9, dtype=torch.float64)
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    states = trajectory(
        IPNDM(max_order=order), lambda x, t: x - t * order * t ** (order - 1), x, sigmas
    )
    errors = (states.flatten().diff() - (sigmas**order).diff()).abs()
    assert errors[: order - 1].min() > 0.1
    assert errors[order - 1 :].max() < 1e-9


def test_dpm2_with_its_second_slope_at_the_end_is_heun():
    denoise, sigmas, x = GaussianDenoiser(0.5), grid(7), start()
    heun = trajectory(Heun(), denoise, x, sigmas)
    same = trajectory(DPM2(r=1), denoise, x, sigmas)
    torch.testing.assert_close(same, heun, rtol=1e-12, atol=1e-12)


def test_first_order_is_euler():
    """DDIM, by any name."""
    denoise, sigmas, x = GaussianDenoiser(0.5), grid(7), start()
    ddim = trajectory(Euler(), denoise, x, sigmas)
    for prediction in ("data", "noise"):
        same = trajectory(DPMSolverPP(max_order=1, prediction=prediction), denoise, x, sigmas)
        torch.testing.assert_close(same, ddim, rtol=1e-12, atol=1e-12)


# ---- by name ----


def test_solvers_by_name():
    assert list(SOLVERS) == ["euler", "ddim", "heun", "dpm2", "ipndm", "dpmpp", "epd"]
    assert make_solver("euler", order=None, thresholding=False, clip=None) == Euler()
    assert make_solver("ddim", clip=True) == DDIM(clip=True)
    assert make_solver("consistency") == MultistepConsistency()
    assert make_solver("heun") == make_solver("heun", order=2) == Heun()
    assert make_solver("dpm2") == DPM2(r=0.5)
    assert make_solver("ipndm") == IPNDM(max_order=4)
    assert make_solver("ipndm", order=2) == IPNDM(max_order=2)
    assert make_solver("dpmpp") == DPMSolverPP(max_order=3, thresholding=False)
    assert make_solver("dpmpp", order=2, thresholding=True) == DPMSolverPP(
        max_order=2, thresholding=True
    )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("heum", {}, "no solver is called 'heum'; .* euler, ddim, heun, .* did you mean heun"),
        ("dpmpp", {"order": 4}, "dpmpp's order must be .* from 1 to 3, got 4"),
        ("ipndm", {"order": 1}, "ipndm's order must be .* from 2 to 4, got 1"),
        ("heun", {"order": 3}, "heun only has order 2, got 3; leave .*, or take ipndm or dpmpp"),
        ("euler", {"order": 2}, "euler only has order 1, got 2"),
        ("heun", {"thresholding": True}, "heun has no thresholding; leave it out, or take dpmpp"),
    ],
)
def test_what_no_solver_has_is_refused(name, options, message):
    with pytest.raises(InputError, match=message):
        make_solver(name, **options)


@pytest.mark.parametrize(
    ("solver", "options", "message"),
    [
        (IPNDM, {"max_order": 5}, "max_order must be .* from 2 to 4, got 5"),
        (DPMSolverPP, {"max_order": 0}, "max_order must be .* from 1 to 3, got 0"),
        (DPMSolverPP, {"prediction": "v"}, "prediction must be one of data, noise, got 'v'"),
        (
            DPMSolverPP,
            {"prediction": "noise", "thresholding": True},
            "thresholding clamps images, got it with prediction='noise'; drop it or predict",
        ),
        (DPM2, {"r": 0.0}, "r must be .* above 0, got 0.0"),
        (DPM2, {"r": 1.5}, "r must be .* got 1.5"),
        (DPM2, {"r": math.nan}, "r must be .* got nan"),
    ],
)
def test_a_solver_that_cannot_be_is_refused(solver, options, message):
    with pytest.raises(InputError, match=message):
        solver(**options)
