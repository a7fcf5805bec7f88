"""Denoisers: the columns of Karras et al.'s table 1 written out, branches, descriptions."""

import json
import math

import pytest
import torch

from bdense.diffusion.denoiser import NetworkDenoiser, build_denoiser
from bdense.diffusion.preconditioning import EDM, IDDPM, VE, VP
from bdense.errors import CheckpointError, InputError, ShapeError
from bdense.networks.song_unet import SongUNet, SongUNetConfig
from tests.networks import TINY, image
from tests.small import small_teacher

LEVELS = [1e-3, 0.02, 0.5, 1.2, 7.0, 80.0]


def coefficients(precond, sigmas):
    sigma = torch.tensor(sigmas, dtype=torch.float64).view(-1, 1, 1, 1)
    result = precond(sigma)
    assert all(c.shape == sigma.shape and c.dtype == torch.float64 for c in result)
    return [c.flatten().tolist() for c in result]


# ---- the table ----


def test_vp():
    """c_noise / (M - 1) is the time t at which sigma(t) is sigma."""
    options = {"beta_d": 11.0, "beta_min": 0.3, "M": 500}
    c_skip, c_out, c_in, c_noise = coefficients(VP(**options), LEVELS)
    assert c_skip == [1.0] * len(LEVELS)
    assert c_out == [-s for s in LEVELS]
    assert c_in == pytest.approx([1 / math.sqrt(s**2 + 1) for s in LEVELS], rel=1e-12)
    times = [c / 499 for c in c_noise]
    back = [math.sqrt(math.expm1(11.0 / 2 * t**2 + 0.3 * t)) for t in times]
    assert back == pytest.approx(LEVELS, rel=1e-10)


def test_ve():
    c_skip, c_out, c_in, c_noise = coefficients(VE(), LEVELS)
    assert c_skip == c_in == [1.0] * len(LEVELS)
    assert c_out == LEVELS
    assert c_noise == pytest.approx([math.log(s / 2) for s in LEVELS], rel=1e-12)


def test_iddpm_levels_are_those_of_a_cosine_schedule():
    """u_j^2 + 1 = alpha_M / alpha_j, until the clip at C_1 that holds for u_0 alone."""
    precond = IDDPM()
    u = precond.levels()

    def alpha(j):
        return math.sin(0.5 * math.pi * j / (1000 * 1.008)) ** 2

    assert (len(u), u[1000]) == (1001, 0.0)
    expected = [math.sqrt(alpha(1000) / alpha(j) - 1) for j in range(1, 1001)]
    assert u[1:] == pytest.approx(expected, rel=1e-9)
    assert u[0] == pytest.approx(math.sqrt((u[1] ** 2 + 1) / 0.001 - 1), rel=1e-9)
    assert (precond.sigma_min, precond.sigma_max) == (u[999], u[0])


def test_iddpm_rounds_the_level_for_the_network_alone():
    u = IDDPM(M=10).levels()
    near = [u[0] * 2, u[1], u[4] * 1.001, u[9] * 0.999, (u[3] + u[4]) / 2 - 1e-9]
    c_skip, c_out, c_in, c_noise = coefficients(IDDPM(M=10), near)
    assert c_noise == [9.0, 8.0, 5.0, 0.0, 5.0]
    assert c_skip == [1.0] * 5
    assert c_out == [-s for s in near]
    assert c_in == pytest.approx([1 / math.sqrt(s**2 + 1) for s in near], rel=1e-12)


def test_the_levels_that_a_network_was_trained_for():
    assert (EDM().sigma_min, EDM().sigma_max) == (0.0, math.inf)
    # As the golden VP file has them; its float32 lost the third digit of the lower one.
    assert VP().sigma_max == pytest.approx(152.16697692871094, rel=1e-6)
    assert VP().sigma_min == pytest.approx(0.0009765625, rel=0.03)
    assert (VE(sigma_min=0.1).sigma_min, VE().sigma_max) == (0.1, 100.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EDM(sigma_data=0.0), "sigma_data must be .* above 0, got 0.0"),
        (lambda: VP(beta_d=math.nan), "beta_d must be .* above 0, got nan"),
        (lambda: VP(beta_min=math.inf), "beta_min must be a .*number, got inf"),
        (lambda: VE(sigma_max=-1.0), "sigma_max must be .* above 0, got -1.0"),
        (lambda: IDDPM(M=0), "M must be a whole number from 1 to 100000, got 0"),
    ],
)
def test_options_that_make_no_preconditioning_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


# ---- in a denoiser ----


class Echo(SongUNet):
    """A network that answers with what it was given: c_in x, plus c_noise; then a variance."""

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None, num_points=None):
        prediction = x + noise_labels.view(-1, 1, 1, 1)
        rest = self.prediction_channels - x.shape[1]
        group = torch.cat([prediction, torch.full_like(x, 1e9)[:, :rest]], dim=1)
        return group.repeat(1, self.num_branches, 1, 1)


@pytest.mark.parametrize("precond", [EDM(sigma_data=0.7), VP(), VE(), IDDPM()])
@pytest.mark.parametrize("num_branches", [1, 3])
def test_a_denoiser_is_its_table(precond, num_branches):
    """D^k = c_skip x + c_out (c_in x + c_noise); a variance after F is left alone."""
    channels = 2 * precond.outputs
    net = Echo(SongUNetConfig(**TINY), num_branches=num_branches, prediction_channels=channels)
    denoiser = NetworkDenoiser(net, precond)
    assert denoiser.num_branches == num_branches
    x = image(6).double()
    branches = denoiser.branches(x, torch.tensor(LEVELS))
    assert branches.shape == (6, num_branches, 2, 8, 8)
    for i, c in enumerate(zip(*coefficients(precond, torch.tensor(LEVELS).tolist()), strict=True)):
        c_skip, c_out, c_in, c_noise = c
        expected = c_skip * x[i] + c_out * (c_in * x[i] + c_noise)
        for k in range(num_branches):
            torch.testing.assert_close(branches[i, k], expected, rtol=1e-9, atol=1e-9)


def test_a_head_without_the_variance_is_refused():
    net = SongUNet(SongUNetConfig(**TINY))
    with pytest.raises(ShapeError, match=r"predicts 2 channels .*'iddpm' takes 2 for each"):
        NetworkDenoiser(net, IDDPM())


def test_a_float64_level_leaves_the_images_dtype():
    denoised = small_teacher()(image(channels=1), torch.tensor(2.0, dtype=torch.float64))
    assert denoised.dtype == torch.float32
    torch.testing.assert_close(denoised, small_teacher()(image(channels=1), torch.tensor(2.0)))


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
        ({"network": "ADM"}, r"network='ADM'; .*'DhariwalUNet', .*'SongUNet'"),
        ({"precond": None}, "precond=None"),
        ({"precond": "vp"}, "do not fit precond='vp': .*'sigma_data'"),
        ({"M": "many"}, "do not fit precond='edm': .*'M'"),
        ({"config": {**TINY, "depth": 3}}, "do not fit a SongUNet: .*'depth'"),
        ({"config": {"img_resolution": 8}}, "do not fit a SongUNet: .*'img_channels'"),
    ],
)
def test_a_description_of_what_is_not_built_is_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        build_denoiser(small_teacher().describe() | change)
