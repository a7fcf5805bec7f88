"""How data sets are named and which files belong to them; does not import torch."""

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePath

from bdense.errors import InputError

# A data set given by files is FORMAT:PATH.
FORMATS = ("folder", "zip", "idx")
# What a user may name.
DATA_SETS = (
    "cifar10, cifar10-test, digits, fashion-mnist, fashion-mnist-test, "
    f"{', '.join(f'{kind}:PATH' for kind in FORMATS)}; NAME@SIDE pads images to SIDE x SIDE, "
    "NAME@cropSIDE crops and resizes them"
)
LABELS_FILE = "dataset.json"
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclass(frozen=True, slots=True)
class Fit:
    """How images are brought to SIDE x SIDE pixels: padded with black, or cropped and resized."""

    side: int
    crop: bool = False

    def __str__(self) -> str:
        return f"crop{self.side}" if self.crop else str(self.side)


def split_fit(spec: str) -> tuple[str, Fit | None]:
    """``NAME@SIDE`` or ``NAME@cropSIDE`` as the name and the fit; None if none is given."""
    match = re.fullmatch(r"(.+)@(crop)?([1-9]\d{0,3})", spec)
    return (match[1], Fit(int(match[3]), crop=bool(match[2]))) if match else (spec, None)


def split_format(source: str) -> tuple[str, str] | None:
    """``FORMAT:PATH`` as a pair; None if ``source`` is the name of a set."""
    kind, _, file = source.partition(":")
    return (kind, file) if file and kind in FORMATS else None


def labels_beside(path: Path) -> Path | None:
    """The idx file with the labels of an idx file of images, if it is there."""
    beside = path.with_name(re.sub(r"images([-.])idx3", r"labels\1idx1", path.name))
    return beside if beside != path and beside.is_file() else None


def image_files(folder: Path) -> list[str]:
    """Sorted image files below a folder; raises as ``files_below``."""
    return list(filter(is_image, files_below(folder)))


def files_below(folder: Path) -> list[str]:
    """Sorted files below a folder, following links.

    Raises:
        InputError: Links lead to one folder twice.
        OSError: A folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise error

    names, seen = [], set()
    for where, _, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = Path(where).resolve()
        if real in seen:  # a link back up would repeat every image
            raise InputError(
                f"the image folder {folder} leads to {real} twice, once as {where}; remove a link"
            )
        seen.add(real)
        below = PurePath(where).relative_to(folder).as_posix()
        names += [file if below == "." else f"{below}/{file}" for file in files]
    return sorted(names)


def is_image(name: str) -> bool:
    """Whether a file name, below a folder or in an archive, is an image of the set."""
    return name.lower().endswith(SUFFIXES) and is_shown(name)


def is_shown(name: str) -> bool:
    """Whether a file belongs to the set: no notebook's checkpoint, thumbnail, macOS companion."""
    return "/." not in f"/{name}" and not name.startswith("__MACOSX/")
