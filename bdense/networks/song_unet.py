"""SongUNet: the DDPM++ network of Song et al. 2021, as EDM builds and names it.

B batch, C image channels, H x W pixels, E embedding channels.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdense.errors import InputError, ShapeError
from bdense.networks.layers import Conv2d, GroupNorm, Linear, PositionalEmbedding, UNetBlock


@dataclass(frozen=True, slots=True, kw_only=True)
class SongUNetConfig:
    """Size and options of a SongUNet; field names are EDM's.

    Attributes:
        img_resolution: Side of the square image in pixels.
        img_channels: C.
        label_dim: Number of classes; 0 is unconditional.
        augment_dim: Width of EDM's augmentation labels; 0 has none.
        model_channels: Channels at full resolution before ``channel_mult``.
        channel_mult: Channel multiplier of each level, full resolution first.
        num_blocks: Residual blocks a level (the decoder has one more).
        attn_resolutions: Image sides at which blocks attend.
        dropout: Probability in every block, active in training only.
    """

    img_resolution: int
    img_channels: int
    label_dim: int = 0
    augment_dim: int = 0
    model_channels: int = 128
    channel_mult: tuple[int, ...] = (2, 2, 2)
    channel_mult_emb: int = 4
    num_blocks: int = 4
    attn_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.1
    embedding_type: str = "positional"
    channel_mult_noise: int = 1
    encoder_type: str = "standard"
    decoder_type: str = "standard"
    resample_filter: tuple[int, ...] = (1, 1)

    def __post_init__(self) -> None:
        for name in ("channel_mult", "attn_resolutions", "resample_filter"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        supported = {
            "embedding_type": "positional",
            "encoder_type": "standard",
            "decoder_type": "standard",
        }
        for name, value in supported.items():
            if getattr(self, name) != value:
                raise InputError(
                    f"SongUNet {name}={getattr(self, name)!r} is not built; "
                    f"this version has the DDPM++ options ({name}={value!r})"
                )
        for name in ("img_resolution", "img_channels", "model_channels", "num_blocks"):
            if getattr(self, name) < 1:
                raise InputError(f"SongUNet {name} must be at least 1, got {getattr(self, name)}")
        if self.model_channels % 4 or not self.channel_mult or min(self.channel_mult) < 1:
            raise InputError(
                "SongUNet model_channels must be a multiple of 4 and channel_mult one or more "
                f"numbers from 1 up, got {self.model_channels} and {list(self.channel_mult)}"
            )
        if not 0 <= self.dropout <= 1:
            raise InputError(f"SongUNet dropout must lie in 0..1, got {self.dropout}")
        halvings = 2 ** (len(self.channel_mult) - 1)
        if self.img_resolution % halvings:
            raise InputError(
                f"img_resolution={self.img_resolution} cannot be halved "
                f"{len(self.channel_mult) - 1} times; pad the images to a "
                f"multiple of {halvings} or shorten channel_mult"
            )


class SongUNet(nn.Module):
    """DDPM++ U-Net F(x; c_noise), with EDM's module names.

    The head is the last convolution of the decoder; ``out_channels`` may be a multiple of
    ``img_channels`` (one group of C per branch).
    """

    def __init__(self, config: SongUNetConfig, out_channels: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.out_channels = out_channels or config.img_channels
        noise_channels = config.model_channels * config.channel_mult_noise
        emb_channels = config.model_channels * config.channel_mult_emb

        self.map_noise = PositionalEmbedding(noise_channels, endpoint=True)
        self.map_label = Linear(config.label_dim, noise_channels) if config.label_dim else None
        self.map_augment = (
            Linear(config.augment_dim, noise_channels, bias=False) if config.augment_dim else None
        )
        self.map_layer0 = Linear(noise_channels, emb_channels)
        self.map_layer1 = Linear(emb_channels, emb_channels)
        self.enc = nn.ModuleDict()
        self.dec = nn.ModuleDict()
        self._build(emb_channels)

    @property
    def head_name(self) -> str:
        """Dotted name of the last convolution, the layer that branches widen."""
        side = self.config.img_resolution
        return f"dec.{side}x{side}_aux_conv"

    def _build(self, emb_channels: int) -> None:
        config = self.config

        def block(
            cin: int, cout: int, *, up: bool = False, down: bool = False, attention: bool = False
        ) -> UNetBlock:
            return UNetBlock(
                cin,
                cout,
                emb_channels,
                up=up,
                down=down,
                attention=attention,
                num_heads=1,
                dropout=config.dropout,
                skip_scale=math.sqrt(0.5),
                eps=1e-6,
                resample_filter=config.resample_filter,
                resample_proj=True,
                adaptive_scale=False,
            )

        cout = config.model_channels
        skips = [cout]
        for level, mult in enumerate(config.channel_mult):
            side = config.img_resolution >> level
            if level == 0:
                self.enc[f"{side}x{side}_conv"] = Conv2d(config.img_channels, cout, 3)
            else:
                self.enc[f"{side}x{side}_down"] = block(cout, cout, down=True)
                skips.append(cout)
            for index in range(config.num_blocks):
                cin, cout = cout, config.model_channels * mult
                attention = side in config.attn_resolutions
                self.enc[f"{side}x{side}_block{index}"] = block(cin, cout, attention=attention)
                skips.append(cout)

        last = len(config.channel_mult) - 1
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            side = config.img_resolution >> level
            if level == last:
                self.dec[f"{side}x{side}_in0"] = block(cout, cout, attention=True)
                self.dec[f"{side}x{side}_in1"] = block(cout, cout)
            else:
                self.dec[f"{side}x{side}_up"] = block(cout, cout, up=True)
            for index in range(config.num_blocks + 1):
                cin, cout = cout + skips.pop(), config.model_channels * mult
                attention = index == config.num_blocks and side in config.attn_resolutions
                self.dec[f"{side}x{side}_block{index}"] = block(cin, cout, attention=attention)
        side = config.img_resolution
        self.dec[f"{side}x{side}_aux_norm"] = GroupNorm(cout, eps=1e-6)
        self.dec[f"{side}x{side}_aux_conv"] = Conv2d(cout, self.out_channels, 3, gain=1e-5)

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """F(x; c_noise).

        Args:
            x: [B, C, H, W] preconditioned input.
            noise_labels: [B] c_noise.
            class_labels: [B, label_dim] one-hot; None is all zeros.
            augment_labels: [B, augment_dim]; None switches them off.

        Returns:
            [B, out_channels, H, W].
        """
        self._check(x)
        emb = self._embed(noise_labels, class_labels, augment_labels)
        skips = []
        for module in self.enc.values():
            x = module(x, emb) if isinstance(module, UNetBlock) else module(x)
            skips.append(x)
        for module in self.dec.values():
            if isinstance(module, UNetBlock):
                if x.shape[1] != module.in_channels:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = module(x, emb)
            elif isinstance(module, GroupNorm):
                x = F.silu(module(x))
            else:
                x = module(x)
        return x

    def _embed(
        self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None
    ) -> Tensor:
        cos, sin = self.map_noise(noise_labels).chunk(2, dim=1)
        emb = torch.cat([sin, cos], dim=1)
        if self.map_label is not None:
            if class_labels is None:
                class_labels = emb.new_zeros(1, self.config.label_dim)
            emb = emb + self.map_label(class_labels * math.sqrt(self.map_label.in_features))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = F.silu(self.map_layer0(emb))
        return F.silu(self.map_layer1(emb))

    def _check(self, x: Tensor) -> None:
        side, channels = self.config.img_resolution, self.config.img_channels
        if tuple(x.shape[1:]) != (channels, side, side):
            raise ShapeError(
                f"the network takes images [B, {channels}, {side}, {side}], got {list(x.shape)}; "
                f"resize or pad them, or use a teacher of that size"
            )
