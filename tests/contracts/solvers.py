"""What every solver promises; subclass a contract and give it a ``solver`` fixture.

Walks go from N(0, 80^2) noise down to 0.006 for data N(0, std^2), whose ODE has a closed form.
"""

import math

import pytest
import torch

from bdense.diffusion import SOLVERS, STOCHASTIC_SOLVERS
from bdense.diffusion.sampling import Sampler, draw_images, sampler_from, step_noise
from bdense.diffusion.schedules import Schedule
from bdense.diffusion.solvers import Solver, analytical_first_step, solve, solver_from, trajectory
from bdense.errors import InputError
from tests.small import GaussianDenoiser, small_teacher


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


class _Common:
    """Of deterministic and stochastic solvers alike."""

    def walk(self, solver, denoise, x, sigmas):
        return solve(solver, denoise, x, sigmas, step_noise(0, range(len(x)), tuple(x.shape[1:])))

    def test_its_name_is_that_of_the_registry(self, solver):
        assert self.registry[solver.name] is type(solver)

    def test_it_comes_back_from_its_description(self, solver):
        assert solver_from(solver.describe()) == solver
        sampler = Sampler(num_intervals=3, afs=False, solver=solver)
        assert sampler_from(sampler.describe()) == sampler

    @pytest.mark.parametrize("num_intervals", [1, 2, 5])
    def test_evaluations_are_counted(self, solver, num_intervals):
        denoise, sigmas = GaussianDenoiser(), grid(num_intervals)
        self.walk(solver, denoise, start(), sigmas)
        assert len(denoise.asked) == solver.nfe(num_intervals)
        assert denoise.asked[0] == sigmas[0].item()
        assert min(denoise.asked) >= sigmas[-1].item() * (1 - 1e-12)

    def test_the_states_dtype_is_kept(self, solver):
        end = self.walk(solver, GaussianDenoiser(), start().float(), grid(3))
        assert end.dtype == torch.float32

    def test_no_gradient_is_kept(self, solver):
        x = start().requires_grad_()
        assert not self.walk(solver, GaussianDenoiser(), x, grid(3)).requires_grad

    def test_a_walk_leaves_nothing_behind(self, solver):
        """A solver is a value: the history of one walk is not the next one's."""
        walks = [self.walk(solver, GaussianDenoiser(), start(), grid(5)) for _ in range(2)]
        assert torch.equal(*walks)

    def test_the_analytical_first_step_saves_one_evaluation(self, solver):
        """A second evaluation in that interval still asks the network."""
        denoise, sigmas = GaussianDenoiser(), grid(4)
        self.walk(solver, analytical_first_step(denoise, sigmas[0]), start(), sigmas)
        assert len(denoise.asked) == solver.nfe(4) - 1
        assert sigmas[0].item() not in denoise.asked

    def test_an_image_does_not_depend_on_its_batch(self, solver):
        teacher, sampler = small_teacher(), Sampler(num_intervals=3, afs=False, solver=solver)
        images = draw_images(teacher, sampler, 5, seed=3)
        again = draw_images(teacher, sampler, 5, seed=3, batch=2)
        # Convolutions over other batches may round another way, which a byte may show.
        assert (again.int() - images.int()).abs().max() <= 1
        assert not torch.equal(draw_images(teacher, sampler, 5, seed=4), images)


class SolverContract(_Common):
    """A solver of the probability flow ODE."""

    registry = SOLVERS

    @pytest.mark.parametrize("std", [1.0, 0.5])
    def test_halving_every_step_divides_the_error_by_two_to_the_order(self, solver, std):
        """Low-order first and last steps cost nothing: D hardly changes at the ends of a walk."""
        ratio = error(solver, 160, std) / error(solver, 320, std)
        assert math.log2(ratio) == pytest.approx(solver.order, abs=0.03)

    def test_a_denoiser_that_does_not_change_is_solved_exactly_in_one_step(self, solver):
        """D = m: x(t) = m + (t / T) (x(T) - m), a straight line."""
        target, x = torch.full((1, 1, 4, 4), 0.3, dtype=torch.float64), start(1)
        for sigmas in (grid(1), grid(5)):
            end = solve(solver, lambda x, sigma: target.expand_as(x), x, sigmas)
            torch.testing.assert_close(end, target + sigmas[-1] / sigmas[0] * (x - target))

    def test_a_trajectory_holds_every_state_and_ends_as_solve_does(self, solver):
        denoise, sigmas, x = GaussianDenoiser(), grid(5), start(3)
        states = trajectory(solver, denoise, x, sigmas)
        assert states.shape == (6, 3, 1, 4, 4)
        assert states.dtype == torch.float64
        assert torch.equal(states[0], x)
        assert torch.equal(states[-1], solve(solver, denoise, x, sigmas))

    def test_a_last_level_of_zero_is_reached_or_refused(self, solver):
        from bdense.diffusion.vp import CosineSchedule

        options = {"num_intervals": 4, "afs": False, "schedule": CosineSchedule()}
        if not solver.reaches_zero:
            with pytest.raises(InputError, match=f"which {solver.name} does not reach; take ddim"):
                Sampler(**options, solver=solver)
            return
        images = Sampler(**options, solver=solver)(GaussianDenoiser(), start() / 80)
        assert bool(images.isfinite().all())


class StochasticSolverContract(_Common):
    """A solver that adds noise in each interval."""

    registry = STOCHASTIC_SOLVERS

    def test_its_noise_decides_where_it_goes(self, solver):
        x, sigmas = start(3), grid(4)

        def end(x: torch.Tensor, seed: int, images: range) -> torch.Tensor:
            noise = step_noise(seed, images, (1, 4, 4))
            return solve(solver, GaussianDenoiser(), x, sigmas, noise)

        whole = end(x, 0, range(3))
        assert not torch.equal(whole, end(x, 1, range(3)))
        torch.testing.assert_close(end(x[1:2], 0, range(1, 2)), whole[1:2])

    def test_it_is_refused_where_states_must_follow_from_the_first(self, solver):
        with pytest.raises(InputError, match="draws noise in every interval"):
            trajectory(solver, GaussianDenoiser(), start(), grid(3))
