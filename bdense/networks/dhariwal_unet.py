"""DhariwalUNet: the ADM network of Dhariwal & Nichol 2021, as EDM builds and names it.

B batch, K branches, C image channels, H x W pixels, E embedding channels.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bdense.knobs import knob_of
from bdense.networks.layers import Conv2d, GroupNorm, Init, Linear, PositionalEmbedding, UNetBlock
from bdense.networks.unet import UNet, UNetConfig

KAIMING = Init("kaiming_uniform", weight=math.sqrt(1 / 3), bias=math.sqrt(1 / 3))
ZERO = Init("kaiming_uniform", weight=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class DhariwalUNetConfig(UNetConfig):
    """Size and options of a DhariwalUNet; the defaults are ADM for 64 x 64 pixels.

    A block has one attention head for every 64 channels, hence no attention at all below 64.
    """

    network: ClassVar[str] = "DhariwalUNet"

    model_channels: int = knob_of(UNetConfig, "model_channels", 192)
    channel_mult: tuple[int, ...] = knob_of(UNetConfig, "channel_mult", (1, 2, 3, 4))
    num_blocks: int = knob_of(UNetConfig, "num_blocks", 3)
    attn_resolutions: tuple[int, ...] = knob_of(UNetConfig, "attn_resolutions", (32, 16, 8))


class DhariwalUNet(UNet):
    """ADM U-Net F(x; c_noise), with EDM's module names; the head is ``out_conv``."""

    config_class = DhariwalUNetConfig
    config: DhariwalUNetConfig
    head_name = "out_conv"

    def _build(self) -> None:
        config = self.config
        emb_channels = config.model_channels * config.channel_mult_emb
        self.map_noise = PositionalEmbedding(config.model_channels)
        self.map_augment = (
            Linear(config.augment_dim, config.model_channels, bias=False, init=ZERO)
            if config.augment_dim
            else None
        )
        self.map_layer0 = Linear(config.model_channels, emb_channels, init=KAIMING)
        self.map_layer1 = Linear(emb_channels, emb_channels, init=KAIMING)
        self.map_label: Linear | None = None
        if config.label_dim:
            # A one-hot row picks one weight: N(0, 1) whatever the number of classes.
            normal = Init("kaiming_normal", weight=math.sqrt(config.label_dim))
            self.map_label = Linear(config.label_dim, emb_channels, bias=False, init=normal)
        if config.step_condition:
            embedding = PositionalEmbedding(config.model_channels)
            self._build_step_embedding(embedding, emb_channels, KAIMING)
        cout = config.model_channels * config.channel_mult[0]
        width = self._build_levels(
            Conv2d(config.img_channels, cout, 3, init=KAIMING),
            cout,
            init=KAIMING,
            init_zero=ZERO,
            init_attention=KAIMING,
        )
        self.out_norm = GroupNorm(width)
        self.out_conv = Conv2d(width, self.out_channels, 3, init=ZERO)

    def _decode(
        self, x: Tensor, skips: list[Tensor], emb: Tensor, emb_step: Tensor | None
    ) -> Tensor:
        for module in self.dec.values():
            assert isinstance(module, UNetBlock)
            if x.shape[1] != module.in_channels:
                x = torch.cat([x, skips.pop()], dim=1)
            x = module(x, emb, emb_step)
        out: Tensor = self.out_conv(F.silu(self.out_norm(x)))
        return out

    def _embed(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None,
        augment_labels: Tensor | None,
    ) -> Tensor:
        emb = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = F.silu(self.map_layer0(emb))
        emb = self.map_layer1(emb)
        if self.map_label is not None:
            emb = emb + self.map_label(self._labels(class_labels, x))
        return F.silu(emb)
