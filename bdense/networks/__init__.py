"""Networks F(x; c_noise) with EDM's parameter names, so that its checkpoints load; diffusers'."""

from collections.abc import Mapping
from typing import Any, Protocol

from bdense.networks.dhariwal_unet import DhariwalUNet, DhariwalUNetConfig
from bdense.networks.diffusers_unet import DiffusersUNet
from bdense.networks.song_unet import SongUNet, SongUNetConfig
from bdense.networks.unet import Network

__all__ = [
    "NETWORKS",
    "DhariwalUNet",
    "DhariwalUNetConfig",
    "DiffusersUNet",
    "Network",
    "NetworkBuilder",
    "SongUNet",
    "SongUNetConfig",
]


class NetworkBuilder(Protocol):
    """Makes a network with initial weights from what its ``describe`` wrote as ``config``."""

    def __call__(
        self, options: Mapping[str, Any], *, num_branches: int, prediction_channels: int
    ) -> Network:
        """``num_branches`` groups of ``prediction_channels`` output channels."""
        ...


# By the name that descriptions and EDM's files give as ``network`` or ``model_type``.
NETWORKS: dict[str, NetworkBuilder] = {
    "SongUNet": SongUNet.build,
    "DhariwalUNet": DhariwalUNet.build,
    "UNet2DModel": DiffusersUNet.build,
}
