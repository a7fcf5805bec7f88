"""Solvers on denoisers whose ODE has a closed form, and their parts by hand."""

import math

import pytest
import torch

from bdense.errors import InputError
from bdense.schedules import Schedule
from bdense.solvers import (
    DPMSolverPP,
    Euler,
    Solver,
    analytical_first_step,
    dynamic_threshold,
    make_solver,
    solve,
    trajectory,
)
from tests.small import GaussianDenoiser

SOLVERS = [Euler(), *(DPMSolverPP(max_order=order) for order in (1, 2, 3))]
each_solver = pytest.mark.parametrize(
    "solver", SOLVERS, ids=["euler", "dpmpp1", "dpmpp2", "dpmpp3"]
)


def grid(num_intervals: int, *, low: float = 0.006, high: float = 80.0) -> torch.Tensor:
    return Schedule(kind="logsnr", sigma_min=low, sigma_max=high).grid(num_intervals)


def start(batch: int = 2) -> torch.Tensor:
    noise = torch.randn(batch, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return 80 * noise.double()


def error(solver: Solver, num_intervals: int, std: float = 1.0) -> float:
    """How far the end of a walk from x = 80 is from the exact one."""
    denoise, sigmas = GaussianDenoiser(std), grid(num_intervals)
    x = torch.full((1, 1, 1, 1), 80.0, dtype=torch.float64)
    return (solve(solver, denoise, x, sigmas) - denoise.solution(x, sigmas)[-1]).abs().item()


# ---- convergence ----


@pytest.mark.parametrize("std", [1.0, 0.5])
@pytest.mark.parametrize(
    "solver",
    [
        Euler(),
        *(
            DPMSolverPP(max_order=order, lower_order_final=lower)
            for order in (1, 2, 3)
            for lower in (True, False)
        ),
    ],
    ids=repr,
)
def test_halving_every_step_divides_the_error_by_two_to_the_order(solver, std):
    """Low-order first and last steps cost nothing: D hardly changes at the ends of 80..0.006."""
    ratio = error(solver, 160, std) / error(solver, 320, std)
    assert math.log2(ratio) == pytest.approx(solver.order, abs=0.03)


def test_orders_as_they_are_measured():
    """The third-order update has half of its last term: better than the second, no faster."""
    assert [solver.order for solver in SOLVERS] == [1, 1, 2, 2]
    second, third = (error(DPMSolverPP(max_order=order), 160) for order in (2, 3))
    assert third / second == pytest.approx(1 / 3, rel=0.05)


@each_solver
def test_a_denoiser_that_does_not_change_is_solved_exactly_in_one_step(solver):
    """D = m: x(t) = m + (t / T) (x(T) - m), a straight line."""
    target, x = torch.full((1, 1, 2, 2), 0.3, dtype=torch.float64), start(1)[..., :2, :2]
    for sigmas in (grid(1), grid(5)):
        end = solve(solver, lambda x, sigma: target, x, sigmas)
        torch.testing.assert_close(end, target + sigmas[-1] / sigmas[0] * (x - target))


def test_a_step_of_order_two_by_hand():
    """D is taken half a step ahead, along its slope over the step before."""
    sigmas = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)
    predictions = iter([torch.full((1, 1, 1, 1), v, dtype=torch.float64) for v in (1.0, 3.0)])
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    states = trajectory(
        DPMSolverPP(max_order=2, lower_order_final=False),
        lambda x, sigma: next(predictions),
        x,
        sigmas,
    )
    # t'/t = 1/2 in both steps: x1 = 0/2 + 1/2 * 1; x2 = x1/2 + 1/2 * (3 + (3 - 1) / 2).
    assert states.flatten().tolist() == pytest.approx([0.0, 0.5, 0.25 + 0.5 * 4.0])


def test_first_order_is_euler():
    """DDIM, by either name."""
    denoise, sigmas, x = GaussianDenoiser(0.5), grid(7), start()
    ddim = trajectory(Euler(), denoise, x, sigmas)
    torch.testing.assert_close(
        trajectory(DPMSolverPP(max_order=1), denoise, x, sigmas), ddim, rtol=1e-12, atol=1e-12
    )


def test_lower_order_final_bounds_the_last_two_steps_alone():
    denoise, sigmas, x = GaussianDenoiser(), grid(6, low=0.5, high=8.0), start()
    on = trajectory(DPMSolverPP(max_order=3), denoise, x, sigmas)
    off = trajectory(DPMSolverPP(max_order=3, lower_order_final=False), denoise, x, sigmas)
    assert torch.equal(on[:5], off[:5])
    assert not torch.equal(on[5], off[5])
    # The last step of order 1 is Euler's from where the walk stands.
    last = solve(Euler(), denoise, on[5], sigmas[-2:])
    torch.testing.assert_close(on[6], last, rtol=1e-12, atol=1e-12)


# ---- what a walk costs and gives ----


@each_solver
@pytest.mark.parametrize("num_intervals", [1, 2, 5])
def test_evaluations_are_as_many_as_announced_and_at_the_grids_levels(solver, num_intervals):
    denoise, sigmas = GaussianDenoiser(), grid(num_intervals)
    solve(solver, denoise, start(), sigmas)
    assert solver.nfe(num_intervals) == num_intervals
    assert denoise.asked == sigmas[:-1].tolist()


@each_solver
def test_a_trajectory_holds_every_state_and_ends_as_solve_does(solver):
    denoise, sigmas, x = GaussianDenoiser(), grid(5), start(3)
    states = trajectory(solver, denoise, x, sigmas)
    assert states.shape == (6, 3, 1, 4, 4)
    assert states.dtype == torch.float64
    assert torch.equal(states[0], x)
    assert torch.equal(states[-1], solve(solver, denoise, x, sigmas))
    # Order 1 at the start, so the first state is Euler's for all of them.
    torch.testing.assert_close(states[1], solve(Euler(), denoise, x, sigmas[:2]))


def test_a_fine_trajectory_follows_the_solution_at_every_level():
    denoise, sigmas, x = GaussianDenoiser(0.5), grid(400), start()
    states = trajectory(DPMSolverPP(), denoise, x, sigmas)
    exact = denoise.solution(x, sigmas)
    assert ((states - exact).abs() <= 1e-4 * exact.abs()).all()


@each_solver
def test_denoise_to_zero_appends_the_prediction_at_the_last_level(solver):
    denoise, sigmas, x = GaussianDenoiser(), grid(4), start()
    states = trajectory(solver, denoise, x, sigmas, denoise_to_zero=True)
    assert states.shape[0] == 6
    assert len(denoise.asked) == solver.nfe(4) + 1
    assert denoise.asked[-1] == sigmas[-1].item()
    assert torch.equal(states[5], GaussianDenoiser()(states[4], sigmas[-1]))


def test_the_states_dtype_is_kept():
    x = start().float()
    for solver in SOLVERS:
        assert solve(solver, GaussianDenoiser(), x, grid(3)).dtype == torch.float32


def test_no_gradient_is_kept():
    x = start().requires_grad_()
    assert not solve(Euler(), GaussianDenoiser(), x, grid(3)).requires_grad
    assert not trajectory(Euler(), GaussianDenoiser(), x, grid(3)).requires_grad


# ---- thresholding and the analytical first step ----


def test_dynamic_threshold_by_hand():
    """The 0.5 quantile of 1..5 is 3: clamped to it and divided by it; each image by its own."""
    image = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0]).view(1, 1, 1, 5)
    both = torch.cat([image, 2 * image])
    expected = torch.tensor([1 / 3, -2 / 3, 1.0, -1.0, 1.0])
    thresholded = dynamic_threshold(both, quantile=0.5)
    torch.testing.assert_close(thresholded[0].flatten(), expected)
    torch.testing.assert_close(thresholded[1].flatten(), expected)
    small = image / 10
    assert torch.equal(dynamic_threshold(small), small)


def test_thresholding_bounds_every_prediction():
    """D = 2 everywhere becomes 1."""
    solver = DPMSolverPP(max_order=3, thresholding=True)
    x = torch.zeros(1, 1, 2, 2)
    sigmas = grid(4)
    end = solve(solver, lambda x, sigma: torch.full_like(x, 2.0), x, sigmas)
    torch.testing.assert_close(end, torch.full_like(x, 1 - (sigmas[-1] / sigmas[0]).item()))


def test_the_analytical_first_step_asks_no_network():
    """It walks along x / sqrt(1 + t^2), and only there."""
    denoise, sigmas, x = GaussianDenoiser(), grid(4), start()
    guess = analytical_first_step(denoise, sigmas[0])
    first = solve(Euler(), guess, x, sigmas[:2])
    expected = x + (sigmas[1] - sigmas[0]) * x / (1 + sigmas[0] ** 2).sqrt()
    torch.testing.assert_close(first, expected, rtol=1e-12, atol=1e-12)
    assert denoise.asked == []
    solve(Euler(), guess, x, sigmas)
    assert denoise.asked == sigmas[1:-1].tolist()


# ---- by name ----


def test_solvers_by_name():
    assert make_solver("euler") == Euler()
    assert make_solver("dpmpp") == DPMSolverPP(max_order=3, thresholding=False)
    assert make_solver("dpmpp", order=2, thresholding=True) == DPMSolverPP(
        max_order=2, thresholding=True
    )


def test_an_unknown_solver_or_order_is_refused():
    with pytest.raises(InputError, match=r"'heum' is unknown; choose from \['euler', 'dpmpp'\]"):
        make_solver("heum")
    with pytest.raises(InputError, match="orders 1, 2 and 3, got 4"):
        make_solver("dpmpp", order=4)
