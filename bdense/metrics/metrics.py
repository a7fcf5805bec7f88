"""Metrics of generated images by torch-fidelity, in one pass, each with its conditions.

FID: Heusel et al. 2017 (arXiv 1706.08500), |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), S
the unbiased covariance. KID: Binkowski et al. 2018 (arXiv 1801.01401), the unbiased MMD^2 of
subsets under the kernel (x . y / d + 1)^3. Precision, recall: Kynkaanniemi et al. 2019 (arXiv
1904.06991), the share of one set inside the balls that reach from each image of the other to its
k-th neighbour. d features.
"""

import functools
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bdense.errors import InputError, NonFiniteError, ShapeError
from bdense.metrics.clip_score import CLIPScorer
from bdense.metrics.extractors import Extractor
from bdense.metrics.records import FID, KID, Metrics, PrecisionRecall, PromptFile
from bdense.metrics.references import (
    Reference,
    Statistics,
    blocks,
    features_of,
    statistics_of,
    too_few,
)
from bdense.metrics.settings import KID_SEED, KID_SUBSETS, METRICS, MetricSettings

# Rows of distances in memory at a time: 2048 x 50,000 distances take 800 MB.
_PRC_ROWS = 2048
# Parts that a record's effects of single images are averaged over.
GROUPS = 32


def measure_images(
    images: Tensor,
    extractor: Extractor,
    reference: Reference,
    *,
    metrics: Collection[str] = ("fid",),
    settings: MetricSettings | None = None,
    nfe: int,
    seeds: dict[str, int],
    prompts: PromptFile | None = None,
    guidance: float = 1.0,
    decoded: str | None = None,
    clip: CLIPScorer | None = None,
    on_image: Callable[[int], None] | None = None,
) -> Metrics:
    """Measure images against a reference, in one pass of the extractor.

    Args:
        images: [n, C, H, W] uint8, C = 1 or 3, n >= 2.
        extractor: Feature network, which the reference was made with too.
        metrics: Metrics to measure beside the FID.
        settings: Of KID and precision/recall; None for the defaults.
        nfe: Network evaluations per image.
        seeds: The images' seeds by name.
        prompts, guidance, decoded: How the images were drawn, for the record; see ``FID`` and
            ``drawn_with``.
        clip: Scores them against their prompts, too; None does not.
        on_image: Called with the number of images done.

    Raises:
        InputError: As ``require_measurable``, or the extractor does not accept the images.
        NonFiniteError: Features or a distance are not finite.
    """
    settings = settings or MetricSettings()
    shape = tuple(images.shape[1:])
    require_measurable(metrics, settings, len(images), reference, shape)
    features = features_of(images, extractor, on_image=on_image)
    conditions: dict[str, Any] = {
        "images": len(images),
        "reference": reference.name,
        "reference_images": reference.statistics.count,
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "nfe": nfe,
        "seeds": seeds,
    }
    own = statistics_of(features, extractor.device)
    value = frechet_distance(own, reference.statistics)
    effects = image_effects(features, own, reference.statistics, extractor.device)
    noise = float(effects.std(ddof=1)) / len(effects) ** 0.5
    fid = FID(
        value=value,
        noise=noise,
        effects=grouped_effects(effects),
        prompts=prompts,
        guidance=None if guidance == 1 else guidance,
        decoded=decoded,
        **conditions,
    )
    kid = prc = None
    if "kid" in metrics:
        assert reference.features is not None
        size = settings.kid_subset_size
        mean, std = kernel_distance(
            features, reference.features, subsets=KID_SUBSETS, subset_size=size, seed=KID_SEED
        )
        kid = KID(
            mean=mean,
            std=std,
            subsets=KID_SUBSETS,
            subset_size=size,
            subset_seed=KID_SEED,
            **conditions,
        )
    if "prc" in metrics:
        assert reference.features is not None
        precision, recall = precision_recall(features, reference.features, settings.neighbours)
        prc = PrecisionRecall(
            precision=precision, recall=recall, neighbours=settings.neighbours, **conditions
        )
    score = None if clip is None else clip.measure(images, nfe=nfe, seeds=seeds, on_image=on_image)
    return Metrics(fid=fid, kid=kid, prc=prc, clip_score=score)


def require_measurable(
    metrics: Collection[str],
    settings: MetricSettings,
    images: int,
    reference: Reference,
    image_shape: tuple[int, ...],
    extractor: Extractor | None = None,
) -> None:
    """Check, before images are drawn, that the metrics can be measured.

    Args:
        metrics: Metrics to measure beside the FID.
        image_shape: (C, H, W) of them.
        extractor: Tried on two black images; None is not tried.
    """
    require_enough(metrics, settings, images)
    single = _single(metrics)
    if single and reference.features is None:
        raise InputError(
            f"{' and '.join(single)} need the features of single reference images, but "
            f"{reference.name} holds only their mean and covariance; name the data set instead, "
            "or measure only fid"
        )
    if single:  # a reference with features has a count
        require_enough(metrics, settings, reference.statistics.count or 0, "reference ")
    if reference.image_shape not in (None, image_shape):
        own, theirs = (
            " x ".join(map(str, shape)) for shape in (image_shape, reference.image_shape or ())
        )
        raise ShapeError(
            f"images of {own} (channels, height, width) cannot be compared with {reference.name}, "
            f"whose images are {theirs}; choose the data set that the model was trained on, with "
            "the same padding"
        )
    if extractor is not None:
        extractor(torch.zeros(2, *image_shape, dtype=torch.uint8))


def require_enough(
    metrics: Collection[str], settings: MetricSettings, images: int, whose: str = ""
) -> None:
    """Check that there are enough images for the metrics; ``whose``, for people."""
    unknown = sorted(set(metrics) - set(METRICS))
    if unknown:
        raise InputError(f"unknown metric {unknown[0]!r}; known are {', '.join(METRICS)}")
    if images < 2:
        raise too_few(images)
    needs = {
        "kid": (settings.kid_subset_size, "the KID's subset size"),
        "prc": (settings.neighbours + 1, "the number of neighbours"),
    }
    for name in _single(metrics):
        least, knob = needs[name]
        if images < least:
            raise InputError(
                f"{name} needs at least {least} {whose}images, got {images}; take more, lower "
                f"{knob}, or leave {name} out"
            )


def _single(metrics: Collection[str]) -> list[str]:
    """Those that need the features of single images."""
    return [name for name in METRICS if name in metrics and name != "fid"]


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Frechet distance of two Gaussians: 0 or above, and to the bit the same for (b, a).

    Raises:
        ShapeError: The numbers of features differ.
        NonFiniteError: The distance is not finite.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    if a.mu.shape != b.mu.shape:
        raise ShapeError(
            f"statistics over {a.mu.size} and {b.mu.size} features cannot be compared; use the "
            "same extractor for both"
        )
    # Rounding depends on the order.
    pair = ({"mu": each.mu, "sigma": each.sigma} for each in sorted((a, b), key=_order))
    value = float(fid_statistics_to_metric(*pair, verbose=False)[KEY_METRIC_FID])
    if not np.isfinite(value):
        raise NonFiniteError(f"the Frechet distance is {value}")
    return max(value, 0.0)  # equal statistics are some rounding apart


def _order(statistics: Statistics) -> tuple[int, list[float], bytes]:
    """More images first."""
    return -(statistics.count or 0), statistics.mu.tolist(), statistics.sigma.tobytes()


def image_effects(
    features: Tensor,
    own: Statistics,
    reference: Statistics,
    device: torch.device | None = None,
) -> NDArray[np.float64]:
    """What each image adds to the Frechet distance: its influence function, of mean 0.

    The distance moves by the mean of the effects where other images are drawn (delta method), so
    that their standard deviation / sqrt(n) is the standard error of the distance, and that of two
    students' differences the standard error of the difference, if they share latents.

    Args:
        features: [n, d].
        device: Where to compute, see ``statistics_of``.

    Returns:
        [n]: 2 (mu - m) . x + x' G x, x an image's features less their mean mu, G the gradient of
        tr(S - 2 (R^(1/2) S R^(1/2))^(1/2)) with respect to S; m, R are the reference's.
    """
    root = _root(reference)
    slope = np.eye(len(root)) - root @ _power(root @ own.sigma @ root, -0.5) @ root
    if device is not None and device.type == "cuda":
        linear = 2 * (own.mu - reference.mu)
        effects = summed_effects(features, own.mu, linear, slope, device)
    else:
        centred = features.double().numpy() - own.mu
        effects = 2 * centred @ (own.mu - reference.mu)
        effects += np.einsum("ni,ij,nj->n", centred, slope, centred, optimize=True)
    effects -= effects.mean()
    return effects


def summed_effects(
    features: Tensor,
    mu: NDArray[np.float64],
    linear: NDArray[np.float64],
    slope: NDArray[np.float64],
    device: torch.device,
) -> NDArray[np.float64]:
    """[n] linear . x + x' slope x, x an image's features [d] less ``mu``, on a device."""
    at, along, curved = (torch.from_numpy(each).to(device) for each in (mu, linear, slope))
    found = []
    for block in blocks(features, device):
        x = block - at
        found.append(x @ along + ((x @ curved) * x).sum(1))
    effects: NDArray[np.float64] = torch.cat(found).cpu().numpy()
    return effects


def grouped_effects(effects: NDArray[np.float64]) -> list[float]:
    """Mean effect [``GROUPS``] of each run of neighbouring images, for a study's record."""
    groups = np.array_split(effects, min(GROUPS, len(effects)))
    return [float(f"{group.mean():.5g}") for group in groups]


@functools.lru_cache(maxsize=1)
def _root(reference: Statistics) -> NDArray[np.float64]:
    """R^(1/2), kept: all trials of a study are compared with one reference."""
    return _power(reference.sigma, 0.5)


def _power(matrix: NDArray[np.float64], exponent: float) -> NDArray[np.float64]:
    """A power of a covariance on its range; directions without variance stay without."""
    values, vectors = np.linalg.eigh(matrix)
    kept = values > values.max() * len(values) * np.finfo(np.float64).eps
    powers = np.zeros_like(values)
    powers[kept] = values[kept] ** exponent
    found: NDArray[np.float64] = (vectors * powers) @ vectors.T
    return found


def kernel_distance(
    a: Tensor, b: Tensor, *, subsets: int, subset_size: int, seed: int
) -> tuple[float, float]:
    """KID of features [n, d] and [m, d]: mean and standard deviation over the subsets."""
    from torch_fidelity import metric_kid

    # In float64: the estimate is a small difference of large sums of cubes.
    found = metric_kid.kid_features_to_metric(
        a.double(),
        b.double(),
        kid_subsets=subsets,
        kid_subset_size=subset_size,
        kid_kernel="poly",
        kid_kernel_poly_degree=3,
        kid_kernel_poly_gamma=None,  # 1 / d
        kid_kernel_poly_coef0=1,
        rng_seed=seed,
        verbose=False,
    )
    mean, std = found[metric_kid.KEY_METRIC_KID_MEAN], found[metric_kid.KEY_METRIC_KID_STD]
    if not np.isfinite(mean):
        raise NonFiniteError(f"the kernel distance is {mean}")
    return mean, std


def precision_recall(generated: Tensor, real: Tensor, neighbours: int) -> tuple[float, float]:
    """Precision and recall of generated features [n, d] against real ones [m, d]."""
    from torch_fidelity import metric_prc

    # In float64: torch computes distances of many rows from scalar products. In float32 two equal
    # images would be up to some thousandths of their norm apart.
    found = metric_prc.prc_features_to_metric(
        generated.double(),
        real.double(),
        prc_neighborhood=neighbours,
        prc_batch_size=_PRC_ROWS,
        save_cpu_ram=True,
        verbose=False,
    )
    return found[metric_prc.KEY_METRIC_PRECISION], found[metric_prc.KEY_METRIC_RECALL]
