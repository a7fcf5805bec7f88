"""One contract for every teacher and student: D(x; sigma), the expected clean image.

B batch, K branches, C image channels, H x W pixels.
"""

from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bdense.errors import CheckpointError, InputError, ShapeError
from bdense.networks import SongUNet, SongUNetConfig


class Denoiser(Protocol):
    """Anything that maps a noisy image and its noise level to the expected clean image."""

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """D(x; sigma).

        Args:
            x: [B, C, H, W] image plus sigma times unit noise.
            sigma: 0-dim or [B], any floating dtype and device.

        Returns:
            [B, C, H, W].
        """
        ...


class NetworkDenoiser(nn.Module):
    """D^k = c_skip x + c_out F^k(c_in x, c_noise) (Karras et al. 2022, table 1).

    A network with K groups of output channels is a branched denoiser: ``branches`` gives all K
    predictions, calling the module gives branch K, the only one that inference keeps.
    """

    def __init__(self, model: SongUNet, *, sigma_data: float = 0.5) -> None:
        super().__init__()
        if not sigma_data > 0:
            raise InputError(f"sigma_data must be positive, got {sigma_data}")
        if model.out_channels % model.config.img_channels:
            raise ShapeError(
                f"the network has {model.out_channels} output channels, which is no multiple of "
                f"its {model.config.img_channels} image channels"
            )
        self.model = model
        self.sigma_data = sigma_data

    @property
    def num_branches(self) -> int:
        """K, the number of predictions a call makes."""
        return self.model.out_channels // self.model.config.img_channels

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        config = self.model.config
        return config.img_channels, config.img_resolution, config.img_resolution

    def branches(
        self,
        x: Tensor,
        sigma: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """All K predictions at once.

        Args:
            x: [B, C, H, W].
            sigma: 0-dim or [B].
            class_labels: [B, label_dim], only for a conditional network.
            augment_labels: [B, augment_dim], EDM's augmentation labels.

        Returns:
            [B, K, C, H, W]; index K - 1 is the interval's end point.
        """
        sigma = sigma.to(device=x.device, dtype=x.dtype).reshape(-1, 1, 1, 1)
        variance = self.sigma_data**2 + sigma**2
        c_skip = self.sigma_data**2 / variance
        c_out = sigma * self.sigma_data / variance.sqrt()
        c_in = 1 / variance.sqrt()
        c_noise = sigma.flatten().log() / 4
        out = self.model(c_in * x, c_noise, class_labels, augment_labels)
        b, c, h, w = x.shape
        out = out.view(b, self.num_branches, c, h, w)
        denoised: Tensor = (c_skip * x)[:, None] + c_out[:, None] * out
        return denoised

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """D(x; sigma) of branch K: [B, C, H, W]."""
        return self.branches(x, sigma, class_labels, augment_labels)[:, -1]

    def describe(self) -> dict[str, Any]:
        """What ``build_denoiser`` needs to build this module again, JSON-able."""
        return {
            "precond": "edm",
            "sigma_data": self.sigma_data,
            "network": "SongUNet",
            "num_branches": self.num_branches,
            "config": asdict(self.model.config),
        }


def build_denoiser(description: dict[str, Any]) -> NetworkDenoiser:
    """A freshly initialised denoiser of the described architecture.

    Raises:
        CheckpointError: The description names something this version does not build.
    """
    precond, network = description.get("precond"), description.get("network")
    if precond != "edm" or network != "SongUNet":
        raise CheckpointError(
            f"no denoiser is built from precond={precond!r}, network={network!r}; "
            "this version builds precond='edm', network='SongUNet'"
        )
    try:
        config = SongUNetConfig(**description["config"])
    except TypeError as error:
        raise CheckpointError(f"the network options do not fit a SongUNet: {error}") from error
    out_channels = config.img_channels * int(description.get("num_branches", 1))
    # Weights follow from a checkpoint or an explicit seed, never from the global generator.
    with torch.random.fork_rng(devices=[]):
        model = SongUNet(config, out_channels)
    return NetworkDenoiser(model, sigma_data=float(description["sigma_data"]))
