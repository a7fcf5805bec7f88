"""DINOv2's network: the numbers of the reference implementation, and its published shapes."""

import dataclasses

import pytest
import torch

from bdense.metrics.dinov2 import SIZES, DinoV2, Size

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
