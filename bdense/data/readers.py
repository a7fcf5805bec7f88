"""Readers of image files: idx (MNIST's format), folders, and EDM's data set archives.

Each gives uint8 [n, C, H, W] and labels [n] or None. n images, C channels, H x W pixels.
"""

import gzip
import json
import math
import re
import struct
import typing
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from bdense.data.names import LABELS_FILE, SUFFIXES, files_below, is_image, is_shown, labels_beside
from bdense.errors import InputError
from bdense.files import require_no_pipe, unpacked_bound

# How an idx file of bytes begins: the third byte names the type.
_IDX_UINT8 = b"\0\0\x08"
_SHOWN_PROBLEMS = 8
_MOST_PIXELS = 4096**2  # of an image that is taken as it is
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
        bound = unpacked_bound(path.stat().st_size)
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else path.open("rb") as stream:
            content = bytearray()
            # A single read would set aside memory for the bound first.
            while len(content) <= bound and (part := stream.read(2**20)):
                content += part
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"the idx file {path} cannot be read: {_reason(error)}") from error
    if len(content) > bound:
        raise InputError(f"{path} unpacks to more than {bound} bytes, which no idx file does")
    if len(content) < 4 or not content.startswith(_IDX_UINT8):
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


def read_idx_images(
    path: Path, crop: int | None = None, only_first: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Images of an idx file, and the labels from the file beside it, found by MNIST's names.

    ``train-images-idx3-ubyte.gz`` belongs to ``train-labels-idx1-ubyte.gz``. Arguments as of
    ``read_folder``.

    Raises:
        InputError: As ``read_idx``, or the arrays are not images with one label each.
    """
    images = read_idx(path)
    if images.dim() != 3 or not images.numel():
        raise InputError(f"{path} holds an array of {list(images.shape)}; images are [n, H, W]")
    taken = images[: 1 if only_first else None].unsqueeze(1)
    taken = taken if crop is None else cropped_arrays(taken, crop)
    beside = None if only_first else labels_beside(path)
    if beside is None:
        return taken, None
    labels = read_idx(beside)
    if labels.shape != (len(images),):
        raise InputError(
            f"{beside} holds labels of shape {list(labels.shape)} for the {len(images)} images of "
            f"{path}; the two belong to different sets"
        )
    return taken, labels.long()


def read_folder(
    folder: Path, crop: int | None = None, only_first: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Every image file below a folder, sorted by name, without hidden ones.

    Args:
        folder: The folder.
        crop: Side to crop and resize to, see ``cropped``; None takes images as they are.
        only_first: Whether the first image is enough, without its label.

    Labels come from ``dataset.json`` as EDM's tools write it, else from the top-level sub-folders,
    one class each, sorted by name; a single sub-folder gives no labels.

    Raises:
        InputError: There is no image, one cannot be used, sizes or colour modes differ, or the
            labels do not fit the images, or lie below the folder.
    """
    if not folder.is_dir():
        remedy = f"; zip:{folder} reads an archive" if zipfile.is_zipfile(folder) else ""
        raise InputError(f"there is no image folder {folder}{remedy}")
    labels_file = folder / LABELS_FILE
    try:
        members = files_below(folder)
        names = list(filter(is_image, members))
        text = None
        if labels_file.exists():
            require_no_pipe(labels_file)
            _require_short(labels_file, labels_file.stat().st_size, len(names))
            text = labels_file.read_bytes()
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {_reason(error)}") from error

    def opened(name: str) -> BinaryIO:
        if not (folder / name).is_file():
            raise ValueError("it is not a file")  # a pipe would wait for ever
        return (folder / name).open("rb")

    if (found := _labels_member(folder, members, names)) not in (None, LABELS_FILE):
        below = folder / str(found)
        raise InputError(f"the labels of {folder} are in {below}; give folder:{below.parent}")
    if only_first:
        return _read_images(str(folder), names[:1], opened, crop), None
    images = _read_images(str(folder), names, opened, crop)
    if text is not None:
        return images, _edm_labels(str(labels_file), text, names)
    return images, _labels_by_folder(names)


def read_zip(
    path: Path, crop: int | None = None, only_first: bool = False
) -> tuple[Tensor, Tensor | None]:
    """An EDM data set archive: images, and labels in ``dataset.json`` (NVlabs/edm dataset_tool).

    The set may lie below a top folder. For the arguments see ``read_folder``.

    Raises:
        InputError: As ``read_folder``, or the file is not a zip archive, has two entries of one
            name, or a dataset.json that is not at the top of the set.
    """
    try:
        archive = zipfile.ZipFile(path)
    except _UNREADABLE as error:
        raise InputError(f"the image archive {path} cannot be read: {_reason(error)}") from error
    with archive:
        members = archive.namelist()
        (twice, times), *_ = Counter(members).most_common(1) or [("", 0)]
        if times > 1:
            raise InputError(f"{path} has {times} entries {twice}; make the archive again")
        names = sorted(filter(is_image, members))
        opened = typing.cast(Callable[[str], BinaryIO], archive.open)
        member = _labels_member(path, members, names)
        if only_first:
            return _read_images(str(path), names[:1], opened, crop), None
        images = _read_images(str(path), names, opened, crop)
        if member is None:
            return images, None
        labels_file = f"{path}:{member}"
        _require_short(labels_file, archive.getinfo(member).file_size, len(names))
        try:
            text = archive.read(member)
        except _UNREADABLE as error:
            raise InputError(f"{labels_file} cannot be read: {_reason(error)}") from error
        top = member.removesuffix(LABELS_FILE)
        return images, _edm_labels(labels_file, text, [name.removeprefix(top) for name in names])


def _require_short(source: str | Path, size: int, images: int) -> None:
    """Refuse labels that take more memory than labels of so many images can."""
    if size > (most := 2**20 + 1024 * images):
        raise InputError(
            f"{source} has {size} bytes, more than {most}, for the labels of {images} images; "
            "make it again"
        )


def _labels_member(path: Path, members: Sequence[str], images: Sequence[str]) -> str | None:
    """The set's dataset.json, at its top or that of the one folder that all images are in."""
    if LABELS_FILE in members:
        return LABELS_FILE
    found = [name for name in members if name.endswith(f"/{LABELS_FILE}") and is_shown(name)]
    if not found:
        return None
    top = found[0].removesuffix(LABELS_FILE)
    if len(found) == 1 and all(name.startswith(top) for name in images):
        return found[0]
    raise InputError(
        f"{path} has labels in {', '.join(found)}, which is not at the top of its images; put one "
        f"{LABELS_FILE} there"
    )


def cropped(image: Image.Image, side: int) -> Image.Image:
    """The largest square at the centre, resized by LANCZOS, as EDM's dataset_tool.py crops."""
    square = min(image.size)
    left, top = (image.width - square) // 2, (image.height - square) // 2
    box = (left, top, left + square, top + square)
    return image.crop(box).resize((side, side), Image.Resampling.LANCZOS)


def cropped_arrays(images: Tensor, side: int) -> Tensor:
    """``cropped`` of each of [n, C, H, W] uint8 images, C = 1 or 3."""
    found = torch.empty(len(images), images.shape[1], side, side, dtype=torch.uint8)
    for image, into in zip(images.permute(0, 2, 3, 1), found, strict=True):
        pixels = np.asarray(cropped(Image.fromarray(image.squeeze(-1).numpy()), side))
        into.copy_(torch.from_numpy(np.array(pixels)).view(side, side, -1).permute(2, 0, 1))
    return found


def _read_images(
    source: str,
    names: Sequence[str],
    open_file: Callable[[str], BinaryIO],
    crop: int | None,
) -> Tensor:
    """[n, C, H, W] uint8, decoded one by one into one array.

    Raises:
        InputError: There is none, or some cannot be used: all problems in one summary.
    """
    if not names:
        raise InputError(f"{source} holds no images; accepted are {', '.join(SUFFIXES)} files")
    images: NDArray[np.uint8] | None = None
    problems: dict[str, list[str]] = {}
    shapes: dict[tuple[int, ...], list[str]] = {}
    for index, name in enumerate(names):
        try:
            with open_file(name) as file, Image.open(file) as image:
                pixels = _pixels(image, crop)
        except _UNREADABLE as error:
            problems.setdefault(_reason(error), []).append(name)
            continue
        if images is None:
            images = np.empty((len(names), *pixels.shape), np.uint8)
        if crop is None:
            shapes.setdefault(pixels.shape, []).append(name)
        elif len(pixels) != images.shape[1]:  # grey among colour
            images = images if images.shape[1] == 3 else images.repeat(3, axis=1)
            pixels = pixels if len(pixels) == 3 else pixels.repeat(3, axis=0)
        if pixels.shape == images.shape[1:]:
            images[index] = pixels
    problems |= _other_shapes(shapes)
    if problems:
        raise InputError(_summary(source, len(names), problems))
    assert images is not None
    return torch.from_numpy(images)


def _other_shapes(shapes: Mapping[tuple[int, ...], list[str]]) -> dict[str, list[str]]:
    """Names of images of another shape [C, H, W] than most, by what is wrong with them."""
    most = max(shapes, key=lambda shape: len(shapes[shape]), default=())
    return {
        f"it is {_size(shape)}, and {shapes[most][0]} is {_size(most)}; add @cropSIDE to the data "
        "set's name": names
        for shape, names in shapes.items()
        if shape != most
    }


def _summary(source: str, count: int, problems: Mapping[str, Sequence[str]]) -> str:
    """Every problem on a line, with the number of its images and the first of them."""
    bad = sum(map(len, problems.values()))
    if bad == 1:
        ((reason, (name,)),) = problems.items()
        return f"{source}: the image {name} cannot be used: {reason}"
    most = sorted(problems.items(), key=lambda each: -len(each[1]))
    lines = [f"{source}: {bad} of {count} images cannot be used:"]
    for reason, names in most[:_SHOWN_PROBLEMS]:
        named = names[0] if len(names) == 1 else f"{len(names)} images, such as {names[0]}"
        lines.append(f"- {named}: {reason}")
    if (left := len(most) - _SHOWN_PROBLEMS) > 0:
        lines.append(f"- and {left} other problem{'s' * (left > 1)}")
    return "\n".join(lines)


def _pixels(image: Image.Image, crop: int | None) -> NDArray[np.uint8]:
    """[C, H, W]: grey stays grey, everything else (palettes, CMYK) becomes RGB."""
    # A camera's JPEG may carry a preview behind the picture (MPO), which is not an animation.
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames > 1:
        raise ValueError(f"it has {frames} frames; save each as its own image")
    # Pillow silently cuts 16-bit colours to 8 bits; only the stored layout shows it.
    deep = any(re.search(r"(?<!BGR);16", str(tile[3])) for tile in getattr(image, "tile", ()))
    if deep or image.mode[0] in "IF":
        raise ValueError("it has more than 8 bits a channel; convert it to 8")
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    # Before EXIF data are read, for which a PNG is decoded.
    if crop is None and image.width * image.height > _MOST_PIXELS:
        shape = (1 if mode == "L" else 3, image.height, image.width)
        raise ValueError(f"it is {_size(shape)}; add @cropSIDE to the data set's name")
    if crop is not None:
        image = ImageOps.exif_transpose(image)
    elif image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        raise ValueError("its EXIF data turn it; save it upright, or add @cropSIDE, which does so")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        least, _ = image.getchannel("A").getextrema()
        if least != 255:
            raise ValueError("it has transparent pixels; put it on a background")
    image = image if image.mode == mode else image.convert(mode)
    pixels = np.asarray(image if crop is None else cropped(image, crop))
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
        table: dict[str, int] = {}
        for name, label in pairs:
            if str(name) in table:
                raise ValueError(f"two labels for {name}")
            if type(label) is not int or not 0 <= label < _MAX_CLASSES:
                raise ValueError(f"the class {json.dumps(label):.40}")
            table[str(name)] = label
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


def _reason(error: BaseException) -> str:
    """The error's text without the path, which the message already names."""
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image, or is cut short"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
