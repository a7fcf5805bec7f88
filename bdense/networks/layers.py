"""Building blocks of EDM's U-Nets, with EDM's parameter names (Karras et al. 2022, appendix C).

B batch, C channels, H x W pixels, E embedding channels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def xavier_uniform(weight: Tensor, *, fan_in: int, fan_out: int, gain: float = 1.0) -> None:
    """Fill ``weight`` in place with U(-r, r), r = gain * sqrt(6 / (fan_in + fan_out))."""
    with torch.no_grad():
        weight.uniform_(-1, 1).mul_(gain * math.sqrt(6 / (fan_in + fan_out)))


class Linear(nn.Module):
    """x W^T + b; the bias starts at zero."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True) -> None:
        super().__init__()
        self.in_features = in_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        xavier_uniform(self.weight, fan_in=in_features, fan_out=out_features)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_features] -> [B, out_features]."""
        return F.linear(x, self.weight, self.bias)


class Conv2d(nn.Module):
    """A same-size convolution, after doubling or halving the image where asked.

    Args:
        kernel: Side of the filter; 0 leaves the resampling alone, without weights.
        up: Double the image first, by the transposed ``resample_filter``.
        down: Halve the image first, by ``resample_filter`` at stride 2.
        gain: Scale of the initial weights.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        up: bool = False,
        down: bool = False,
        resample_filter: tuple[int, ...] = (1, 1),
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.up = up
        self.down = down
        self.box_filter = tuple(resample_filter) == (1, 1)
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if kernel:
            self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel))
            self.bias = nn.Parameter(torch.zeros(out_channels))
            area = kernel * kernel
            xavier_uniform(
                self.weight, fan_in=in_channels * area, fan_out=out_channels * area, gain=gain
            )
        taps = torch.tensor(resample_filter, dtype=torch.float32)
        filter_2d = (taps.outer(taps) / taps.sum().square())[None, None] if up or down else None
        self.register_buffer("resample_filter", filter_2d)
        self.resample_filter: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H', W'], H' = 2H, H or H/2."""
        if self.up:
            x = self._double(x)
        if self.down:
            x = self._halve(x)
        if self.weight is None:
            return x
        return F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)

    def _double(self, x: Tensor) -> Tensor:
        if self.box_filter:
            # The same numbers as the transposed convolution, without its cost.
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        assert self.resample_filter is not None
        taps = (self.resample_filter * 4).to(x.dtype).expand(x.shape[1], -1, -1, -1)
        padding = (taps.shape[-1] - 1) // 2
        return F.conv_transpose2d(x, taps, groups=x.shape[1], stride=2, padding=padding)

    def _halve(self, x: Tensor) -> Tensor:
        if self.box_filter:
            return F.avg_pool2d(x, 2)
        assert self.resample_filter is not None
        taps = self.resample_filter.to(x.dtype).expand(x.shape[1], -1, -1, -1)
        padding = (taps.shape[-1] - 1) // 2
        return F.conv2d(x, taps, groups=x.shape[1], stride=2, padding=padding)


class GroupNorm(nn.Module):
    """Group normalisation with at most 32 groups of at least 4 channels."""

    def __init__(self, num_channels: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_groups = min(32, num_channels // 4)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W], same shape out."""
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class PositionalEmbedding(nn.Module):
    """cos and sin of the input at geometrically spaced frequencies, 1 down to 1 / 10000.

    ``endpoint`` includes the last frequency (DDPM++); without it the spacing is ADM's.
    """

    def __init__(self, num_channels: int, *, endpoint: bool = False) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.endpoint = endpoint

    def forward(self, x: Tensor) -> Tensor:
        """[B] -> [B, num_channels]: all cosines, then all sines."""
        half = self.num_channels // 2
        exponent = torch.arange(half, dtype=torch.float32, device=x.device)
        exponent = exponent / (half - (1 if self.endpoint else 0))
        phase = x.outer((1 / 10000.0) ** exponent.to(x.dtype))
        return torch.cat([phase.cos(), phase.sin()], dim=1)


class UNetBlock(nn.Module):
    """Residual block with an embedding input and optional self-attention.

    Covers the DDPM++/NCSN++ blocks (shift only, ``skip_scale`` sqrt(1/2)) and ADM's
    (``adaptive_scale``: scale and shift).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        up: bool = False,
        down: bool = False,
        attention: bool = False,
        num_heads: int | None = None,
        channels_per_head: int = 64,
        dropout: float = 0.0,
        skip_scale: float = 1.0,
        eps: float = 1e-5,
        resample_filter: tuple[int, ...] = (1, 1),
        resample_proj: bool = False,
        adaptive_scale: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.num_heads = (num_heads or out_channels // channels_per_head) if attention else 0
        self.dropout = dropout
        self.skip_scale = skip_scale
        self.adaptive_scale = adaptive_scale

        resample = {"up": up, "down": down, "resample_filter": tuple(resample_filter)}
        self.norm0 = GroupNorm(in_channels, eps=eps)
        self.conv0 = Conv2d(in_channels, out_channels, 3, **resample)  # type: ignore[arg-type]
        self.affine = Linear(emb_channels, out_channels * (2 if adaptive_scale else 1))
        self.norm1 = GroupNorm(out_channels, eps=eps)
        # A block starts as (almost) the identity: its last convolutions start near zero.
        self.conv1 = Conv2d(out_channels, out_channels, 3, gain=1e-5)
        self.skip: Conv2d | None = None
        if out_channels != in_channels or up or down:
            kernel = 1 if resample_proj or out_channels != in_channels else 0
            self.skip = Conv2d(in_channels, out_channels, kernel, **resample)  # type: ignore[arg-type]
        if self.num_heads:
            self.norm2 = GroupNorm(out_channels, eps=eps)
            self.qkv = Conv2d(out_channels, out_channels * 3, 1, gain=math.sqrt(0.2))
            self.proj = Conv2d(out_channels, out_channels, 1, gain=1e-5)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """[B, in, H, W] and [B, E] -> [B, out, H', W']."""
        shortcut = x if self.skip is None else self.skip(x)
        x = self.conv0(F.silu(self.norm0(x)))
        modulation = self.affine(emb)[:, :, None, None].to(x.dtype)
        if self.adaptive_scale:
            scale, shift = modulation.chunk(2, dim=1)
            x = F.silu(torch.addcmul(shift, self.norm1(x), scale + 1))
        else:
            x = F.silu(self.norm1(x + modulation))
        x = F.dropout(x, p=self.dropout, training=self.training)
        x = (self.conv1(x) + shortcut) * self.skip_scale
        if self.num_heads:
            x = (self.proj(self._attend(self.norm2(x))) + x) * self.skip_scale
        return x

    def _attend(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        # EDM interleaves q, k and v innermost: [B, heads, C / heads, 3, H * W].
        qkv = self.qkv(x).view(b, self.num_heads, c // self.num_heads, 3, h * w)
        q, k, v = qkv.transpose(2, 4).unbind(3)
        out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(2, 3).reshape(b, c, h, w)
