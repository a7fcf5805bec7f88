"""EDM's preconditioning by hand, the branches' view of a network, and descriptions of both."""

import json
import math

import pytest
import torch

from bdense.diffusion.branches import export_branch, widen_head
from bdense.diffusion.conditions import ClassLabels
from bdense.diffusion.denoiser import NetworkDenoiser, build_denoiser
from bdense.diffusion.preconditioning import EDM
from bdense.errors import CheckpointError, ShapeError
from bdense.networks import SongUNet, SongUNetConfig
from tests.networks import TINY, image, one_hot, tiny_denoiser
from tests.small import same_weights, small_teacher


def tiny_config(**options) -> SongUNetConfig:
    return SongUNetConfig(**TINY | {"channel_mult": (1,)} | options)


class Echo(SongUNet):
    """A network that answers with what it was given: c_in x, plus c_noise."""

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None, num_points=None):
        return x + noise_labels.view(-1, 1, 1, 1)


def numbered_head(num_branches: int) -> NetworkDenoiser:
    """F gives output channel i the value i everywhere."""
    config = tiny_config()
    model = SongUNet(config, num_branches=num_branches)
    head = model.get_submodule(model.head_name)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.arange(model.out_channels))
    return NetworkDenoiser(model)


# ---- preconditioning ----


@pytest.mark.parametrize(
    ("sigma", "c_skip", "c_out", "c_in"),
    [
        # sigma_data = 0.5. At sigma = 0.5: 1/2, 1/(2 sqrt 2), sqrt 2.
        (0.5, 0.5, math.sqrt(0.125), math.sqrt(2.0)),
        # At sigma = 1.2 sqrt(sigma_data^2 + sigma^2) = 1.3.
        (1.2, 0.25 / 1.69, 0.6 / 1.3, 1 / 1.3),
    ],
)
def test_preconditioning_by_hand(sigma, c_skip, c_out, c_in):
    """D = c_skip x + c_out F(c_in x, ln(sigma) / 4), and F says what it was given."""
    x = image()
    denoised = NetworkDenoiser(Echo(tiny_config()))(x, torch.tensor(sigma))
    expected = c_skip * x + c_out * (c_in * x + math.log(sigma) / 4)
    torch.testing.assert_close(denoised, expected, rtol=1e-6, atol=1e-6)


def test_sigma_data_scales_the_levels():
    """Twice sigma_data at twice sigma: c_skip stays, c_out doubles."""
    x, twice = image(), NetworkDenoiser(Echo(tiny_config()), EDM(sigma_data=1.0))
    denoised = twice(x, torch.tensor(1.0))
    # c_skip = 1/2, c_out = 1/sqrt 2, c_in = 1/sqrt 2, c_noise = 0.
    torch.testing.assert_close(denoised, 0.5 * x + 0.5 * x)


def test_without_noise_the_image_is_its_own_prediction():
    x = image(2, channels=1)
    torch.testing.assert_close(small_teacher()(x, torch.tensor(1e-6)), x, rtol=0, atol=1e-4)


def test_each_image_may_have_a_level_of_its_own():
    denoiser, x = NetworkDenoiser(Echo(tiny_config())), image()
    together = denoiser(x, torch.tensor([0.1, 1.0, 80.0]))
    for i, sigma in enumerate((0.1, 1.0, 80.0)):
        torch.testing.assert_close(together[i], denoiser(x[i : i + 1], torch.tensor(sigma))[0])


def test_a_float64_level_leaves_the_images_dtype():
    denoised = small_teacher()(image(channels=1), torch.tensor(2.0, dtype=torch.float64))
    assert denoised.dtype == torch.float32
    torch.testing.assert_close(denoised, small_teacher()(image(channels=1), torch.tensor(2.0)))


# ---- branches ----


def test_branch_k_is_the_kth_group_of_channels():
    denoiser, x, sigma = numbered_head(3), image(), 0.5
    branches = denoiser.branches(x, torch.tensor(sigma))
    assert (denoiser.num_branches, branches.shape) == (3, (3, 3, 2, 8, 8))
    for k in range(3):
        for channel in range(2):
            expected = 0.5 * x[:, channel] + math.sqrt(0.125) * (2 * k + channel)
            torch.testing.assert_close(branches[:, k, channel], expected)


def test_calling_a_branched_denoiser_gives_the_last_branch():
    denoiser, x, sigma = numbered_head(3), image(), torch.tensor(2.0)
    assert torch.equal(denoiser(x, sigma), denoiser.branches(x, sigma)[:, 2])
    assert torch.equal(export_branch(denoiser)(x, sigma), denoiser(x, sigma))
    torch.testing.assert_close(
        export_branch(denoiser, branch=2)(x, sigma), denoiser.branches(x, sigma)[:, 1]
    )


def test_a_head_of_another_width_is_refused():
    odd = SongUNet(tiny_config(), prediction_channels=3)
    with pytest.raises(ShapeError, match=r"predicts 3 channels an image, and precond='edm'"):
        NetworkDenoiser(odd)


@pytest.mark.parametrize("num_branches", [1, 4])
def test_a_student_keeps_dtype_and_mode_and_can_learn(num_branches):
    """Whatever the teacher's parameters were set to: an averaged teacher asks for no gradients."""
    teacher = small_teacher().double().train().requires_grad_(False)
    student = widen_head(teacher, num_branches)
    assert student.training
    assert all(p.dtype == torch.float64 and p.requires_grad for p in student.parameters())
    assert same_weights(export_branch(student), teacher)
    assert not widen_head(teacher.eval(), num_branches).training


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


def test_a_description_builds_the_same_architecture_again():
    student = widen_head(small_teacher(dropout=0.2, channels=3), 4)
    again = build_denoiser(student.describe())
    assert again.describe() == student.describe()
    again.load_state_dict(student.state_dict())
    again.eval()
    x, sigma = image(channels=3), torch.tensor(1.5)
    assert torch.equal(again.branches(x, sigma), student.branches(x, sigma))


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


def test_building_leaves_the_callers_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    build_denoiser(small_teacher().describe())
    assert torch.equal(torch.rand(1), expected)


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
