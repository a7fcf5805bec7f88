"""Networks: the contract of each, EDM's written out by hand, labels, and options refused."""

import math

import pytest
import torch
import torch.nn.functional as F

from bdense.errors import InputError, ShapeError
from bdense.networks.dhariwal_unet import DhariwalUNet, DhariwalUNetConfig
from bdense.networks.diffusers_unet import DiffusersTextUNet, DiffusersUNet
from bdense.networks.dit import DiT
from bdense.networks.song_unet import SongUNet, SongUNetConfig
from tests.contracts.networks import NetworkContract
from tests.example_package import PatchNetwork
from tests.networks import TEXT_UNET, TINY, UNET, image, one_hot, tiny_denoiser, untrained
from tests.plugins import example_package

__all__ = ["example_package"]

BOTH = pytest.mark.parametrize("network", ["SongUNet", "DhariwalUNet"])


# ---- whole networks, written out ----


@pytest.mark.parametrize("encoder_type", ["standard", "skip", "residual"])
@pytest.mark.parametrize("decoder_type", ["standard", "skip"])
@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_the_paths_of_ncsnpp_written_out(encoder_type, decoder_type, taps):
    """Two levels of one block: every connection that the options add, by hand."""
    net = tiny_denoiser(
        encoder_type=encoder_type, decoder_type=decoder_type, resample_filter=taps
    ).model
    x, noise, seen = image(), torch.tensor([0.3, -0.2, 1.0]), {}
    net.map_layer1.register_forward_hook(lambda *call: seen.update(emb=F.silu(call[2])))
    out = net(x, noise)
    enc, dec, emb = net.enc, net.dec, seen["emb"]

    e0 = enc["8x8_conv"](x)
    e1 = enc["8x8_block0"](e0, emb)
    e2 = enc["4x4_down"](e1, emb)
    if encoder_type == "skip":
        e2 = e2 + enc["4x4_aux_skip"](enc["4x4_aux_down"](x))
    if encoder_type == "residual":
        e2 = (e2 + enc["4x4_aux_residual"](x)) / math.sqrt(2)
    e3 = enc["4x4_block0"](e2, emb)
    h = dec["4x4_in1"](dec["4x4_in0"](e3, emb), emb)
    h = dec["4x4_block0"](torch.cat([h, e3], 1), emb)
    h = dec["4x4_block1"](torch.cat([h, e2], 1), emb)
    low = F.silu(dec["4x4_aux_norm"](h)) if decoder_type == "skip" else None
    h = dec["8x8_up"](h, emb)
    h = dec["8x8_block0"](torch.cat([h, e1], 1), emb)
    h = dec["8x8_block1"](torch.cat([h, e0], 1), emb)
    expected = dec["8x8_aux_conv"](F.silu(dec["8x8_aux_norm"](h)))
    if low is not None:
        expected = expected + dec["8x8_aux_up"](dec["4x4_aux_conv"](low))
    torch.testing.assert_close(out, expected)


def test_attention_heads_of_adm():
    """One for every 64 channels: a narrow block has none, wherever it was asked for."""
    config = DhariwalUNetConfig(
        **TINY | {"channel_mult": (1, 8, 16), "attn_resolutions": (8, 4, 2)}
    )
    with torch.device("meta"):
        net = DhariwalUNet(config)
    blocks = [*net.enc.items(), *net.dec.items()]
    heads = {name: block.num_heads for name, block in blocks if "conv" not in name}
    assert {heads[name] for name in heads if name.startswith("8x8_b")} == {0}
    assert {heads[name] for name in heads if name.startswith("4x4_b")} == {1}
    assert {heads[name] for name in heads if name.startswith("2x2_b")} == {2}
    assert (heads["2x2_in0"], heads["2x2_in1"], heads["4x4_up"]) == (2, 0, 0)


def test_initial_weights_of_adm():
    """U(-r, r) with r = 1 / sqrt(fan in) for weights and biases; labels N(0, 1); ends zero."""
    config = DhariwalUNetConfig(
        **TINY | {"model_channels": 64, "label_dim": 10, "augment_dim": 4, "channel_mult": (1,)}
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = DhariwalUNet(config)
    assert net.head_name == "out_conv"
    for layer, fan_in in ((net.map_layer0, 64), (net.map_layer1, 256), (net.enc["8x8_conv"], 18)):
        for values in (layer.weight, layer.bias):
            assert 0.9 / math.sqrt(fan_in) < values.abs().max() <= 1 / math.sqrt(fan_in)
    assert net.map_label.bias is None
    assert net.map_label.weight.std().item() == pytest.approx(1, abs=0.05)
    block = net.enc["8x8_block0"]
    for layer in (net.out_conv, block.conv1, net.dec["8x8_in0"].proj):
        assert not layer.weight.any()
        assert not layer.bias.any()
    assert not net.map_augment.weight.any()
    assert not net(image(), torch.zeros(3)).any()


def test_an_untrained_song_network_answers_almost_nothing():
    """The head starts with gain 1e-5."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = SongUNet(SongUNetConfig(**TINY))
    assert 0 < net(image(), torch.zeros(3)).abs().max() < 1e-4


# ---- the contract ----


class TestEDMsNetworks(NetworkContract):
    @pytest.fixture(
        params=[
            ("SongUNet", {"decoder_type": "skip"}),
            ("SongUNet", {"decoder_type": "skip", "encoder_type": "skip", "label_dim": 3}),
            ("SongUNet", {"encoder_type": "residual", "embedding_type": "fourier"}),
            ("SongUNet", {"label_dim": 3, "step_condition": True, "augment_dim": 2}),
            ("SongUNet", {"precond": "iddpm"}),
            ("DhariwalUNet", {"label_dim": 3}),
            ("DhariwalUNet", {"precond": "iddpm", "step_condition": True}),
        ],
        ids=str,
    )
    def network(self, request):
        name, options = request.param
        return tiny_denoiser(name, **options).model


class TestDiffusersNetworks(NetworkContract):
    @pytest.fixture(params=[None, 3])
    def network(self, request):
        pytest.importorskip("diffusers")
        blocks = {
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        }
        options = UNET | blocks | {"num_class_embeds": request.param}
        return untrained(lambda: DiffusersUNet(options))


class TestDiffusersTextNetworks(NetworkContract):
    @pytest.fixture(params=["linear", "convolution"])
    def network(self, request):
        pytest.importorskip("diffusers")
        options = TEXT_UNET | {"use_linear_projection": request.param == "linear"}
        return untrained(lambda: DiffusersTextUNet(options))

    def test_prompts_matter_each_to_its_own_image(self, network, x):
        text = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(3))
        level = torch.tensor([0.5])
        out = network(x, level, text=text)
        alone = network(x[1:2], level, text=text[1:2])
        torch.testing.assert_close(out[1:2], alone, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(out, network(x, level, text=text.flip(0)), atol=1e-5)
        with pytest.raises(InputError, match="conditioned on text and none is given"):
            network(x, level)
        with pytest.raises(ShapeError, match=r"\[3, L, 6\] .* got \[3, 4, 5\]"):
            network(x, level, text=text[..., 1:])


class TestDiT(NetworkContract):
    @pytest.fixture(params=[1, 2])
    def network(self, request):
        pytest.importorskip("diffusers")
        transformer = {
            "sample_size": 8,
            "in_channels": 2,
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 4,
            "num_embeds_ada_norm": 4,
            "norm_num_groups": 4,
        }
        return untrained(lambda: DiT(transformer, outputs=request.param))

    def test_classes_are_not_dropped_in_training(self, network, x):
        """diffusers' own drops them at random, in each block another, by the global generator."""
        level, classes = torch.tensor([0.5]), torch.eye(4)[:3]
        expected = network(x, level, classes)
        torch.testing.assert_close(network.train()(x, level, classes), expected)

    def test_it_is_diffusers_own(self, network, x):
        """Indices there, rows here; the class after the last is none."""
        diffusers = pytest.importorskip("diffusers")
        own = network.transformer
        theirs = diffusers.DiTTransformer2DModel(
            **network.options, out_channels=network.out_channels
        ).eval()
        theirs.load_state_dict(own.state_dict())
        level = torch.tensor([0.5, 3.25, 20.0])
        expected = theirs(x, level, torch.tensor([3, 0, 4])).sample
        rows = torch.eye(5)[[3, 0, 4], :4]
        torch.testing.assert_close(network(x, level, rows), expected)


@pytest.mark.usefixtures("example_package")
class TestPatchNetwork(NetworkContract):
    """A head whose rows are (p, p, C) or (C, p, p), in another package's network."""

    @pytest.fixture(params=["ppc", "cpp"])
    def network(self, request):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return PatchNetwork(
                img_channels=2, img_resolution=8, label_dim=3, order=request.param
            ).eval()


# ---- labels ----


@BOTH
def test_label_dropout_hides_classes_in_training_alone(network):
    net = tiny_denoiser(network, label_dim=3, label_dropout=0.5)
    x, sigma = image(1).expand(64, -1, -1, -1), torch.tensor(1.0)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        shown, hidden = net(x[:1], sigma, one_hot(2)), net(x[:1], sigma)
        torch.testing.assert_close(net(x, sigma, one_hot(2)), shown.expand(64, -1, -1, -1))
        out = net.train()(x, sigma, one_hot(2).expand(64, -1))
    is_shown = (out - shown).abs().amax(dim=(1, 2, 3)) < 1e-5
    is_hidden = (out - hidden).abs().amax(dim=(1, 2, 3)) < 1e-5
    assert bool((is_shown ^ is_hidden).all())
    assert 20 < int(is_shown.sum()) < 44


@BOTH
def test_labels_of_another_shape_are_refused(network):
    net = tiny_denoiser(network, label_dim=4, augment_dim=2)
    for name, shape, message in (
        ("class_labels", (2, 4), r"class_labels must be \[3, 4\] .* got \[2, 4\]"),
        ("augment_labels", (3, 4), r"augment_labels must be \[3, 2\] for 3 images"),
    ):
        with pytest.raises(ShapeError, match=message):
            net(image(), torch.tensor(1.0), **{name: torch.zeros(shape)})


# ---- options ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_channels": 0}, "img_channels must be a whole number of at least 1, got 0"),
        ({"label_dim": -1}, "label_dim must be a whole number of at least 0, got -1"),
        ({"model_channels": 6}, "model_channels must be a multiple of 4.* got 6"),
        ({"channel_mult": ()}, r"channel_mult one or more numbers .* got 8 and \[\]"),
        ({"channel_mult": (1, 0)}, r"channel_mult must be .* of at least 1, got \(1, 0\)"),
        ({"img_resolution": 12, "channel_mult": (1, 1, 1, 1)}, "12 cannot be halved 3 times"),
        ({"dropout": math.nan}, "dropout must be .* from 0 to 1, got nan"),
        ({"label_dropout": -0.1}, "label_dropout must be .* from 0 to 1, got -0.1"),
        (
            {"embedding_type": "random"},
            "one of positional, fourier, got 'random'",
        ),
        (
            {"channel_mult_noise": 0},
            "channel_mult_noise must be .* of at least 1, got 0",
        ),
        ({"resample_filter": (1, 2, 1)}, r"an even number .* got \[1, 2, 1\]"),
        ({"resample_filter": (1, -1)}, r"whose sum is not 0, got \[1, -1\]"),
    ],
)
def test_options_that_make_no_network_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        SongUNetConfig(**TINY | options)
