"""SongUNet: the DDPM++ and NCSN++ networks of Song et al. 2021, as EDM builds and names them.

B batch, K branches, C image channels, H x W pixels, E embedding channels.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdense.errors import InputError
from bdense.knobs import knob, knob_of
from bdense.networks.layers import (
    NEARLY_ZERO,
    Conv2d,
    FourierEmbedding,
    GroupNorm,
    Init,
    Linear,
    PositionalEmbedding,
    UNetBlock,
)
from bdense.networks.unet import UNet, UNetConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class SongUNetConfig(UNetConfig):
    """Size and options of a SongUNet; the defaults are DDPM++ for 32 x 32 pixels."""

    network: ClassVar[str] = "SongUNet"

    model_channels: int = knob_of(UNetConfig, "model_channels", 128)
    channel_mult: tuple[int, ...] = knob_of(UNetConfig, "channel_mult", (2, 2, 2))
    num_blocks: int = knob_of(UNetConfig, "num_blocks", 4)
    attn_resolutions: tuple[int, ...] = knob_of(UNetConfig, "attn_resolutions", (16,))
    embedding_type: Literal["positional", "fourier"] = knob(
        "positional", "embedding of the noise level: positional (DDPM++) or fourier (NCSN++)"
    )
    channel_mult_noise: int = knob(
        1, "width of that embedding in multiples of model_channels", low=1
    )
    encoder_type: Literal["standard", "skip", "residual"] = knob(
        "standard",
        "how the encoder sees the halved input image besides: standard (DDPM++, not at all), "
        "residual (NCSN++) or skip",
    )
    decoder_type: Literal["standard", "skip"] = knob(
        "standard", "skip: every level adds its own image to the output"
    )
    resample_filter: tuple[int, ...] = knob((1, 1), "(1, 1) for DDPM++, (1, 3, 3, 1) for NCSN++")

    def __post_init__(self) -> None:
        UNetConfig.__post_init__(self)  # slots: super() would look for the class before them
        taps = self.resample_filter
        if not taps or len(taps) % 2 or sum(taps) == 0:
            raise InputError(
                "SongUNet resample_filter must have an even number of taps whose sum is not 0, "
                f"got {list(taps)}; DDPM++ has [1, 1], NCSN++ [1, 3, 3, 1]"
            )


class SongUNet(UNet):
    """DDPM++ or NCSN++ U-Net F(x; c_noise), with EDM's module names.

    The head is the last convolution at full resolution, one group of channels a branch. With
    ``decoder_type="skip"`` the lower levels' images are one group wide and shared: each branch
    adds them to its own group of the head, so that branches cost a wider head and nothing else.
    """

    config_class = SongUNetConfig
    config: SongUNetConfig

    def _build(self) -> None:
        config = self.config
        self.head_name = f"dec.{config.img_resolution}x{config.img_resolution}_aux_conv"
        noise_channels = config.model_channels * config.channel_mult_noise
        emb_channels = config.model_channels * config.channel_mult_emb
        self.map_noise: nn.Module = (
            FourierEmbedding(noise_channels)
            if config.embedding_type == "fourier"
            else PositionalEmbedding(noise_channels, endpoint=True)
        )
        self.map_label = Linear(config.label_dim, noise_channels) if config.label_dim else None
        self.map_augment = (
            Linear(config.augment_dim, noise_channels, bias=False) if config.augment_dim else None
        )
        self.map_layer0 = Linear(noise_channels, emb_channels)
        self.map_layer1 = Linear(emb_channels, emb_channels)
        if config.step_condition:
            embedding = PositionalEmbedding(noise_channels, endpoint=True)
            self._build_step_embedding(embedding, emb_channels)
        self._build_levels(
            Conv2d(config.img_channels, config.model_channels, 3),
            config.model_channels,
            num_heads=1,
            skip_scale=math.sqrt(0.5),
            eps=1e-6,
            resample_filter=config.resample_filter,
            resample_proj=True,
            adaptive_scale=False,
            init_attention=Init(weight=math.sqrt(0.2)),
        )

    def _attends(self, side: int, index: int) -> bool:
        return index == self.config.num_blocks and super()._attends(side, index)

    def _after_down(self, side: int, cout: int) -> None:
        """What shows the encoder's level the halved input image."""
        config, taps = self.config, self.config.resample_filter
        caux = config.img_channels
        if config.encoder_type == "skip":
            self.enc[f"{side}x{side}_aux_down"] = Conv2d(
                caux, caux, 0, down=True, resample_filter=taps
            )
            self.enc[f"{side}x{side}_aux_skip"] = Conv2d(caux, cout, 1)
        elif config.encoder_type == "residual":
            above = f"{2 * side}x{2 * side}_aux_residual"
            if above in self.enc:
                shown = self.enc[above]
                assert isinstance(shown, Conv2d)
                caux = shown.out_channels
            self.enc[f"{side}x{side}_aux_residual"] = Conv2d(
                caux, cout, 3, down=True, resample_filter=taps, convolve_first=True
            )

    def _after_level(self, level: int, side: int, cout: int) -> None:
        """The image of this level; with a standard decoder, of the last level only."""
        config, group = self.config, self.prediction_channels
        if level and config.decoder_type == "standard":
            return
        if level < len(config.channel_mult) - 1 and config.decoder_type == "skip":
            self.dec[f"{side}x{side}_aux_up"] = Conv2d(
                group, group, 0, up=True, resample_filter=config.resample_filter
            )
        width = group if level else self.out_channels
        self.dec[f"{side}x{side}_aux_norm"] = GroupNorm(cout, eps=1e-6)
        self.dec[f"{side}x{side}_aux_conv"] = Conv2d(cout, width, 3, init=NEARLY_ZERO)

    def _embed(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None,
        augment_labels: Tensor | None,
    ) -> Tensor:
        emb = self._arrange(self.map_noise(noise_labels))
        if self.map_label is not None:
            labels = self._labels(class_labels, x)
            emb = emb + self.map_label(labels * math.sqrt(self.map_label.in_features))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = F.silu(self.map_layer0(emb))
        return F.silu(self.map_layer1(emb))

    def _arrange(self, embedding: Tensor) -> Tensor:
        cos, sin = embedding.chunk(2, dim=1)
        return torch.cat([sin, cos], dim=1)

    def _decode(
        self, x: Tensor, skips: list[Tensor], emb: Tensor, emb_step: Tensor | None
    ) -> Tensor:
        """[B, out_channels, H, W]."""
        image: Tensor | None = None  # the sum of the levels so far, one group wide
        for name, module in self.dec.items():
            if isinstance(module, UNetBlock):
                if x.shape[1] != module.in_channels:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = module(x, emb, emb_step)
            elif name.endswith("_aux_up"):
                image = module(image)
            elif name.endswith("_aux_norm"):
                features = F.silu(module(x))
            else:
                groups = module(features)
                if image is not None:
                    repeats = groups.shape[1] // image.shape[1]
                    groups = groups + image.repeat(1, repeats, 1, 1)
                image = groups
        assert image is not None
        return image
