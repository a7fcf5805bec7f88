"""How much each noise level counts in a denoising loss (Salimans & Ho 2022, section 4)."""

import torch
from torch import Tensor

from bdense.diffusion import LevelWeight


def snr_weight(sigma: Tensor, kind: LevelWeight) -> Tensor:
    """The weight of |D - x_0|^2, with SNR = alpha^2 / s^2 = 1 / sigma^2.

    Args:
        sigma: Levels above 0, of any shape.
        kind: "constant" is 1: the error of the image. "snr" is SNR: the error of the noise.
            "snr_trunc" is max(SNR, 1): the larger of the two. "v" is SNR + 1: the error of
            v = alpha eps - s x_0, which is their sum.

    Returns:
        Weights of the shape and dtype of ``sigma``.
    """
    snr = sigma**-2
    if kind == "constant":
        return torch.ones_like(sigma)
    if kind == "snr":
        return snr
    if kind == "snr_trunc":
        return snr.clamp(min=1)
    return snr + 1
