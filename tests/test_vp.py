"""VP processes as schedules: their grids, in closed form."""

import json
import math

import pytest
import torch

from bdense.diffusion.ddpm import DDPMSchedule
from bdense.diffusion.preconditioning import DDPM, EDM, Cosine, native_schedule
from bdense.diffusion.sampling import schedule_from
from bdense.diffusion.schedules import Schedule
from bdense.diffusion.vp import CosineSchedule
from bdense.errors import InputError

COSINE = CosineSchedule()
NARROW = CosineSchedule(logsnr_min=-6.0, logsnr_max=9.0)
DDPM_1000 = DDPMSchedule()
# T = 3 with betas 1/2: alpha_bar 1/2, 1/4, 1/8, hence sigma^2 1, 3, 7.
HALVES = DDPMSchedule(num_train_timesteps=3, trained_betas=(0.5, 0.5, 0.5))
EACH = pytest.mark.parametrize(
    "schedule", [COSINE, NARROW, DDPM_1000, HALVES], ids=["cosine", "narrow", "ddpm", "halves"]
)


def angles_between(schedule: CosineSchedule) -> tuple[float, float]:
    """phi at u = 0 and 1, where sigma = tan(phi) = exp(-logsnr / 2)."""
    low, high = (-schedule.logsnr_max / 2, -schedule.logsnr_min / 2)
    return math.atan(math.exp(low)), math.atan(math.exp(high))


# ---- grids ----


@EACH
@pytest.mark.parametrize("substeps", [2, 3, 4, 7])
def test_the_teachers_grid_holds_the_students_bit_for_bit(schedule, substeps):
    for num_steps in (1, 2, 3, 5, 49, 128, 1000):
        fine = schedule.grid(num_steps * substeps)
        assert torch.equal(fine[::substeps], schedule.grid(num_steps))


@EACH
@pytest.mark.parametrize("num_steps", [1, 2, 3, 64, 1024])
def test_a_grid_falls_from_the_highest_level_to_0(schedule, num_steps):
    grid = schedule.grid(num_steps)
    assert (grid.shape, grid.dtype) == ((num_steps + 1,), torch.float64)
    assert float(grid[0]) == pytest.approx(schedule.sigma_max, rel=1e-11)
    assert float(grid[-1]) == 0
    assert bool((grid.diff() < 0).all())


def test_the_levels_of_halves_by_hand():
    """u = 1, 5/6, .., 1/6: between the times log alpha_bar is a straight line."""
    squares = [2 ** (3 * u / 6) - 1 for u in range(6, -1, -1)]
    assert HALVES.grid(6).tolist() == pytest.approx([math.sqrt(s) for s in squares], rel=1e-12)


@pytest.mark.parametrize("schedule", [COSINE, NARROW])
def test_cosine_in_closed_form(schedule):
    """z = cos(phi) x_0 + sin(phi) eps, phi even in u; sigma = tan(phi)."""
    low, high = angles_between(schedule)
    u = torch.linspace(0, 1, 101, dtype=torch.float64)[1:]
    phi = low + (high - low) * u
    torch.testing.assert_close(schedule.level(u), phi.sin() / phi.cos(), rtol=1e-10, atol=0)
    assert schedule.sigma_max == pytest.approx(math.exp(-schedule.logsnr_min / 2), rel=1e-15)
    assert schedule.sigma_min == pytest.approx(math.exp(-schedule.logsnr_max / 2), rel=1e-15)
    # logsnr = ln(alpha^2 / s^2) = -2 ln sigma.
    logsnr = -2 * schedule.level(torch.tensor(1e-12)).log()
    assert float(logsnr) == pytest.approx(schedule.logsnr_max, abs=1e-6)


@EACH
def test_the_start_is_z_over_alpha(schedule):
    """z ~ N(0, 1) itself, where EDM's schedules leave out what there is of an image."""
    noise = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    alpha = 1 / math.sqrt(1 + schedule.sigma_max**2)
    start = schedule.start(noise)
    assert start.dtype == noise.dtype
    torch.testing.assert_close(alpha * start, noise, rtol=1e-6, atol=0)
    assert torch.equal(Schedule().start(noise), 80 * noise)


# ---- levels to train at ----


@pytest.mark.parametrize("schedule", [COSINE, NARROW])
def test_cosine_draws_angles_evenly(schedule):
    """From the noisy end, included, to the clean one, at which there would be none to learn."""
    u = torch.arange(1000, dtype=torch.float64) / 1000
    angles = schedule.draw(u).atan()
    low, high = angles_between(schedule)
    assert float(angles[0]) == pytest.approx(high, rel=1e-12)
    steps = angles.diff()
    torch.testing.assert_close(steps, torch.full_like(steps, (low - high) / 1000))
    assert float(angles[-1]) > low


def test_ddpm_draws_each_of_its_times_as_often():
    u = (torch.arange(5000, dtype=torch.float64) + 0.5) / 5000
    levels, counts = DDPM_1000.draw(u).unique(return_counts=True)
    assert counts.tolist() == [5] * 1000
    torch.testing.assert_close(levels, DDPM_1000.sigma(torch.arange(1000)), rtol=0, atol=0)


# ---- in words ----


@pytest.mark.parametrize(
    "schedule",
    [NARROW, HALVES, DDPMSchedule(num_train_timesteps=64, beta_end=0.3), Schedule(rho=5.0)],
)
def test_a_description_is_read_back(schedule):
    again = schedule_from(json.loads(json.dumps(schedule.describe())))
    assert again == schedule
    assert torch.equal(again.grid(12), schedule.grid(12))


def test_a_networks_own_process_is_that_of_its_preconditioning():
    """Without what it predicts, in which processes do not differ."""
    assert native_schedule(Cosine(logsnr_min=-6.0, logsnr_max=9.0)) == NARROW
    for prediction in ("epsilon", "v_prediction"):
        precond = DDPM(num_train_timesteps=3, trained_betas=(0.5,) * 3, prediction_type=prediction)
        assert native_schedule(precond) == HALVES
        assert type(native_schedule(precond)) is DDPMSchedule
    with pytest.raises(InputError, match="precond='edm' was trained on no VP process; choose a"):
        native_schedule(EDM())


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (-math.inf, 0.0), (0.0, math.nan)])
def test_bounds_that_are_none_are_refused(low, high):
    with pytest.raises(InputError, match=f"logsnr_min < logsnr_max, got {low} and {high}"):
        CosineSchedule(logsnr_min=low, logsnr_max=high)


def test_a_grid_of_nothing_is_refused():
    with pytest.raises(InputError, match="at least 1 interval, got 0"):
        COSINE.grid(0)
