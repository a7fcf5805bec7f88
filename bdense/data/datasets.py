"""Image sets, as bytes: training sets of teachers and reference sets of metrics.

A string names a set: ``NAME`` or ``FORMAT:PATH``, either followed by ``@SIDE`` to pad.
n images, C channels, H x W pixels.
"""

import contextlib
import hashlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bdense.data.names import DATA_SETS, Fit, split_fit, split_format
from bdense.data.readers import cropped_arrays, read_folder, read_idx_images, read_zip
from bdense.downloads import fetch
from bdense.errors import InputError, ShapeError, did_you_mean
from bdense.execution import kept_on, taken
from bdense.files import file_lock, require_no_page, require_no_pipe, user_folder

DATA_FOLDER = "BDENSE_DATA"
Loaded: TypeAlias = tuple[Tensor, Tensor | None]

_CIFAR10_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
_FASHION_MNIST_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
# sha256 of the files of images and of labels.
_FASHION_MNIST = {
    "train": (
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    ),
    "t10k": (
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    ),
}


@dataclass(frozen=True, eq=False)
class Dataset:
    """A named set of images.

    Attributes:
        name: The user's name for it, such as ``digits`` or ``fashion-mnist@32``.
        images: [n, C, H, W] uint8.
        sha256: Hex digest of the shape and the pixels.
        labels: [n] int64 classes counted from 0; None without labels.

    Raises:
        ShapeError: Images or labels have another type or shape.
    """

    name: str
    images: Tensor
    sha256: str
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.dim() != 4:
            raise ShapeError(
                f"data set {self.name!r} has images of {self.images.dtype} and shape "
                f"{list(self.images.shape)}; give uint8 [n, C, H, W]"
            )
        labels, n = self.labels, len(self.images)
        if labels is not None and (labels.dtype != torch.int64 or labels.shape != (n,)):
            raise ShapeError(
                f"data set {self.name!r} has {n} images and labels of {labels.dtype} and shape "
                f"{list(labels.shape)}; give one int64 label for each image"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of what a network learns from."""
        return tuple(self.images.shape[1:])

    def pixels(self, index: Tensor) -> Tensor:
        """[B, C, H, W] uint8, the images of these indices [B]; on the device that has them."""
        return taken(self.images, index)

    def clean(self, index: Tensor) -> Tensor:
        """[B, C, H, W] float32 that a network learns from, of the images [B]."""
        return to_float(self.pixels(index))

    def on(self, device: torch.device) -> Self:
        """The set with its images on that device, see ``kept_on``."""
        return replace(self, images=kept_on(self.images, device))

    @property
    def num_classes(self) -> int:
        """Highest label + 1; 0 without labels."""
        return 0 if self.labels is None else int(self.labels.max()) + 1

    @property
    def labels_sha256(self) -> str:
        """Hex digest of the labels, which ``sha256`` does not cover; empty without labels."""
        return "" if self.labels is None else _sha256(self.labels)

    def require_labels(self, label_dim: int) -> Tensor:
        """[n] int64 labels, all below ``label_dim``.

        Raises:
            InputError: The set has no labels, or more classes than ``label_dim``.
        """
        if self.labels is None:
            raise InputError(
                f"data set {self.name!r} has no labels, but a network with label_dim={label_dim} "
                "needs them; choose a labelled set or an unconditional network (label_dim 0)"
            )
        if self.num_classes > label_dim:
            raise InputError(
                f"data set {self.name!r} has {self.num_classes} classes and the network "
                f"label_dim={label_dim}; set label_dim to {self.num_classes}"
            )
        return self.labels


def load_dataset(spec: str) -> Dataset:
    """Load a data set.

    Args:
        spec: A name (``digits``: the 1797 digits inside scikit-learn; ``cifar10``,
            ``cifar10-test``, ``fashion-mnist``, ``fashion-mnist-test``: under $BDENSE_DATA,
            downloaded if missing), or a format and a path: ``folder:DIR`` (image
            files, labels from ``dataset.json`` or from sub-folders), ``zip:FILE`` (EDM's data set
            archives), ``idx:FILE`` (images in MNIST's format). ``@SIDE`` at the end pads every
            image with black to SIDE x SIDE, as in ``fashion-mnist@32``; an odd pixel goes to the
            right or bottom. ``@cropSIDE``, as in ``folder:photos@crop64``, takes the largest
            square at the centre and resizes it by Pillow's LANCZOS filter, as ``center-crop`` of
            EDM's dataset_tool.py does; turned photos are put upright before, and grey images
            among colour ones become RGB.

    Raises:
        InputError: There is no such data set, or its files are missing, damaged, empty or mixed.
    """
    source, fit = split_fit(spec)
    name, images, labels = _load(source, fit)
    if fit is not None:
        if not fit.crop:
            images = _padded(name, images, fit.side)
        name = f"{name}@{fit}"
    return Dataset(name, images, _sha256(images), labels)


def image_shape(spec: str) -> tuple[int, int, int]:
    """(C, H, W) of a data set; of files only the first image is read, if that settles it.

    Raises:
        InputError: As ``load_dataset``, but for what is wrong with other images.
    """
    source, fit = split_fit(spec)
    named = _NAMED.get(source)
    shape = named[0] if named is not None else _load(source, fit, only_first=True)[1].shape[1:]
    channels, height, width = shape
    if named is None and fit is not None and fit.crop and channels == 1:
        channels = _load(source, fit)[1].shape[1]  # colour among grey images makes all RGB
    if fit is None:
        return channels, height, width
    if not fit.crop:
        _require_room(source, fit.side, height, width)
    return channels, fit.side, fit.side


def to_float(images: Tensor) -> Tensor:
    """float32 in [-1, 1] of uint8 images of any shape: byte 0 is -1, byte 255 is 1."""
    # By a plain number a GPU would multiply by its inverse, which rounds otherwise.
    half = torch.full((), 127.5, device=images.device)
    return images.float().div_(half).sub_(1)


def data_folder() -> Path:
    """$BDENSE_DATA, or a folder of the user's cache."""
    return user_folder(DATA_FOLDER, "data")


def _load(
    source: str, fit: Fit | None, *, only_first: bool = False
) -> tuple[str, Tensor, Tensor | None]:
    """Name, images, cropped but not padded, and labels; the name holds no path of this machine."""
    crop = fit.side if fit is not None and fit.crop else None
    if (found := split_format(source)) is not None:
        kind, path = found[0], Path(os.path.expanduser(found[1]))
        require_no_pipe(path)
        if path.is_file():
            require_no_page(path)
        images, labels = _FORMATS[kind](path, crop, only_first)
        # The name of a set of files is the last part of its path.
        return f"{kind}:{path.resolve().name}", images, labels
    if source in _NAMED:
        images, labels = _NAMED[source][1]()
        return source, images if crop is None else cropped_arrays(images, crop), labels
    is_folder = source != "" and Path(os.path.expanduser(source)).is_dir()
    hint = f"; did you mean folder:{source}?" if is_folder else did_you_mean(source, _NAMED)
    raise InputError(f"unknown data set {source!r}; known are {DATA_SETS}{hint}")


def _padded(name: str, images: Tensor, side: int) -> Tensor:
    height, width = images.shape[2:]
    _require_room(name, side, height, width)
    left, top = (side - width) // 2, (side - height) // 2
    if side == height == width:
        return images
    return F.pad(images, (left, side - width - left, top, side - height - top))


def _require_room(name: str, side: int, height: int, width: int) -> None:
    if side < max(height, width):
        raise InputError(
            f"data set {name}@{side}: its images are larger, {height} x {width} pixels; choose a "
            f"side of at least {max(height, width)}"
        )


def _sha256(array: Tensor) -> str:
    """Hex digest of the shape and the values."""
    digest = hashlib.sha256(f"{list(array.shape)}".encode())
    # Hash the array itself: a copy of a large set may not fit into memory.
    digest.update(array.contiguous().numpy().data)
    return digest.hexdigest()


def _digits() -> Loaded:
    """As scikit-learn's ``load_digits``, without importing scikit-learn, which takes a second."""
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None:
        raise InputError("data digits are a file of scikit-learn; install scikit-learn")
    path = Path(found.origin).with_name("datasets") / "data" / "digits.csv.gz"
    rows = torch.from_numpy(np.loadtxt(path, delimiter=","))  # [1797, 64 + 1], ink 0..16, label
    images = (rows[:, :-1] / 16 * 255).round().to(torch.uint8).reshape(-1, 1, 8, 8)
    return images, rows[:, -1].long()


def _cifar10(*, train: bool) -> Loaded:
    """The official pickles; torchvision opens them only if their MD5 is the published one."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import extract_archive

    root = data_folder()

    def read() -> Loaded:
        found = CIFAR10(root, train)
        images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
        return images, torch.tensor(found.targets)

    try:
        return read()
    except RuntimeError:  # a file is missing or incomplete
        archive = _fetched("CIFAR-10", root / CIFAR10.filename, CIFAR10.url, _CIFAR10_SHA256)
    with file_lock(root / ".cifar-10.lock"):
        with contextlib.suppress(RuntimeError):
            return read()  # another process unpacked it in the meantime
        extract_archive(archive, root)
        return read()


def _fashion_mnist(part: str) -> Loaded:
    folder = data_folder() / "fashion-mnist"
    names = (f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz")
    images, _ = (
        _fetched("Fashion-MNIST", folder / name, _FASHION_MNIST_URL + name, sha256)
        for name, sha256 in zip(names, _FASHION_MNIST[part], strict=True)
    )
    return read_idx_images(images, None, False)  # with the labels beside them


def _fetched(title: str, path: Path, url: str, sha256: str) -> Path:
    """The published file at ``path``, downloaded if missing."""
    try:
        return fetch(url, path, what=f"{title}'s {path.name}", sha256=sha256)
    except InputError as error:
        raise InputError(
            f"{title} is missing or incomplete in {path.parent}: {error}; or set {DATA_FOLDER}, "
            f"now {data_folder()}, to the folder that has it"
        ) from error


# (C, H, W), and what returns [n, C, H, W] uint8 images and [n] labels.
_NAMED: dict[str, tuple[tuple[int, int, int], Callable[[], Loaded]]] = {
    "digits": ((1, 8, 8), _digits),
    "cifar10": ((3, 32, 32), lambda: _cifar10(train=True)),
    "cifar10-test": ((3, 32, 32), lambda: _cifar10(train=False)),
    "fashion-mnist": ((1, 28, 28), lambda: _fashion_mnist("train")),
    "fashion-mnist-test": ((1, 28, 28), lambda: _fashion_mnist("t10k")),
}
# Of the path, the side to crop to, and whether one image is enough.
_FORMATS: dict[str, Callable[[Path, int | None, bool], Loaded]] = {
    "folder": read_folder,
    "zip": read_zip,
    "idx": read_idx_images,
}
