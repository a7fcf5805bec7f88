"""Images as bytes, and many of them as one picture.

C channels, H x W pixels.
"""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from bdense.errors import InputError, NonFiniteError
from bdense.files import atomic_write

GRID_COLUMNS = 16  # of a picture of samples
_GAP, _GREY = 2, 96  # pixels between its images, and their value


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] to 0..255 as EDM writes files: clip(127.5 x + 128), fractions cut off; any shape.

    Raises:
        NonFiniteError: An image holds NaN or infinity, which no byte stands for.
    """
    if not bool(torch.isfinite(images).all()):
        bad = int((~torch.isfinite(images)).sum())
        raise NonFiniteError(
            f"{bad} of {images.numel()} pixel values of images {list(images.shape)} are not "
            "finite; the model diverged"
        )
    return (images * 127.5 + 128).clip(0, 255).to(torch.uint8)


def image_grid(images: Tensor, columns: int, gap: int = 0) -> Tensor:
    """Tile uint8 images [n, C, H, W] row by row into one picture [H', W', 3 or 1 channels].

    ``gap`` pixels of grey lie between two images.
    """
    if images.dtype != torch.uint8:
        raise InputError(f"a picture is made of uint8 images, got {images.dtype}; see to_uint8")
    if images.dim() != 4:
        raise InputError(f"a picture is made of images [n, C, H, W], got {list(images.shape)}")
    if images.shape[0] < 1:
        raise InputError("a picture is made of one image or more, got none")
    if columns < 1:
        raise InputError(f"columns must be at least 1, got {columns}")
    n, c, h, w = images.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    canvas = images.new_full((rows * columns, c, h + gap, w + gap), _GREY)
    canvas[:, :, :h, :w] = 0
    canvas[:n, :, :h, :w] = images
    tiled = canvas.view(rows, columns, c, h + gap, w + gap).permute(0, 3, 1, 4, 2)
    whole = tiled.reshape(rows * (h + gap), columns * (w + gap), c)
    return whole[: whole.shape[0] - gap, : whole.shape[1] - gap]


def save_grid(images: Tensor, path: Path, columns: int = GRID_COLUMNS) -> None:
    """Write uint8 images [n, C, H, W] as one PNG, small ones enlarged to 32 pixels at least."""
    zoom = max(1, 32 // images.shape[-1])
    enlarged = images.repeat_interleave(zoom, -2).repeat_interleave(zoom, -1)
    picture = image_grid(enlarged, columns, gap=_GAP).squeeze(-1).numpy()
    with atomic_write(path) as scratch:
        Image.fromarray(picture).save(scratch, format="PNG")
