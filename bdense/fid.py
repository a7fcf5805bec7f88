"""Frechet distance of images to a reference set, by torch-fidelity, with its conditions.

n images, C channels, H x W pixels, d features. Formula: Heusel et al. 2017 (arXiv 1706.08500),
|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), S the unbiased covariance.
"""

import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bdense.data import Dataset
from bdense.errors import CheckpointError, InputError, NonFiniteError, ShapeError
from bdense.extractors import Extractor
from bdense.files import atomic_write, file_lock


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean and covariance of the features of a set of images.

    Attributes:
        mu: [d] float64.
        sigma: [d, d] float64, unbiased covariance.
        count: n, images they were taken over.
    """

    mu: NDArray[np.float64]
    sigma: NDArray[np.float64]
    count: int

    def __post_init__(self) -> None:
        d = self.mu.size
        if self.mu.shape != (d,) or self.sigma.shape != (d, d):
            raise ShapeError(
                f"statistics need mu [d] and sigma [d, d], got {list(self.mu.shape)} and "
                f"{list(self.sigma.shape)}"
            )
        if not (np.isfinite(self.mu).all() and np.isfinite(self.sigma).all()):
            raise NonFiniteError(f"the features of {self.count} images are not finite")


@dataclass(frozen=True, kw_only=True)
class FID:
    """A Frechet distance and everything it depends on; without them it means nothing.

    Attributes:
        value: The distance; 0 for equal statistics.
        images: Images generated.
        reference: Name of the reference set.
        reference_images: Images in it.
        extractor: Name of the feature network; only ``inception`` gives what papers call FID.
        extractor_sha256: Hex digest of its weights.
        nfe: Network evaluations an image cost.
        seeds: By name, such as ``training`` and ``evaluation``.
    """

    value: float
    images: int
    reference: str
    reference_images: int
    extractor: str
    extractor_sha256: str
    nfe: int
    seeds: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: the value and its conditions."""
        return asdict(self)

    def conditions(self) -> dict[str, Any]:
        """All but the value: what must agree for two distances to be compared."""
        conditions = asdict(self)
        del conditions["value"]
        return conditions

    def require_comparable(self, other: "FID") -> None:
        """Make sure that the two differ in nothing but the images' quality.

        Raises:
            InputError: They were measured under other conditions; the message names each.
        """
        theirs = other.conditions()
        differing = [
            f"{name}: {mine} against {theirs[name]}"
            for name, mine in self.conditions().items()
            if mine != theirs[name]
        ]
        if differing:
            raise InputError(
                f"these FIDs are not comparable ({'; '.join(differing)}); measure both alike"
            )


def feature_statistics(images: Tensor, extractor: Extractor, batch: int = 256) -> Statistics:
    """Mean and covariance of the images' features, in float64.

    Args:
        images: [n, C, H, W] uint8, C = 1 or 3, n >= 2.
        extractor: Feature network.
        batch: Images at a time; the result depends on it by rounding only.

    Raises:
        InputError: Fewer than 2 images, or images the extractor cannot take.
        NonFiniteError: The features are not finite.
    """
    if batch < 1:
        raise InputError(f"batch must be at least 1, got {batch}")
    if len(images) < 2:
        raise _too_few(len(images))
    return statistics_of(torch.cat([extractor(part) for part in torch.split(images, batch)]))


def statistics_of(features: Tensor) -> Statistics:
    """Mean and unbiased covariance over the n >= 2 rows of ``features`` [n, d], in float64.

    Raises:
        InputError: There are fewer than 2 rows.
        NonFiniteError: The features are not finite.
    """
    from torch_fidelity.metric_fid import fid_features_to_statistics

    if len(features) < 2:
        raise _too_few(len(features))
    found = fid_features_to_statistics(features.double())
    # numpy gives the covariance of a single feature without its two dimensions.
    return Statistics(found["mu"], np.atleast_2d(found["sigma"]), len(features))


def _too_few(count: int) -> InputError:
    return InputError(
        f"a Frechet distance needs at least 2 images, got {count}; raise the number of images"
    )


def reference_statistics(dataset: Dataset, extractor: Extractor, *, cache: Path) -> Statistics:
    """Statistics of a whole data set, computed once for these pixels and this extractor.

    Raises:
        CheckpointError: The cached file cannot be read.
    """
    name = f"{dataset.name}-{dataset.sha256[:16]}-{extractor.sha256[:16]}"
    path = Path(cache) / "statistics" / f"{name}.npz"
    with file_lock(path.with_suffix(".lock")):
        if not path.exists():
            _save(path, feature_statistics(dataset.images, extractor))
    return _load(path)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Frechet distance of two Gaussians; symmetric, 0 for equal ones.

    Raises:
        ShapeError: The two come from extractors with another number of features.
        NonFiniteError: The distance is not finite.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    if a.mu.shape != b.mu.shape:
        raise ShapeError(
            f"statistics over {a.mu.size} and {b.mu.size} features cannot be compared; use one "
            "extractor for both"
        )
    pair = ({"mu": each.mu, "sigma": each.sigma} for each in (a, b))
    value = float(fid_statistics_to_metric(*pair, verbose=False)[KEY_METRIC_FID])
    if not np.isfinite(value):
        raise NonFiniteError(f"the Frechet distance is {value}")
    return value


def _save(path: Path, statistics: Statistics) -> None:
    with atomic_write(path) as scratch, scratch.open("wb") as file:
        np.savez(file, mu=statistics.mu, sigma=statistics.sigma, count=statistics.count)


def _load(path: Path) -> Statistics:
    try:
        with np.load(path) as found:
            return Statistics(found["mu"], found["sigma"], int(found["count"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"cached statistics {path} cannot be read ({error}); delete the file, and it is made "
            "again"
        ) from error
