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
from bdense.errors import InputError

COSINE = CosineSchedule()
NARROW = CosineSchedule(logsnr_min=-6.0, logsnr_max=9.0)
DDPM_1000 = DDPMSchedule()
# T = 3 with betas 1/2: alpha_bar 1/2, 1/4, 1/8, hence sigma^2 1, 3, 7.
HALVES = DDPMSchedule(num_train_timesteps=3, trained_betas=(0.5, 0.5, 0.5))


def angles_between(schedule: CosineSchedule) -> tuple[float, float]:
    """phi at u = 0 and 1, where sigma = tan(phi) = exp(-logsnr / 2)."""
    low, high = (-schedule.logsnr_max / 2, -schedule.logsnr_min / 2)
    return math.atan(math.exp(low)), math.atan(math.exp(high))


# ---- levels to train at ----


@pytest.mark.parametrize("schedule", [COSINE, NARROW])
def test_cosine_draws_angles_evenly(schedule):
    """From the noisy end, included, to the clean one, at which there would be none to learn."""
    u = torch.arange(1000, dtype=torch.float64) / 1000
    angles = schedule.draw(u).atan()
    low, high = angles_between(schedule)
    ends = math.tan(low), math.tan(high)
    assert (schedule.sigma_min, schedule.sigma_max) == pytest.approx(ends, rel=1e-9)
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


def test_times_of_levels_are_fractions_and_end_where_training_did():
    sigma = torch.tensor([0.01, 1.0, math.sqrt(2**1.5 - 1), math.sqrt(3), math.sqrt(7), 80.0])
    assert HALVES.time(sigma).tolist() == pytest.approx([0, 0, 0.5, 1, 2, 2], abs=1e-6)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_time_undoes_sigma(beta_schedule):
    schedule = DDPMSchedule(beta_schedule=beta_schedule)
    times = torch.linspace(0, 999, 4321, dtype=torch.float64)
    torch.testing.assert_close(schedule.time(schedule.sigma(times)), times, rtol=0, atol=1e-9)
    assert bool((schedule.sigma(times).diff() > 0).all())


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
