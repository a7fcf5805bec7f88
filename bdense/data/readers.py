"""Readers of image files: idx (MNIST's format), folders, and EDM's data set archives.

Each gives uint8 [n, C, H, W] and labels [n] or None. n images, C channels, H x W pixels.
"""

import gzip
import json
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from bdense.data.names import LABELS_FILE, SUFFIXES, image_files, is_image, labels_beside
from bdense.errors import InputError

# The third byte of an idx file's magic number names its type; image files have this one.
_IDX_UINT8 = 0x08
_MAX_CLASSES = 1_000_000  # one-hot labels of more would not fit into memory
# What Pillow and zipfile are known to raise for damaged, encrypted or oversized files.
_UNREADABLE = (
    *(EOFError, OSError, RuntimeError, SyntaxError, ValueError, struct.error),
    *(zipfile.BadZipFile, zlib.error, Image.DecompressionBombError),
)


def read_idx(path: Path) -> Tensor:
    """The array of an idx file of bytes, gzipped or not: uint8, with the shape of its header.

    Raises:
        InputError: The file is missing, not an idx file of bytes, or its length contradicts its
            header.
    """
    try:
        content = bytearray(path.read_bytes())
        if content[:2] == b"\x1f\x8b":
            content = bytearray(gzip.decompress(content))
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"the idx file {path} cannot be read: {_reason(error)}") from error
    if len(content) < 4 or content[:3] != bytes((0, 0, _IDX_UINT8)):
        raise InputError(
            f"{path} is not an idx file of bytes: its {len(content)} bytes begin with "
            f"'{content[:4].hex(' ')}', not '00 00 08'"
        )
    dimensions = content[3]
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise InputError(f"{path} ends inside its header; fetch it again")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    if len(content) - header != math.prod(shape):
        raise InputError(
            f"{path} holds {len(content) - header} bytes after its header, whose shape is "
            f"{' x '.join(map(str, shape))}; fetch it again"
        )
    if not math.prod(shape):
        return torch.empty(shape, dtype=torch.uint8)
    return torch.frombuffer(content, dtype=torch.uint8, offset=header).view(shape)


def read_idx_images(path: Path) -> tuple[Tensor, Tensor | None]:
    """Images of an idx file, and the labels from the file beside it, found by MNIST's names.

    ``train-images-idx3-ubyte.gz`` belongs to ``train-labels-idx1-ubyte.gz``.

    Raises:
        InputError: As ``read_idx``, or the arrays are not images with one label each.
    """
    images = read_idx(path)
    if images.dim() != 3 or not images.numel():
        raise InputError(f"{path} holds an array of {list(images.shape)}; images are [n, H, W]")
    beside = labels_beside(path)
    if beside is None:
        return images.unsqueeze(1), None
    labels = read_idx(beside)
    if labels.shape != (len(images),):
        raise InputError(
            f"{beside} holds labels of shape {list(labels.shape)} for the {len(images)} images of "
            f"{path}; the two belong to different sets"
        )
    return images.unsqueeze(1), labels.long()


def read_folder(folder: Path) -> tuple[Tensor, Tensor | None]:
    """Every image file below a folder, sorted by name, without hidden ones.

    Labels come from ``dataset.json`` as EDM's tools write it, else from the top-level sub-folders,
    one class each, sorted by name; a single sub-folder gives no labels.

    Raises:
        InputError: There is no image, one cannot be used, sizes or colour modes differ, or the
            labels do not fit the images.
    """
    if not folder.is_dir():
        remedy = f"; zip:{folder} reads an archive" if zipfile.is_zipfile(folder) else ""
        raise InputError(f"there is no image folder {folder}{remedy}")
    labels_file = folder / LABELS_FILE
    try:
        names = image_files(folder)
        text = labels_file.read_bytes() if labels_file.exists() else None
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {_reason(error)}") from error
    images = _read_images(str(folder), names, lambda name: (folder / name).open("rb"))
    if text is not None:
        return images, _edm_labels(str(labels_file), text, names)
    return images, _labels_by_folder(names)


def read_zip(path: Path) -> tuple[Tensor, Tensor | None]:
    """An EDM data set archive: images, and labels in ``dataset.json`` (NVlabs/edm dataset_tool).

    Raises:
        InputError: As ``read_folder``, or the file is not a zip archive.
    """
    try:
        archive = zipfile.ZipFile(path)
    except _UNREADABLE as error:
        raise InputError(f"the image archive {path} cannot be read: {_reason(error)}") from error
    with archive:
        members = archive.namelist()
        names = sorted(filter(is_image, members))
        images = _read_images(str(path), names, archive.open)  # type: ignore[arg-type]
        if LABELS_FILE not in members:
            return images, None
        labels_file = f"{path}:{LABELS_FILE}"
        try:
            text = archive.read(LABELS_FILE)
        except _UNREADABLE as error:
            raise InputError(f"{labels_file} cannot be read: {_reason(error)}") from error
        return images, _edm_labels(labels_file, text, names)


def _read_images(
    source: str, names: Sequence[str], open_file: Callable[[str], BinaryIO]
) -> Tensor:
    """[n, C, H, W] uint8, decoded one by one into one array."""
    if not names:
        raise InputError(f"{source} holds no images; accepted are {', '.join(SUFFIXES)} files")
    images: NDArray[np.uint8] | None = None
    for index, name in enumerate(names):
        try:
            with open_file(name) as file, Image.open(file) as image:
                pixels = _pixels(image)
        except _UNREADABLE as error:
            raise InputError(
                f"{source}: the image {name} cannot be used: {_reason(error)}"
            ) from error
        if images is None:
            images = np.empty((len(names), *pixels.shape), np.uint8)
        if pixels.shape != images.shape[1:]:
            raise InputError(
                f"{source} mixes images: {names[0]} is {_size(images.shape[1:])} and {name} is "
                f"{_size(pixels.shape)}; convert them to one size and colour mode"
            )
        images[index] = pixels
    assert images is not None
    return torch.from_numpy(images)


def _pixels(image: Image.Image) -> NDArray[np.uint8]:
    """[C, H, W]: grey stays grey, everything else (palettes, CMYK) becomes RGB.

    Raises:
        ValueError: The file is not one opaque still image of 8 bits a channel.
    """
    # A camera's JPEG may carry a preview behind the picture (MPO), which is not an animation.
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames > 1:
        raise ValueError(f"it has {frames} frames; save each as its own image")
    # Pillow silently cuts 16-bit colours to 8 bits; only the stored layout shows it.
    deep = any(re.search(r"(?<!BGR);16", str(tile[3])) for tile in getattr(image, "tile", ()))
    if deep or image.mode[0] in "IF":
        raise ValueError("it has more than 8 bits a channel; convert it to 8")
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    if image.has_transparency_data:
        image = image.convert("RGBA")
        least, _ = image.getchannel("A").getextrema()
        if least != 255:
            raise ValueError("it has transparent pixels; put it on a background")
    pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)


def _size(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    return f"{width} x {height} pixels, {'grey' if channels == 1 else 'RGB'}"


def _labels_by_folder(names: Sequence[str]) -> Tensor | None:
    folders = [name.partition("/")[0] if "/" in name else "" for name in names]
    classes = {folder: index for index, folder in enumerate(sorted(set(folders)))}
    if "" in classes or len(classes) == 1:
        return None
    return torch.tensor([classes[folder] for folder in folders])


def _edm_labels(source: str, text: bytes, names: Sequence[str]) -> Tensor | None:
    """{"labels": [["00000/img00000000.png", 6], ...]}, or null for none."""
    try:
        pairs = json.loads(text)["labels"]
        if pairs is None:
            return None
        table = {str(name): _class_number(label) for name, label in pairs}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(
            f'{source} is not {{"labels": [[NAME, CLASS], ...]}} with classes 0 to 999999: '
            f"{type(error).__name__}: {error}"
        ) from error
    missing = [name for name in names if name not in table]
    if missing:
        raise InputError(
            f"{source} has no label for {missing[0]} ({len(missing)} of {len(names)} images are "
            'missing); add them, or write "labels": null for no labels'
        )
    return torch.tensor([table[name] for name in names])


def _class_number(label: Any) -> int:  # noqa: ANN401  whatever JSON holds
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < _MAX_CLASSES:
        raise ValueError(f"the class {json.dumps(label):.40}")
    return label


def _reason(error: BaseException) -> str:
    """The error's text without the path, which the message already names."""
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image, or is cut short"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
