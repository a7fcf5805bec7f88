"""How data sets are named and which files belong to them; does not import torch."""

import os
import re
from pathlib import Path, PurePath

from bdense.errors import InputError

# A data set given by files is FORMAT:PATH.
FORMATS = ("folder", "zip", "idx")
# What a user may name.
DATA_SETS = (
    "cifar10, cifar10-test, digits, fashion-mnist, fashion-mnist-test, "
    f"{', '.join(f'{kind}:PATH' for kind in FORMATS)}; NAME@SIDE pads images to SIDE x SIDE"
)
LABELS_FILE = "dataset.json"
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def split_side(spec: str) -> tuple[str, int | None]:
    """``NAME@SIDE`` as the name and the side to pad to; the side is None if not given."""
    match = re.fullmatch(r"(.+)@([1-9]\d{0,3})", spec)
    return (match[1], int(match[2])) if match else (spec, None)


def split_format(source: str) -> tuple[str, str] | None:
    """``FORMAT:PATH`` as a pair; None if ``source`` is the name of a set."""
    kind, _, file = source.partition(":")
    return (kind, file) if file and kind in FORMATS else None


def labels_beside(path: Path) -> Path | None:
    """The idx file with the labels of an idx file of images, if it is there."""
    beside = path.with_name(re.sub(r"images([-.])idx3", r"labels\1idx1", path.name))
    return beside if beside != path and beside.is_file() else None


def image_files(folder: Path) -> list[str]:
    """Sorted image files below a folder, following links.

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
    return sorted(filter(is_image, names))


def is_image(name: str) -> bool:
    """Whether a file name, below a folder or in an archive, is an image of the set."""
    # Notebook checkpoints, thumbnails and macOS's companion files do not belong to the set.
    hidden = "/." in f"/{name}" or name.startswith("__MACOSX/")
    return name.lower().endswith(SUFFIXES) and not hidden
