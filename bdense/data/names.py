"""What names a data set, and which files are of it, for those who cannot wait for torch."""

import os
import re
from pathlib import Path, PurePath

from bdense.errors import InputError

# A data set of files is FORMAT:PATH.
FORMATS = ("folder", "zip", "idx")
# What a user may name.
DATA_SETS = (
    "cifar10, cifar10-test, digits, fashion-mnist, fashion-mnist-test, "
    f"{', '.join(f'{kind}:PATH' for kind in FORMATS)}; NAME@SIDE pads images to SIDE x SIDE"
)
LABELS_FILE = "dataset.json"
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def split_side(spec: str) -> tuple[str, int | None]:
    """``NAME@SIDE`` as the name and the side to pad to; None without one."""
    match = re.fullmatch(r"(.+)@([1-9]\d{0,3})", spec)
    return (match[1], int(match[2])) if match else (spec, None)


def split_format(source: str) -> tuple[str, str] | None:
    """``FORMAT:PATH`` as the two; None for the name of a set."""
    kind, _, file = source.partition(":")
    return (kind, file) if file and kind in FORMATS else None


def labels_beside(path: Path) -> Path | None:
    """The idx file of the labels that belongs to one of images, if it is there."""
    beside = path.with_name(re.sub(r"images([-.])idx3", r"labels\1idx1", path.name))
    return beside if beside != path and beside.is_file() else None


def image_files(folder: Path) -> list[str]:
    """Names below the folder, links followed; ``OSError`` where a part of it cannot be listed."""

    def refuse(error: OSError) -> None:
        raise error

    names, seen = [], set()
    for where, _, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = Path(where).resolve()
        if real in seen:  # a link back up would give every image again and again
            raise InputError(
                f"the image folder {folder} leads to {real} twice, once as {where}; remove a link"
            )
        seen.add(real)
        below = PurePath(where).relative_to(folder).as_posix()
        names += [file if below == "." else f"{below}/{file}" for file in files]
    return sorted(filter(is_image, names))


def is_image(name: str) -> bool:
    """Whether a file of that name, below a folder or in an archive, is an image of the set."""
    # Checkpoints of notebooks, thumbnails and macOS's companions are no images of the set.
    hidden = "/." in f"/{name}" or name.startswith("__MACOSX/")
    return name.lower().endswith(SUFFIXES) and not hidden
