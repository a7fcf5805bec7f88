"""Feature extractors: what they give, and files that are refused."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from bdense.errors import CheckpointError, InputError, ShapeError
from bdense.files import sha256_file
from bdense.metrics.dinov2 import SIZES, DinoV2, Size
from bdense.metrics.extractors import load_extractor
from bdense.models import store
from bdense.models.store import load_tensors
from tests.features import CPU, ColourMeans, random_images, scripted

# Deprecated, but users have such files.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.:FutureWarning")


class Only8x8(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(192, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(images.float().flatten(1))


class Pixels(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float()


class Bytes(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


class FloatsOnly(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(images).mean(dim=(2, 3))


def test_a_torchscript_file_gives_its_features(tmp_path):
    extractor = scripted(ColourMeans(), tmp_path)
    assert (extractor.name, extractor.dim) == ("torchscript:features.pt", 3)
    images = random_images(4)
    features = extractor(images)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, images.float().mean(dim=(2, 3)))
    grey = random_images(4, channels=1)
    assert torch.equal(extractor(grey), extractor(grey.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Pixels(), r"to torch.float32 \[2, 3, 32, 32\]; an extractor gives \[B, d\]"),
        (Bytes(), r"to torch.uint8 \[2, 3072\]"),
        (FloatsOnly(), "does not accept uint8 images"),
    ],
)
def test_a_network_without_features_is_refused(tmp_path, module, message):
    with pytest.raises(InputError, match=message):
        scripted(module, tmp_path)


def test_a_network_of_one_size_is_an_extractor(tmp_path):
    extractor = scripted(Only8x8(), tmp_path)
    assert extractor.dim == 5
    with pytest.raises(ShapeError, match=r"cannot take images of shape \[2, 3, 16, 16\]: .*mat1"):
        extractor(random_images(2, side=16))


def test_other_images_are_refused(digits_extractor):
    with pytest.raises(ShapeError, match=r"float32 \[2, 1, 8, 8\]; convert with to_uint8"):
        digits_extractor(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ShapeError, match=r"\[2, 4, 8, 8\]"):
        digits_extractor(random_images(2, channels=4))
    with pytest.raises(ShapeError, match="at most 8 pixels"):
        digits_extractor(random_images(2, side=16))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("vgg", r"unknown feature extractor 'vgg'; known are inception, "),
        ("torchscript:", "unknown feature extractor 'torchscript:'"),
        ("torchscript:absent.pt", r"no TorchScript file at .*absent\.pt"),
        ("torchscript:corrupt.pt", r"corrupt\.pt cannot be read as TorchScript"),
        ("inception:absent.pth", r"weights .*absent\.pth: No such file"),
        ("inception:corrupt.pt", r"corrupt\.pt does not hold .*weights-inception-2015"),
        ("inception:other.pth", r"other\.pth does not hold torch-fidelity's Inception"),
        ("inception:list.pth", r"list\.pth does not hold"),
        ("dinov2-vit-s-14:other.pth", r"other\.pth does not hold"),
        ("dinov2-vit-s-14:list.pth", r"list\.pth does not hold"),
    ],
)
def test_bad_specs_and_files_are_named(spec, message, tmp_path, cache, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("corrupt.pt").write_bytes(b"PK\x03\x04 and no more")
    torch.save({"fc.bias": torch.zeros(3)}, "other.pth")
    torch.save([torch.zeros(1)], "list.pth")
    with pytest.raises(InputError, match=message):
        load_extractor(spec, cache=cache, device=CPU)


def test_inception_without_a_network_says_what_to_fetch(tmp_path, cache, monkeypatch):
    """A refused proxy stands for every way of being offline."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    where = r"fetch https://\S+6726825d\.pth by hand and put it at \S+torch/hub/checkpoints/\S+pth"
    with pytest.raises(InputError, match=f"cannot download the Inception weights.*{where}"):
        load_extractor("inception", cache=cache, device=CPU)
    path = tmp_path / "torch/hub/checkpoints/weights-inception-2015-12-05-6726825d.pth"
    path.write_bytes(b"cut short")
    with pytest.raises(InputError, match=f"{path} is not the Inception weights: .* delete it"):
        load_extractor("inception", cache=cache, device=CPU)
    where = r"https://dl\.fbaipublicfiles\.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain\.pth"
    with pytest.raises(InputError, match=f"download the dinov2-vit-l-14 weights .* fetch {where}"):
        load_extractor("dinov2", cache=cache, device=CPU)


@pytest.fixture(scope="module")
def dinov2_weights(tmp_path_factory) -> Iterator[Path]:
    """Random weights of the smallest published size, 88 MB."""
    torch.manual_seed(0)
    network = DinoV2(SIZES["dinov2-vit-s-14"])
    for value in network.state_dict().values():
        nn.init.normal_(value, std=0.05)
    path = tmp_path_factory.mktemp("dinov2") / "random.pth"
    torch.save(network.state_dict(), path)
    yield path
    path.unlink()


def test_dinov2_gives_what_torch_fidelitys_class_gives(dinov2_weights, cache, monkeypatch):
    """Its images, prepared by its code; its network, which it would download, stands aside."""
    from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2

    asked = []

    def load(*source: str) -> nn.Module:
        asked.append(source)
        network = DinoV2(SIZES["dinov2-vit-s-14"])
        network.load_state_dict(torch.load(dinov2_weights, weights_only=True))
        return network

    monkeypatch.setenv("XFORMERS_DISABLED", "1")  # which it sets for good
    monkeypatch.setattr(torch.hub, "load", load)
    theirs = FeatureExtractorDinoV2("dinov2-vit-s-14", ["dinov2"])
    assert asked == [("facebookresearch/dinov2", "dinov2_vits14")]
    monkeypatch.delattr(torch.hub, "load")
    state = torch.get_rng_state()
    spec = f"dinov2-vit-s-14:{dinov2_weights}"
    extractor = load_extractor(spec, cache=cache, device=CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert (extractor.name, extractor.dim) == ("dinov2-vit-s-14", 384)
    assert extractor.sha256 == sha256_file(dinov2_weights)
    images = random_images(2, side=32)
    features = extractor(images)
    assert torch.equal(features, theirs(images)[0])
    assert not torch.equal(features[0], features[1])


def test_dinov2_weights_of_another_size_are_refused(dinov2_weights, cache):
    url = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
    with pytest.raises(InputError) as caught:
        load_extractor(f"dinov2:{dinov2_weights}", cache=cache, device=CPU)
    message = str(caught.value)
    assert "random.pth does not hold dinov2-vit-l-14 weights (size mismatch for" in message
    assert message.endswith(f"give the file of {url}")
    assert len(message) < 700


class Payload:
    def __reduce__(self):
        return (os.mkdir, (os.environ["BDENSE_TEST_PAYLOAD"],))


@pytest.mark.parametrize("kind", ["inception", "dinov2-vit-s-14"])
@pytest.mark.parametrize("old_format", [False, True])
def test_weights_files_run_nothing(kind, old_format, tmp_path, cache, monkeypatch):
    ran = tmp_path / "ran"
    monkeypatch.setenv("BDENSE_TEST_PAYLOAD", str(ran))
    evil = tmp_path / "evil.pth"
    torch.save({"w": Payload()}, evil, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(InputError, match=r"evil\.pth does not hold"):
        load_extractor(f"{kind}:{evil}", cache=cache, device=CPU)
    assert not ran.exists()


def test_inception_takes_weights_of_its_own_shape(tmp_path, cache, monkeypatch):
    """Random weights through torch-fidelity's real network: 2048 features of any size."""
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: None)
    monkeypatch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
    network = inception.FeatureExtractorInceptionV3("random", ["2048"])
    monkeypatch.undo()
    torch.save(network.state_dict(), tmp_path / "random.pth")
    extractor = load_extractor(f"inception:{tmp_path / 'random.pth'}", cache=cache, device=CPU)
    images = random_images(2)
    assert (extractor.name, extractor.dim) == ("inception", 2048)
    torch.testing.assert_close(extractor(images), network(images)[0])


def test_the_digits_classifier_is_trained_once(shared_cache, digits_extractor, monkeypatch):
    assert digits_extractor.dim == 64
    (path,) = shared_cache.glob("digits-classifier-*.safetensors")
    assert load_tensors(path)[1]["train_accuracy"] > 0.97
    made = path.stat().st_mtime_ns
    again = load_extractor("digits-classifier", cache=shared_cache, device=CPU)
    assert path.stat().st_mtime_ns == made
    assert again.sha256 == digits_extractor.sha256
    read = []
    monkeypatch.setattr(
        store, "safe_open", lambda path, **more: read.append(path) or safe_open(path, **more)
    )
    load_extractor("digits-classifier", cache=shared_cache, device=CPU)
    assert read == [path]


def test_a_broken_classifier_file_is_named(cache):
    load_extractor("digits-classifier", cache=cache, device=CPU)
    (path,) = cache.glob("digits-classifier-*.safetensors")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=path.name):
        load_extractor("digits-classifier", cache=cache, device=CPU)


# ---- DINOv2 ----


TINY = Size(width=8, depth=2, heads=2, file="")
# By facebookresearch/dinov2 at b8931f7 (DinoVisionTransformer with the arguments of its hub,
# width 8, depth 2, 2 heads), of the first of two images and the weights made below.
EXPECTED = {
    "perceptron": "-0.659732 -0.636300 -2.726046 0.815473 0.471697 0.864815 1.757840 -0.345319",
    "swiglu": "0.221285 -0.315414 -0.381136 -0.658257 -1.704964 0.110227 0.915898 -0.418933",
}


def waves(count: int, frequency: float, start: int = 0) -> torch.Tensor:
    """Numbers of no meaning that anybody can make again."""
    positions = torch.arange(start, start + count, dtype=torch.float64)
    return torch.sin(frequency * positions).float()


def network(kind: str) -> DinoV2:
    network = DinoV2(dataclasses.replace(TINY, gated=kind == "swiglu"))
    weights, start = {}, 0
    for name, value in sorted(network.state_dict().items()):
        weights[name] = waves(value.numel(), 0.7, start).view(value.shape)
        start += value.numel()
    network.load_state_dict(weights)
    return network.requires_grad_(False)


@pytest.mark.parametrize("kind", ["perceptron", "swiglu"])
def test_features_are_the_reference_s(kind):
    images = waves(2 * 3 * 56 * 56, 0.13).view(2, 3, 56, 56)
    expected = torch.tensor([float(number) for number in EXPECTED[kind].split()])
    torch.testing.assert_close(network(kind)(images)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "numbers", "url"),
    [
        ("dinov2-vit-s-14", 22_056_576, "dinov2_vits14/dinov2_vits14_pretrain.pth"),
        ("dinov2-vit-b-14", 86_580_480, "dinov2_vitb14/dinov2_vitb14_pretrain.pth"),
        ("dinov2-vit-l-14", 304_368_640, "dinov2_vitl14/dinov2_vitl14_pretrain.pth"),
        ("dinov2-vit-g-14", 1_136_480_768, "dinov2_vitg14/dinov2_vitg14_pretrain.pth"),
    ],
)
def test_the_published_sizes(name, numbers, url):
    """As many numbers as the reference's state dict has; and the address it gives."""
    with torch.device("meta"):
        network = DinoV2(SIZES[name])
    assert sum(value.numel() for value in network.state_dict().values()) == numbers
    assert SIZES[name].url == f"https://dl.fbaipublicfiles.com/dinov2/{url}"
