"""Networks F(x; c_noise) with EDM's parameter names, so that its checkpoints load."""

from bdense.networks.song_unet import SongUNet, SongUNetConfig

__all__ = ["SongUNet", "SongUNetConfig"]
