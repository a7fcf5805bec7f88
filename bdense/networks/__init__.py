"""Networks F(x; c_noise) with EDM's parameter names, so that its checkpoints load; diffusers'."""

from bdense.networks.network import Network
from bdense.registry import Registry

__all__ = ["NETWORKS", "Network"]

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
