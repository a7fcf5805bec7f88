"""DDPM's discrete levels as a continuous schedule, and its preconditioning, in closed form."""

import math

import pytest
import torch

from bdense.diffusion.ddpm import DDPMSchedule
from bdense.diffusion.preconditioning import DDPM, PREDICTIONS, make_preconditioning
from bdense.errors import CheckpointError, InputError

# T = 3 with betas 1/2: alpha_bar 1/2, 1/4, 1/8, hence sigma^2 1, 3, 7.
HALVES = DDPMSchedule(num_train_timesteps=3, trained_betas=(0.5, 0.5, 0.5))


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
        ({"num_train_timesteps": 1}, "at least 2, got 1"),
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
