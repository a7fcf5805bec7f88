"""VP processes as schedules: their grids, in closed form."""

import json
import math

import pytest
import torch

from bdense.diffusion.ddpm import DDPMSchedule
from bdense.diffusion.preconditioning import (
    DDPM,
    EDM,
    PREDICTIONS,
    Cosine,
    make_preconditioning,
    native_schedule,
)
from bdense.diffusion.sampling import schedule_from
from bdense.diffusion.schedules import Schedule
from bdense.diffusion.vp import CosineSchedule
from bdense.errors import CheckpointError, InputError

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
    with pytest.raises(InputError, match=r"schedule native needs .*precond='edm'"):
        native_schedule(EDM())


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (-math.inf, 0.0), (0.0, math.nan)])
def test_bounds_that_are_none_are_refused(low, high):
    with pytest.raises(InputError, match=f"logsnr_min < logsnr_max, got {low} and {high}"):
        CosineSchedule(logsnr_min=low, logsnr_max=high)


# ---- DDPM's discrete times, and networks on a process ----


def test_levels_at_the_trained_times():
    times = torch.arange(3)
    assert HALVES.sigma(times).tolist() == pytest.approx([1, math.sqrt(3), math.sqrt(7)])
    assert (HALVES.sigma_min, HALVES.sigma_max) == pytest.approx((1, math.sqrt(7)))


def test_log_alpha_bar_is_a_straight_line_between_them():
    assert float(HALVES.log_alpha_bar(torch.tensor(1.25))) == pytest.approx(-2.25 * math.log(2))
    assert float(HALVES.sigma(torch.tensor(0.5))) == pytest.approx(math.sqrt(2**1.5 - 1))


def test_times_of_levels_are_fractions_and_end_where_training_did():
    sigma = torch.tensor([0.01, 1.0, math.sqrt(2**1.5 - 1), math.sqrt(3), math.sqrt(7), 80.0])
    assert HALVES.time(sigma).tolist() == pytest.approx([0, 0, 0.5, 1, 2, 2], abs=1e-6)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_time_undoes_sigma(beta_schedule):
    schedule = DDPMSchedule(beta_schedule=beta_schedule)
    times = torch.linspace(0, 999, 4321, dtype=torch.float64)
    torch.testing.assert_close(schedule.time(schedule.sigma(times)), times, rtol=0, atol=1e-9)
    assert bool((schedule.sigma(times).diff() > 0).all())


def test_1024_steps_on_1000_times_are_all_different():
    """Rounded to whole times, 24 of them would be empty."""
    times = torch.linspace(0, 999, 1024, dtype=torch.float64)
    sigma = DDPMSchedule().sigma(times)
    assert len(sigma.unique()) == 1024
    assert len(times.round().unique()) == 1000


def test_the_published_levels_of_ddpm():
    """At one step an error in epsilon is amplified 157 times."""
    schedule = DDPMSchedule()
    assert schedule.sigma_max == pytest.approx(157.4, abs=0.05)
    assert schedule.sigma_min == pytest.approx(math.sqrt(1e-4 / (1 - 1e-4)))


def test_a_meta_device_in_force_does_not_reach_the_table():
    with torch.device("meta"):
        schedule = DDPMSchedule(num_train_timesteps=10)
    assert schedule.sigma_max == DDPMSchedule(num_train_timesteps=10).sigma_max


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta_schedule": "sigmoid"}, "beta_schedule must be one of linear, .*got 'sigmoid'"),
        ({"num_train_timesteps": 1}, "2 to 1000000, got 1"),
        ({"beta_end": 1.5}, "between 0 and 1, got 0.0001 to 1.5"),
        ({"beta_start": -0.1}, "between 0 and 1, got -0.1"),
        ({"trained_betas": (0.1, 0.2)}, "has 2 values and num_train_timesteps is 1000"),
    ],
)
def test_schedules_that_are_none(options, message):
    with pytest.raises(InputError, match=message):
        DDPMSchedule(**options)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_an_exact_network_gives_the_exact_image(prediction):
    """With x_0 and the noise known, F is known too, and D must be x_0."""
    column = make_preconditioning(
        "ddpm",
        {"trained_betas": [0.5] * 3, "num_train_timesteps": 3, "prediction_type": prediction},
    )
    x_0, noise = torch.randn(2, 5, 1, 4, 4, dtype=torch.float64)
    sigma = torch.tensor([0.1, 1.0, 1.5, 2.0, 9.0], dtype=torch.float64).view(-1, 1, 1, 1)
    alpha, s = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
    F = {"epsilon": noise, "sample": x_0, "v_prediction": alpha * noise - s * x_0}[prediction]
    c_skip, c_out, c_in, c_noise = column(sigma)
    x = x_0 + sigma * noise
    torch.testing.assert_close(c_skip * x + c_out * F, x_0)
    torch.testing.assert_close(c_in * x, alpha * x_0 + s * noise)
    assert c_noise.flatten()[:2].tolist() == [0, 0]
    assert c_noise.shape == sigma.shape
    assert make_preconditioning("ddpm", column.options()) == column


def test_an_unknown_prediction_is_refused():
    with pytest.raises(InputError, match=r"prediction_type must be one of .*got 'score'"):
        DDPM(prediction_type="score")
    with pytest.raises(CheckpointError, match="do not fit precond='ddpm'"):
        make_preconditioning("ddpm", {"gamma": 1})
