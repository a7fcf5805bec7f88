"""Image sets, as bytes: what a teacher is trained on and what samples are compared with."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bdense.errors import InputError, ShapeError


@dataclass(frozen=True, eq=False)
class Dataset:
    """A named set of images.

    Attributes:
        name: What the user calls it, such as ``digits``.
        images: [n, C, H, W] uint8.
        sha256: Hex digest of the shape and the pixels; equal exactly where the images are.
    """

    name: str
    images: Tensor
    sha256: str

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.dim() != 4:
            raise ShapeError(
                f"data set {self.name!r} has images of {self.images.dtype} and shape "
                f"{list(self.images.shape)}; give uint8 [n, C, H, W]"
            )

    def float_images(self) -> Tensor:
        """[n, C, H, W] float32 in [-1, 1]: byte 0 is -1, byte 255 is 1."""
        return self.images.float() / 127.5 - 1


def load_dataset(name: str) -> Dataset:
    """Load a data set by name.

    Args:
        name: ``digits``: the 1797 digits of 8 x 8 inside scikit-learn, one channel.

    Raises:
        InputError: There is no data set of that name.
    """
    if name not in _LOADERS:
        raise InputError(f"unknown data set {name!r}; known are {', '.join(sorted(_LOADERS))}")
    images = _LOADERS[name]()
    digest = hashlib.sha256(f"{list(images.shape)}".encode())
    digest.update(images.numpy().tobytes())
    return Dataset(name, images, digest.hexdigest())


def _digits() -> Tensor:
    from sklearn.datasets import load_digits

    ink = torch.from_numpy(load_digits().images)  # [1797, 8, 8] float64, whole numbers 0..16
    return (ink / 16 * 255).round().to(torch.uint8).unsqueeze(1)


# Each returns [n, C, H, W] uint8.
_LOADERS: dict[str, Callable[[], Tensor]] = {"digits": _digits}
