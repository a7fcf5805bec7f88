"""Tiny networks whose every layer matters."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bdense.diffusion.denoiser import NetworkDenoiser, build_denoiser

TINY: dict[str, Any] = {
    "img_resolution": 8,
    "img_channels": 2,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attn_resolutions": (),
    "dropout": 0.0,
}


def tiny_denoiser(
    network: str = "SongUNet",
    *,
    precond: str = "edm",
    num_branches: int = 1,
    seed: int = 0,
    **options: Any,
) -> NetworkDenoiser:
    """An untrained denoiser, in eval mode, in which nothing is (nearly) zero."""
    description = {
        "precond": precond,
        "network": network,
        "num_branches": num_branches,
        "config": TINY | options,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return awake(build_denoiser(description)).eval()


# Options of diffusers' networks.
UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 2,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
TEXT_UNET = UNET | {
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": 4,
    "cross_attention_dim": 6,
}


def untrained(make: Callable[[], nn.Module]) -> nn.Module:
    """What is made, in eval mode and always the same, and in which nothing is (nearly) zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return awake(make()).eval()


@torch.no_grad()
def awake(module: nn.Module) -> nn.Module:
    """Draw what starts at zero, or near it, from the global generator."""
    for parameter in module.parameters():
        if parameter.abs().max() < 1e-3:
            parameter.normal_(std=0.2)
    return module


def image(batch: int = 3, channels: int = 2) -> torch.Tensor:
    """[batch, channels, 8, 8], always the same."""
    return torch.randn(batch, channels, 8, 8, generator=torch.Generator().manual_seed(1))


def one_hot(*classes: int, of: int = 3) -> torch.Tensor:
    """[B, of] float32."""
    return nn.functional.one_hot(torch.tensor(classes), of).float()
