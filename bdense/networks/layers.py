"""Building blocks of EDM's U-Nets, with EDM's parameter names (Karras et al. 2022, appendix C).

B batch, C channels, H x W pixels, E embedding channels.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdense.networks.network import checkpointed


@dataclass(frozen=True, slots=True)
class Init:
    """How a layer starts: its fan decides the spread, ``weight`` and ``bias`` scale it.

    Attributes:
        mode: ``xavier_uniform`` U(-r, r), r = sqrt(6 / (fan_in + fan_out)); ``kaiming_uniform``
            r = sqrt(3 / fan_in); ``kaiming_normal`` N(0, 1 / fan_in).
        weight: Factor on the weight; 0 starts it at zero.
        bias: Factor on a bias drawn like the weight; 0 starts it at zero.
    """

    mode: Literal["xavier_uniform", "kaiming_uniform", "kaiming_normal"] = "xavier_uniform"
    weight: float = 1.0
    bias: float = 0.0

    def fill(self, weight: Tensor, bias: Tensor | None, *, fan_in: int, fan_out: int) -> None:
        """Fill both in place from the global generator; what starts at zero draws nothing."""
        with torch.no_grad():
            self._draw(weight, self.weight, fan_in, fan_out)
            if bias is not None:
                self._draw(bias, self.bias, fan_in, fan_out)

    def _draw(self, values: Tensor, factor: float, fan_in: int, fan_out: int) -> None:
        if not factor:
            values.zero_()
        elif self.mode == "xavier_uniform":
            values.uniform_(-1, 1).mul_(factor * math.sqrt(6 / (fan_in + fan_out)))
        elif self.mode == "kaiming_uniform":
            values.uniform_(-1, 1).mul_(factor * math.sqrt(3 / fan_in))
        else:
            values.normal_().mul_(factor * math.sqrt(1 / fan_in))


XAVIER = Init()
# A block starts as (almost) the identity: its last convolutions start near zero.
NEARLY_ZERO = Init(weight=1e-5)


class Linear(nn.Linear):
    """torch's, with weights as ``init`` draws them."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = True, init: Init = XAVIER
    ) -> None:
        self.init = init
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        """Draw the initial weights anew from the global generator."""
        self.init.fill(self.weight, self.bias, fan_in=self.in_features, fan_out=self.out_features)


class Conv2d(nn.Module):
    """A same-size convolution, after doubling or halving the image where asked.

    Args:
        kernel: Side of the filter; 0 only resamples, without weights.
        up: Double the image first, by the transposed ``resample_filter``.
        down: Halve the image first, by ``resample_filter`` at stride 2.
        convolve_first: Convolve the whole image and halve it afterwards. This differs at the
            border, where the convolution then sees zeros outside the image only.
        init: Initial weights.
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
        convolve_first: bool = False,
        init: Init = XAVIER,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.up = up
        self.down = down
        self.convolve_first = convolve_first
        self.box_filter = tuple(resample_filter) == (1, 1)
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if kernel:
            self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel))
            self.bias = nn.Parameter(torch.empty(out_channels))
            area = kernel * kernel
            init.fill(
                self.weight, self.bias, fan_in=in_channels * area, fan_out=out_channels * area
            )
        taps = torch.tensor(resample_filter, dtype=torch.float32)
        filter_2d = (taps.outer(taps) / taps.sum().square())[None, None] if up or down else None
        self.register_buffer("resample_filter", filter_2d)
        self.resample_filter: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H', W'], H' = 2H, H or H/2."""
        if self.down and self.convolve_first:
            # The filter's own border is convolved too, so that it needs none afterwards.
            x = self._halve(self._convolve(x, border=self._border), border=0)
        else:
            if self.up:
                x = self._double(x)
            if self.down:
                x = self._halve(x, border=self._border)
            if self.weight is not None:
                x = self._convolve(x)
        # Added last, as in the reference, whose outputs are then met to the last bit on a CPU.
        return x if self.bias is None else x.add_(self.bias[:, None, None])

    @property
    def _border(self) -> int:
        """Zeros around an image from which the filter makes one of exactly half the size."""
        assert self.resample_filter is not None
        return (self.resample_filter.shape[-1] - 1) // 2

    def _convolve(self, x: Tensor, border: int = 0) -> Tensor:
        assert self.weight is not None
        return F.conv2d(x, self.weight, padding=self.weight.shape[-1] // 2 + border)

    def _double(self, x: Tensor) -> Tensor:
        if self.box_filter:
            # Equals the transposed convolution and is faster.
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        assert self.resample_filter is not None
        taps = (self.resample_filter * 4).to(x.dtype).expand(x.shape[1], -1, -1, -1)
        return F.conv_transpose2d(x, taps, groups=x.shape[1], stride=2, padding=self._border)

    def _halve(self, x: Tensor, border: int) -> Tensor:
        if self.box_filter:
            return F.avg_pool2d(x, 2)
        assert self.resample_filter is not None
        taps = self.resample_filter.to(x.dtype).expand(x.shape[1], -1, -1, -1)
        return F.conv2d(x, taps, groups=x.shape[1], stride=2, padding=border)


class GroupNorm(nn.GroupNorm):
    """Group normalisation with at most 32 groups of at least 4 channels."""

    def __init__(self, num_channels: int, *, eps: float = 1e-5) -> None:
        super().__init__(min(32, num_channels // 4), num_channels, eps)


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
        exponent = exponent / (half - self.endpoint)
        phase = x.outer((1 / 10000.0) ** exponent.to(x.dtype))
        return torch.cat([phase.cos(), phase.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """cos and sin of the input at random frequencies N(0, 16^2) per turn (NCSN++)."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(num_channels // 2) * 16)
        self.freqs: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[B] -> [B, num_channels]: all cosines, then all sines."""
        phase = x.outer((2 * math.pi * self.freqs).to(x.dtype))
        return torch.cat([phase.cos(), phase.sin()], dim=1)


class UNetBlock(nn.Module):
    """Residual block with an embedding input and optional self-attention.

    Covers the DDPM++/NCSN++ blocks (shift only, ``skip_scale`` sqrt(1/2)) and ADM's
    (``adaptive_scale``: scale and shift).

    Args:
        num_heads: Of the attention; None is ``out_channels // channels_per_head``, which is 0,
            no attention at all, in a narrow block. EDM's own networks rely on that.
        step_condition: Take a second embedding, of the student's number of time stamps (SFD-v).
        init: Initial weights; ``init_zero`` those of the last convolutions, ``init_attention``
            those of the queries, keys and values.
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
        step_condition: bool = False,
        init: Init = XAVIER,
        init_zero: Init = NEARLY_ZERO,
        init_attention: Init = XAVIER,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.num_heads = (num_heads or out_channels // channels_per_head) if attention else 0
        self.dropout = dropout
        self.skip_scale = skip_scale
        self.adaptive_scale = adaptive_scale
        self.gradient_checkpointing = False

        resample = {"up": up, "down": down, "resample_filter": tuple(resample_filter)}
        modulation = out_channels * (2 if adaptive_scale else 1)
        self.norm0 = GroupNorm(in_channels, eps=eps)
        self.conv0 = Conv2d(in_channels, out_channels, 3, init=init, **resample)  # type: ignore[arg-type]
        self.affine = Linear(emb_channels, modulation, init=init)
        self.norm1 = GroupNorm(out_channels, eps=eps)
        self.conv1 = Conv2d(out_channels, out_channels, 3, init=init_zero)
        self.affine_step: Linear | None = None
        if step_condition:
            self.affine_step = Linear(emb_channels, modulation, init=init)
            # The step changes nothing at first: a student starts as its teacher.
            for parameter in self.affine_step.parameters():
                nn.init.zeros_(parameter)
        self.skip: Conv2d | None = None
        if out_channels != in_channels or up or down:
            kernel = 1 if resample_proj or out_channels != in_channels else 0
            self.skip = Conv2d(in_channels, out_channels, kernel, init=init, **resample)  # type: ignore[arg-type]
        if self.num_heads:
            self.norm2 = GroupNorm(out_channels, eps=eps)
            self.qkv = Conv2d(out_channels, out_channels * 3, 1, init=init_attention)
            self.proj = Conv2d(out_channels, out_channels, 1, init=init_zero)

    def forward(self, x: Tensor, emb: Tensor, emb_step: Tensor | None = None) -> Tensor:
        """One block.

        Args:
            x: [B, in, H, W].
            emb: [B, E] embedding of noise level and labels.
            emb_step: [B or 1, E], only with ``step_condition``, and then always.

        Returns:
            [B, out, H', W'].
        """
        if self.gradient_checkpointing and torch.is_grad_enabled():
            found: Tensor = checkpointed(self._compute, x, emb, emb_step)
            return found
        return self._compute(x, emb, emb_step)

    def _compute(self, x: Tensor, emb: Tensor, emb_step: Tensor | None) -> Tensor:
        shortcut = x if self.skip is None else self.skip(x)
        x = self.conv0(F.silu(self.norm0(x)))
        modulation = self.affine(emb)[:, :, None, None].to(x.dtype)
        step = None
        if self.affine_step is not None:
            step = self.affine_step(emb_step)[:, :, None, None].to(x.dtype)
        if self.adaptive_scale:
            scale, shift = modulation.chunk(2, dim=1)
            x = torch.addcmul(shift, self.norm1(x), scale + 1)
            if step is not None:
                scale, shift = step.chunk(2, dim=1)
                x = torch.addcmul(shift, x, scale + 1)
        else:
            x = self.norm1(x + modulation if step is None else x + modulation + step)
        x = F.dropout(F.silu(x), p=self.dropout, training=self.training)
        x = (self.conv1(x) + shortcut) * self.skip_scale
        if self.num_heads:
            x = (self.proj(self._attend(self.norm2(x))) + x) * self.skip_scale
        return x

    def _attend(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        # EDM interleaves q, k and v innermost: each [B * heads, C / heads, H * W].
        qkv = self.qkv(x).reshape(b * self.num_heads, c // self.num_heads, 3, h * w)
        q, k, v = qkv.unbind(2)
        if x.is_cuda:
            # Does not keep [H * W, H * W] weights; rounds in another way.
            out = F.scaled_dot_product_attention(q.mT[None], k.mT[None], v.mT[None])[0].mT
        else:
            weights = torch.einsum("ncq,nck->nqk", q, k / math.sqrt(k.shape[1])).softmax(dim=2)
            out = torch.einsum("nqk,nck->ncq", weights, v)
        return out.reshape(b, c, h, w)
