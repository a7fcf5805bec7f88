"""The DINOv2 vision transformers.

torch-fidelity's own extractor uses ``torch.hub.load``, which executes code that it downloads; this
file makes that unnecessary. Written after Oquab et al. 2023 (arXiv 2304.07193) and
facebookresearch/dinov2 at b8931f7; takes their published weights without registers. B batch, T
tokens, d width, G x G patches.
"""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PATCH = 14
# The published weights have a position for each patch of a 518 x 518 image.
TRAINED_GRID = 37
_EPS = 1e-6
# Side of its input, and ImageNet's mean and deviation of each colour.
_INPUT = 224
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """One of the published sizes.

    Attributes:
        width: d, also the number of features.
        gated: SwiGLU in place of the two-layer perceptron.
        file: Name of the published weights, without folder and ending.
    """

    width: int
    depth: int
    heads: int
    file: str
    gated: bool = False

    @property
    def url(self) -> str:
        """Where Meta publishes the weights."""
        return f"https://dl.fbaipublicfiles.com/dinov2/{self.file}/{self.file}_pretrain.pth"


# By torch-fidelity's names for them.
SIZES = {
    "dinov2-vit-s-14": Size(width=384, depth=12, heads=6, file="dinov2_vits14"),
    "dinov2-vit-b-14": Size(width=768, depth=12, heads=12, file="dinov2_vitb14"),
    "dinov2-vit-l-14": Size(width=1024, depth=24, heads=16, file="dinov2_vitl14"),
    "dinov2-vit-g-14": Size(width=1536, depth=40, heads=24, file="dinov2_vitg14", gated=True),
}


def load_dinov2(size: Size, path: Path) -> nn.Module:
    """The network with the weights of a file: [B, 3, H, W] uint8 -> [B, d] float32."""
    # Built without memory, then given the file's tensors: the largest has 4.5 GB.
    with torch.device("meta"):
        network = DinoV2(size)
    weights = torch.load(path, map_location="cpu", weights_only=True)
    network.load_state_dict(weights, assign=True)
    return nn.Sequential(_Prepare(), network.float())


class _Prepare(nn.Module):
    """The image preparation of torch-fidelity's ``FeatureExtractorDinoV2``."""

    def forward(self, images: Tensor) -> Tensor:
        from torch_fidelity.interpolate_compat_tensorflow import (
            interpolate_bilinear_2d_like_tensorflow1x,
        )
        from torchvision.transforms.functional import normalize

        resized = interpolate_bilinear_2d_like_tensorflow1x(
            images.float(), size=(_INPUT, _INPUT), align_corners=False
        )
        mean, std = ([255 * each for each in channels] for channels in (_MEAN, _STD))
        normal: Tensor = normalize(resized, mean, std)
        return normal


class DinoV2(nn.Module):
    """[B, 3, H, H] float32 images, normalised like ImageNet, 14 | H -> class token [B, d]."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, size.width, PATCH, stride=PATCH)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + TRAINED_GRID**2, size.width))
        # Only pre-training uses it, but the published weights contain it.
        self.mask_token = nn.Parameter(torch.zeros(1, size.width))
        self.blocks = nn.ModuleList(_Block(size) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width, _EPS)

    def forward(self, images: Tensor) -> Tensor:
        """Class tokens of a batch of images."""
        patches = self.patch_embed["proj"](images)  # [B, d, G, G]
        grid = patches.shape[-1]
        x = torch.cat(
            [self.cls_token.expand(len(images), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1
        )
        x = x + self._positions(grid)  # [B, 1 + G * G, d]
        for block in self.blocks:
            x = block(x)
        features: Tensor = self.norm(x)[:, 0]
        return features

    def _positions(self, grid: int) -> Tensor:
        """[1, 1 + G * G, d]: the learned 37 x 37 positions, resized."""
        if grid == TRAINED_GRID:
            return self.pos_embed
        width = self.pos_embed.shape[-1]
        learned = self.pos_embed[:, 1:].reshape(1, TRAINED_GRID, TRAINED_GRID, width)
        # The reference adds 0.1 against rounding. That affects the result: bicubic samples lie at
        # multiples of this scale, not of the ratio of the sizes.
        scale = (grid + 0.1) / TRAINED_GRID
        resized = F.interpolate(
            learned.permute(0, 3, 1, 2), scale_factor=(scale, scale), mode="bicubic"
        )
        return torch.cat([self.pos_embed[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)


class _Block(nn.Module):
    """Attention and perceptron, each with a norm before and a scale per channel after."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(size.width, _EPS)
        self.attn = _Attention(size.width, size.heads)
        self.ls1 = _LayerScale(size.width)
        self.norm2 = nn.LayerNorm(size.width, _EPS)
        self.mlp = _SwiGLU(size.width) if size.gated else _perceptron(size.width)
        self.ls2 = _LayerScale(size.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        x = x + self.ls2(self.mlp(self.norm2(x)))
        return x


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        # [B, T, 3 d] -> three of [B, heads, T, d / heads]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed: Tensor = self.proj(
            F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        )
        return mixed


class _LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def _perceptron(width: int) -> nn.Module:
    first, last = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
    return nn.Sequential(OrderedDict(fc1=first, gelu=nn.GELU(), fc2=last))


class _SwiGLU(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        # Two thirds of the perceptron's width, rounded up to a multiple of 8: equal cost.
        hidden = (4 * width * 2 // 3 + 7) // 8 * 8
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        out: Tensor = self.w3(F.silu(gate) * value)
        return out
