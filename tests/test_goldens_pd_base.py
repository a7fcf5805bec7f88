"""The loss of a teacher's training against the progressive distillation reference, in float64."""

import pytest
import torch
from torch import Tensor

from bdense.diffusion.preconditioning import Cosine
from bdense.diffusion.snr_weights import LOSSES, snr_weight
from bdense.diffusion.vp import CosineSchedule
from bdense.training.teacher import squared_error
from tests.goldens import PD, discover, settings, tensors
from tests.pd_nets import tiny_conv

pytestmark = pytest.mark.golden

# |d| / (1 + |ref|); goldens/pd/README.md, section 6, for targets.
BOUND = 1e-11
PREDICTIONS = {"x": "sample", "eps": "epsilon", "v": "v_prediction"}


def schedule_of(config: dict) -> CosineSchedule:
    given = dict(config["schedule"])
    assert given.pop("name") == "cosine"
    return CosineSchedule(**given)


def relative_error(actual: Tensor, golden: Tensor) -> float:
    assert actual.shape == golden.shape
    assert actual.dtype == golden.dtype == torch.float64
    return float(((actual - golden).abs() / (1 + golden.abs())).max())


@pytest.mark.parametrize("mean_type", PREDICTIONS)
@pytest.mark.parametrize("path", discover("targets-base-*.safetensors", PD))
def test_the_denoising_loss(path, mean_type):
    """Every weight, at continuous times and at those of 16 steps."""
    golden, config = tensors(path), settings(path)["config"]
    schedule = schedule_of(config)
    precond = Cosine(prediction_type=PREDICTIONS[mean_type], **schedule.options())
    denoiser = tiny_conv(golden, "model/", precond)
    times = {"cont": golden["u_continuous"], "N16": (golden["i_discrete_N16"] + 1) / 16}
    reference_names = dict(zip(LOSSES, ("constant", "snr", "snr_trunc", "v_mse"), strict=True))
    assert list(reference_names.values()) == config["weight_types"]
    for name, u in times.items():
        sigma = schedule.level(u)
        for loss, reference_name in reference_names.items():
            errors = squared_error(denoiser.branches, golden["x"], golden["eps"], sigma)
            actual = snr_weight(sigma, loss) * errors
            expected = golden[f"{mean_type}/{name}/loss_{reference_name}"]
            error = relative_error(actual.detach(), expected)
            assert error <= BOUND, f"{name} {loss}: off by {error:.3g}"
