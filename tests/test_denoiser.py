"""EDM's preconditioning by hand, the branches' view of a network, and descriptions of both."""

import json

import pytest
import torch

from bdense.diffusion.conditions import ClassLabels
from bdense.diffusion.denoiser import build_denoiser
from bdense.errors import CheckpointError
from tests.networks import TINY, image, one_hot, tiny_denoiser
from tests.small import same_weights, small_teacher

# ---- preconditioning ----


def test_a_float64_level_leaves_the_images_dtype():
    denoised = small_teacher()(image(channels=1), torch.tensor(2.0, dtype=torch.float64))
    assert denoised.dtype == torch.float32
    torch.testing.assert_close(denoised, small_teacher()(image(channels=1), torch.tensor(2.0)))


# ---- branches ----


def test_conditions_are_bound_in_a_closure():
    """What solvers and samplers take: D(x; sigma), labels and all."""
    denoiser = tiny_denoiser(label_dim=3)
    x, labels = image(), one_hot(0, 2, 1)
    sigma = torch.tensor([0.1, 1.0, 9.0])
    assert torch.equal(denoiser.given(ClassLabels(labels))(x, sigma), denoiser(x, sigma, labels))
    assert torch.equal(denoiser.given()(x, sigma), denoiser(x, sigma))
    assert (denoiser.label_dim, denoiser.step_condition) == (3, False)
    assert denoiser.image_shape == (2, 8, 8)


# ---- descriptions ----


def test_the_description_of_a_plain_network_stays_what_it_was():
    """Files written before there were other networks are read, and digests of teachers hold."""
    first_release = {
        "precond": "edm",
        "sigma_data": 0.5,
        "network": "SongUNet",
        "num_branches": 1,
        "config": {
            "img_resolution": 8,
            "img_channels": 1,
            "label_dim": 0,
            "augment_dim": 0,
            "model_channels": 8,
            "channel_mult": (1, 2),
            "channel_mult_emb": 4,
            "num_blocks": 1,
            "attn_resolutions": (),
            "dropout": 0.0,
            "embedding_type": "positional",
            "channel_mult_noise": 1,
            "encoder_type": "standard",
            "decoder_type": "standard",
            "resample_filter": (1, 1),
        },
    }
    assert small_teacher().describe() == first_release
    assert build_denoiser(json.loads(json.dumps(first_release))).describe() == first_release


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precond": "vpp"}, r"precond='vpp', network='SongUNet'; .*'edm', 'iddpm', 've', 'vp'"),
        ({"network": "ADM"}, r"network='ADM'; .*'DhariwalUNet', 'SongUNet'"),
        ({"precond": None}, "precond=None"),
        ({"config": {**TINY, "depth": 3}}, "do not fit a SongUNet: .*'depth'"),
        ({"config": {"img_resolution": 8}}, "do not fit a SongUNet: .*'img_channels'"),
    ],
)
def test_a_description_of_what_is_not_built_is_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        build_denoiser(small_teacher().describe() | change)


# ---- helpers ----


def test_two_copies_are_compared_bit_for_bit():
    """The helper that many tests lean on."""
    assert same_weights(small_teacher(seed=1), small_teacher(seed=1))
    assert not same_weights(small_teacher(seed=1), small_teacher(seed=2))
