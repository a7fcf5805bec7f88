"""Preconditioning by hand, the branches' view of a network, and networks that cannot be."""

import math

import pytest
import torch

from bdense.branches import export_branch, widen_head
from bdense.denoiser import NetworkDenoiser, build_denoiser
from bdense.errors import CheckpointError, InputError, ShapeError
from bdense.networks import SongUNet, SongUNetConfig
from bdense.networks.layers import Conv2d, PositionalEmbedding
from tests.small import same_weights, small_teacher

TINY = {
    "img_resolution": 8,
    "img_channels": 2,
    "model_channels": 8,
    "channel_mult": (1,),
    "num_blocks": 1,
    "attn_resolutions": (),
}


def tiny_config(**options) -> SongUNetConfig:
    return SongUNetConfig(**{**TINY, **options})


class Echo(SongUNet):
    """A network that answers with what it was given: c_in x, plus c_noise."""

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None):
        return x + noise_labels.view(-1, 1, 1, 1)


def numbered_head(num_branches: int) -> NetworkDenoiser:
    """F gives output channel i the value i everywhere."""
    config = tiny_config()
    model = SongUNet(config, config.img_channels * num_branches)
    head = model.get_submodule(model.head_name)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.arange(model.out_channels))
    return NetworkDenoiser(model)


def image(batch: int = 3, channels: int = 2) -> torch.Tensor:
    return torch.randn(batch, channels, 8, 8, generator=torch.Generator().manual_seed(1))


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
    x, twice = image(), NetworkDenoiser(Echo(tiny_config()), sigma_data=1.0)
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


@pytest.mark.parametrize("branch", [0, 4, -1])
def test_a_branch_that_is_not_there_is_refused(branch):
    with pytest.raises(InputError, match=rf"branch must lie in 1\.\.3, got {branch}"):
        export_branch(numbered_head(3), branch=branch)


def test_a_wider_head_is_the_only_cost():
    teacher = small_teacher(channels=3)
    head = 3 * 8 * 9 + 3  # 3 outputs of a 3 x 3 convolution over 8 channels, and their biases
    sizes = [
        sum(p.numel() for p in widen_head(teacher, num_branches).parameters())
        for num_branches in (1, 4)
    ]
    assert sizes[1] - sizes[0] == 3 * head


def test_a_head_that_fits_no_branches_is_refused():
    with pytest.raises(ShapeError, match="3 output channels, which is no multiple of its 2 image"):
        NetworkDenoiser(SongUNet(tiny_config(), 3))
    with pytest.raises(InputError, match="sigma_data must be positive, got 0"):
        NetworkDenoiser(SongUNet(tiny_config()), sigma_data=0.0)


# ---- descriptions ----


def test_a_description_builds_the_same_architecture_again():
    student = widen_head(small_teacher(dropout=0.2, channels=3), 4)
    again = build_denoiser(student.describe())
    assert again.describe() == student.describe()
    again.load_state_dict(student.state_dict())
    again.eval()
    x, sigma = image(channels=3), torch.tensor(1.5)
    assert torch.equal(again.branches(x, sigma), student.branches(x, sigma))


def test_building_leaves_the_callers_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    build_denoiser(small_teacher().describe())
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precond": "vp"}, "precond='vp', network='SongUNet'; this version builds precond='edm'"),
        ({"network": "DhariwalUNet"}, "network='DhariwalUNet'"),
        ({"config": {**TINY, "depth": 3}}, "do not fit a SongUNet: .*'depth'"),
        ({"config": {"img_resolution": 8}}, "do not fit a SongUNet: .*'img_channels'"),
    ],
)
def test_a_description_of_what_is_not_built_is_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        build_denoiser(small_teacher().describe() | change)


# ---- networks ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embedding_type": "fourier"}, "embedding_type='fourier' is not built"),
        ({"encoder_type": "residual"}, "encoder_type='residual' is not built"),
        ({"decoder_type": "skip"}, "decoder_type='skip' is not built"),
        ({"img_channels": 0}, "img_channels must be at least 1, got 0"),
        ({"num_blocks": 0}, "num_blocks must be at least 1, got 0"),
        ({"model_channels": 6}, "model_channels must be a multiple of 4.* got 6"),
        ({"channel_mult": ()}, r"channel_mult one or more numbers .* got 8 and \[\]"),
        ({"channel_mult": (1, 0)}, r"channel_mult .* got 8 and \[1, 0\]"),
        ({"img_resolution": 12, "channel_mult": (1, 1, 1, 1)}, "12 cannot be halved 3 times"),
        ({"dropout": 1.5}, "dropout must lie in 0..1, got 1.5"),
        ({"dropout": math.nan}, "dropout must lie in 0..1, got nan"),
    ],
)
def test_options_that_make_no_network_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        tiny_config(**options)


def test_images_of_another_size_are_refused():
    teacher = small_teacher()
    for shape in ((2, 1, 16, 16), (2, 3, 8, 8)):
        with pytest.raises(ShapeError, match=rf"images \[B, 1, 8, 8\], got \[{shape[0]}, "):
            teacher(torch.zeros(shape), torch.tensor(1.0))


def test_an_untrained_network_answers_almost_nothing():
    """The head starts with gain 1e-5: D is c_skip x."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser = NetworkDenoiser(SongUNet(tiny_config()))
    x = image()
    torch.testing.assert_close(denoiser(x, torch.tensor(0.5)), 0.5 * x, rtol=0, atol=1e-4)


def test_positional_embedding_by_hand():
    """Frequencies 1, 1/100, 1/10000 with the end point; cosines, then sines."""
    frequencies = torch.tensor([1.0, 1e-2, 1e-4])
    embedding = PositionalEmbedding(6, endpoint=True)(torch.tensor([2.0]))
    expected = torch.cat([(2 * frequencies).cos(), (2 * frequencies).sin()])
    torch.testing.assert_close(embedding[0], expected)


def test_halving_takes_means_of_two_by_two_and_doubling_repeats():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    halved = Conv2d(1, 1, 0, down=True)(x)
    assert halved.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    doubled = Conv2d(1, 1, 0, up=True)(halved)
    assert doubled[0, 0].tolist() == [
        [2.5, 2.5, 4.5, 4.5],
        [2.5, 2.5, 4.5, 4.5],
        [10.5, 10.5, 12.5, 12.5],
        [10.5, 10.5, 12.5, 12.5],
    ]


def test_two_copies_are_compared_bit_for_bit():
    """The helper that many tests lean on."""
    assert same_weights(small_teacher(seed=1), small_teacher(seed=1))
    assert not same_weights(small_teacher(seed=1), small_teacher(seed=2))
