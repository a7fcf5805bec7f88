"""Reference sets of metrics: features of a data set, or EDM's .npz of statistics.

n images, C channels, H x W pixels, d features.
"""

import contextlib
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bdense.data.datasets import Dataset
from bdense.data.names import split_format
from bdense.errors import CheckpointError, InputError, NonFiniteError, ShapeError
from bdense.execution import exact_products
from bdense.files import (
    atomic_write,
    file_lock,
    require_cache,
    require_no_page,
    sha256_file,
    unpacked_bound,
)
from bdense.metrics.extractors import Extractor
from bdense.models.store import load_tensors, save_tensors

# EDM's keys; its fid.py ignores all others.
_MU, _SIGMA = "mu", "sigma"
# Our keys beside them: what the statistics were computed from.
_COUNT, _DATA, _EXTRACTOR, _EXTRACTOR_SHA256 = "count", "data", "extractor", "extractor_sha256"
_IMAGE_SHAPE = "image_shape"
_FEATURES = "features"
# Summed at a time: 2048 features of them take 128 MB in float64.
_ROWS = 8192
# Of a file's sigma, relative to its largest entry: some are stored in float32.
_ROUNDING = 1e-5
# What numpy and zipfile raise for damaged or foreign archives.
_UNREADABLE = (
    *(OSError, ValueError, KeyError, EOFError, NotImplementedError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error),
)

FEATURES_BATCH = 256  # images at a time; affects the features only by rounding


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean and covariance of the features of a set of images.

    Attributes:
        mu: [d] float64.
        sigma: [d, d] float64, unbiased covariance.
        count: n, number of images; None if a file does not have it.
    """

    mu: NDArray[np.float64]
    sigma: NDArray[np.float64]
    count: int | None

    def __post_init__(self) -> None:
        d = self.mu.size
        if d < 1 or self.mu.shape != (d,) or self.sigma.shape != (d, d):
            raise ShapeError(
                f"statistics need mu [d] and sigma [d, d], got {list(self.mu.shape)} and "
                f"{list(self.sigma.shape)}"
            )
        if not (np.isfinite(self.mu).all() and np.isfinite(self.sigma).all()):
            whose = "" if self.count is None else f" of {self.count} images"
            raise NonFiniteError(f"the features{whose} are not finite")

    def require_covariance(self) -> None:
        """Raise a ShapeError if sigma is not symmetric and positive semi-definite to rounding."""
        size = np.abs(self.sigma).max()
        if np.abs(self.sigma - self.sigma.T).max() > _ROUNDING * size:
            raise ShapeError("sigma is not a covariance: it is not symmetric")
        least = np.linalg.eigvalsh(self.sigma)[0]
        if least < -_ROUNDING * len(self.sigma) * size:
            raise ShapeError(
                f"sigma is not a covariance: its least eigenvalue is {least:.3g}, below 0"
            )


@dataclass(frozen=True, eq=False, kw_only=True)
class Reference:
    """A reference set as an extractor sees it.

    Attributes:
        name: The data set's; sets of files and statistics files add the start of a hash.
        statistics: For the Frechet distance.
        features: [n, d] float32, for KID, precision and recall; None if not asked for or not in
            the file.
        image_shape: (C, H, W) of its images; None for a file that does not say.
        data_sha256: Digest of its pixels; None for a file, whose name has its digest.
    """

    name: str
    statistics: Statistics
    features: Tensor | None = None
    image_shape: tuple[int, ...] | None = None
    data_sha256: str | None = None


def features_of(
    images: Tensor,
    extractor: Extractor,
    on_image: Callable[[int], None] | None = None,
) -> Tensor:
    """Features of images [n, C, H, W] uint8, C = 1 or 3, n >= 2: [n, d] float32 on the CPU.

    Args:
        on_image: Called with the number of images done.

    Raises:
        InputError: There are fewer than 2 images, or the extractor does not accept them.
    """
    if len(images) < 2:
        raise too_few(len(images))
    features, seen = [], 0
    for part in torch.split(images, FEATURES_BATCH):
        # In float32, whatever precision the student was computed in.
        with exact_products():
            features.append(extractor(part))
        seen += len(part)
        if on_image is not None:
            on_image(seen)
    return torch.cat(features)


def statistics_of(features: Tensor, device: torch.device | None = None) -> Statistics:
    """Mean and unbiased covariance over the n >= 2 rows of ``features`` [n, d], in float64.

    On a GPU they are sums there. On a CPU they are numpy's, which knows that the product of a
    matrix with itself is symmetric and takes half the time of torch's.

    Args:
        features: On the CPU.
        device: Where to compute; None is the CPU.

    Raises:
        InputError: There are fewer than 2 rows.
        NonFiniteError: The features are not finite.
    """
    from torch_fidelity.metric_fid import fid_features_to_statistics

    if len(features) < 2:
        raise too_few(len(features))
    if device is not None and device.type == "cuda":
        return Statistics(*summed_statistics(features, device), len(features))
    found = fid_features_to_statistics(features.double())
    # numpy gives the covariance of a single feature without its two dimensions.
    return Statistics(found["mu"], np.atleast_2d(found["sigma"]), len(features))


def blocks(features: Tensor, device: torch.device) -> Iterator[Tensor]:
    """``features`` [n, d] in float64 on a device, some rows at a time."""
    for part in torch.split(features, _ROWS):
        yield part.to(device).double()


def summed_statistics(
    features: Tensor, device: torch.device
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and unbiased covariance as sums on a device, in float64.

    In two passes, of which the second sums what differs from the mean: a large mean costs no
    digits.
    """
    d = features.shape[1]
    mean = torch.zeros(d, dtype=torch.float64, device=device)
    for block in blocks(features, device):
        mean += block.sum(0) / len(features)
    products = torch.zeros(d, d, dtype=torch.float64, device=device)
    for block in blocks(features, device):
        centred = block - mean
        products.addmm_(centred.T, centred)
    return mean.cpu().numpy(), (products / (len(features) - 1)).cpu().numpy()


def dataset_reference(
    dataset: Dataset, extractor: Extractor, *, cache: Path, with_features: bool = False
) -> Reference:
    """A whole data set as reference, cached by its pixels and the extractor's weights.

    ``with_features`` loads the features too; they are cached in any case.

    Raises:
        CheckpointError: A cached file cannot be read.
        InputError: The cache cannot be written.
    """
    name = f"{dataset.name}-{dataset.sha256[:16]}-{extractor.sha256[:16]}"
    statistics_path = Path(cache) / "statistics" / f"{name}.npz"
    features_path = Path(cache) / "features" / f"{name}.safetensors"
    require_cache(Path(cache))
    with file_lock(statistics_path.with_suffix(".lock")):
        have_statistics, have_features = statistics_path.exists(), features_path.exists()
        if not have_statistics or (with_features and not have_features):
            made = features_of(dataset.images, extractor)
            facts = {"kind": "features", **_facts(dataset.name, extractor)}
            # Statistics are written last: if they exist, so do the features.
            save_tensors(features_path, {_FEATURES: made}, facts)
            if not have_statistics:
                found = statistics_of(made, extractor.device)
                write_reference(statistics_path, found, dataset.name, extractor)
    with _cached("statistics", statistics_path):
        arrays = _read_arrays(statistics_path)
        statistics = _read_statistics(statistics_path, arrays, extractor)
    features = None
    if with_features:
        with _cached("features", features_path):
            features = load_tensors(features_path)[0].get(_FEATURES)
            expected = (statistics.count, statistics.mu.size)
            if features is None or features.shape != expected:
                raise CheckpointError(f"not of shape {list(expected)}")
    # A set of files is named by its last folder only, which others may share.
    own = f":{dataset.sha256[:16]}" if split_format(dataset.name) else ""
    return Reference(
        name=dataset.name + own,
        statistics=statistics,
        features=features,
        image_shape=tuple(dataset.images.shape[1:]),
        data_sha256=dataset.sha256,
    )


def write_reference(
    path: Path,
    statistics: Statistics,
    data: str,
    extractor: Extractor,
    image_shape: Sequence[int] | None = None,
) -> None:
    """Write statistics as EDM's .npz (mu, sigma), with count, data set and extractor added.

    NVlabs' fid.py reads it too. ``data`` is the name of the data set, ``image_shape`` (C, H, W) of
    its images, if they have one.
    """
    members: dict[str, Any] = {_MU: statistics.mu, _SIGMA: statistics.sigma}
    members |= _facts(data, extractor)
    if statistics.count is not None:
        members[_COUNT] = statistics.count
    if image_shape is not None:
        members[_IMAGE_SHAPE] = np.array(image_shape)
    with atomic_write(path) as scratch, scratch.open("wb") as file:
        np.savez(file, **members)


def no_statistics(path: Path, data: str | None = None, extractor: Extractor | None = None) -> str:
    """Why an existing file is not what ``write_reference`` writes; "" if it is.

    ``data`` and ``extractor``, if given, must be those that it was made of.
    """
    try:
        found = _read_arrays(path)
    except InputError:
        return "holds no reference statistics"
    made = [str(found.get(key, "")) for key in (_DATA, _EXTRACTOR_SHA256)]
    if data is None or extractor is None or made == [data, extractor.sha256]:
        return ""
    return "holds the statistics of another data set or extractor"


def read_reference(path: Path, extractor: Extractor) -> Reference:
    """Statistics from a file, ours or one of EDM's fid-refs, of features by ``extractor``.

    EDM's files hold statistics of Inception features, but neither that nor the number of images.
    So their extractor is not checked, and the count stays unknown.

    Raises:
        CheckpointError: The file is missing, cut short, or holds something else.
        InputError: It was made with another extractor.
        ShapeError: It has another number of features.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no reference file at {path}")
    arrays = _read_arrays(path)
    statistics, found = _read_statistics(path, arrays, extractor), arrays.get(_IMAGE_SHAPE)
    if found is not None and (found.shape != (3,) or found.dtype.kind not in "iu"):
        raise CheckpointError(f"{_IMAGE_SHAPE!r} in {path} is not a shape; make the file again")
    return Reference(
        name=f"{path.name}:{sha256_file(path)[:16]}",
        statistics=statistics,
        image_shape=None if found is None else tuple(found.tolist()),
    )


def _facts(data: str, extractor: Extractor) -> dict[str, str]:
    return {_DATA: data, _EXTRACTOR: extractor.name, _EXTRACTOR_SHA256: extractor.sha256}


def _read_statistics(
    path: Path, found: Mapping[str, NDArray[Any]], extractor: Extractor
) -> Statistics:
    for key in (_MU, _SIGMA):
        if found[key].dtype.kind != "f":
            raise CheckpointError(
                f"{key!r} in {path} is not an array of floats; make the file again"
            )
    count = found.get(_COUNT)
    if count is not None and (count.shape != () or count.dtype.kind not in "iu" or count < 1):
        raise CheckpointError(
            f"{_COUNT!r} in {path} is not a number of images; make the file again"
        )
    theirs = {key: str(found.get(key, "")) for key in (_EXTRACTOR, _EXTRACTOR_SHA256)}
    if theirs[_EXTRACTOR_SHA256] not in ("", extractor.sha256):
        raise InputError(
            f"{path} was made with extractor {theirs[_EXTRACTOR]} (weights "
            f"{theirs[_EXTRACTOR_SHA256][:16]}), not with {extractor.name} (weights "
            f"{extractor.sha256[:16]}); use that extractor, or make a file for this one with "
            "`bdense reference`"
        )
    try:
        statistics = Statistics(
            found[_MU].astype(np.float64),
            found[_SIGMA].astype(np.float64),
            None if count is None else int(count),
        )
        statistics.require_covariance()
    except (ShapeError, NonFiniteError) as error:
        raise CheckpointError(f"{path}: {error}; make the file again") from error
    if statistics.mu.size != extractor.dim:
        raise ShapeError(
            f"{path} holds statistics of {statistics.mu.size} features, but extractor "
            f"{extractor.name} gives {extractor.dim}; use the extractor that the file was made "
            "with (EDM's fid-refs: inception)"
        )
    return statistics


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The known arrays of an .npz by key; nothing in it is unpickled."""
    if not zipfile.is_zipfile(path):
        require_no_page(path)
        # numpy's own message would call it a pickle.
        raise CheckpointError(
            f"{path} cannot be read as .npz (it is cut short, or another kind of file); give "
            "EDM's .npz with mu and sigma, as `bdense reference` writes it"
        )
    try:
        bound = unpacked_bound(path.stat().st_size)
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > bound:
                raise CheckpointError(f"{path} unpacks to more than {bound} bytes; make it again")
        with np.load(path, allow_pickle=False) as found:
            missing = [key for key in (_MU, _SIGMA) if key not in found.files]
            known = (_MU, _SIGMA, _COUNT, _DATA, _IMAGE_SHAPE, _EXTRACTOR, _EXTRACTOR_SHA256)
            members = {key: found[key] for key in known if key in found.files}
            others = ", ".join(found.files) or "nothing"
    except _UNREADABLE as error:
        raise CheckpointError(f"{path} cannot be read as .npz ({error})") from error
    if missing:
        raise CheckpointError(
            f"{path} has no {' and no '.join(missing)} (it holds {others}); a reference is EDM's "
            ".npz with mu and sigma, as `bdense reference` writes it"
        )
    # numpy returns bytes for a member that is not an array.
    if not all(isinstance(member, np.ndarray) for member in members.values()):
        raise CheckpointError(f"{path} cannot be read as .npz (it holds no arrays)")
    return members


@contextlib.contextmanager
def _cached(what: str, path: Path) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise CheckpointError(
            f"cached {what} {path} cannot be read ({error}); delete the file to have it made again"
        ) from error


def too_few(count: int) -> InputError:
    """The error for too few images to have a covariance."""
    return InputError(
        f"a Frechet distance needs at least 2 images, got {count}; raise the number of images"
    )
