"""Networks F(x; c_noise) with EDM's parameter names, so that its checkpoints load; diffusers'."""

from bdense.networks.dhariwal_unet import DhariwalUNet, DhariwalUNetConfig
from bdense.networks.diffusers_unet import DiffusersTextUNet, DiffusersUNet
from bdense.networks.dit import DiT
from bdense.networks.network import Network
from bdense.networks.song_unet import SongUNet, SongUNetConfig
from bdense.registry import Registry

__all__ = [
    "NETWORKS",
    "DhariwalUNet",
    "DhariwalUNetConfig",
    "DiT",
    "DiffusersTextUNet",
    "DiffusersUNet",
    "Network",
    "SongUNet",
    "SongUNetConfig",
]

# By the name that descriptions and EDM's files give as ``network`` or ``model_type``.
NETWORKS: Registry[type[Network]] = Registry(
    "network",
    "bdense.networks",
    {
        "SongUNet": "bdense.networks.song_unet:SongUNet",
        "DhariwalUNet": "bdense.networks.dhariwal_unet:DhariwalUNet",
        "UNet2DModel": "bdense.networks.diffusers_unet:DiffusersUNet",
        "UNet2DConditionModel": "bdense.networks.diffusers_unet:DiffusersTextUNet",
        "DiTTransformer2DModel": "bdense.networks.dit:DiT",
    },
)
