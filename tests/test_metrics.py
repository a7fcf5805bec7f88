"""FID, KID, precision and recall: their formulas, one pass, and the conditions they carry."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bdense.data.datasets import Dataset, load_dataset, to_float
from bdense.diffusion.pictures import to_uint8
from bdense.errors import InputError, NonFiniteError, ShapeError
from bdense.metrics.metrics import (
    FID,
    KID,
    Metrics,
    MetricSettings,
    PrecisionRecall,
    frechet_distance,
    grouped_effects,
    image_effects,
    kernel_distance,
    measure_images,
    precision_recall,
    require_measurable,
    summed_effects,
)
from bdense.metrics.records import PromptFile
from bdense.metrics.references import (
    Reference,
    Statistics,
    dataset_reference,
    features_of,
    statistics_of,
    summed_statistics,
)
from tests.features import CPU, ColourMeans, counting, random_images, scripted
from tests.goldens import discover

# Deprecated, but users have such files.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.:FutureWarning")


def gaussian(mu, sigma, count=100):
    return Statistics(np.array(mu, dtype=np.float64), np.array(sigma, dtype=np.float64), count)


def normal(n, d, seed, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


# ---- the Frechet distance ----


@pytest.mark.golden
@pytest.mark.parametrize("file", discover("fid-formula*.safetensors"))
def test_statistics_and_distance_are_the_reference_s(file):
    golden = load_file(file)
    both = {name: statistics_of(golden[f"features_{name}"]) for name in ("a", "b")}
    for name, found in both.items():
        np.testing.assert_allclose(found.mu, golden[f"mu_{name}"], rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(found.sigma, golden[f"sigma_{name}"], rtol=1e-12, atol=1e-14)
        assert found.count == len(golden[f"features_{name}"])
    assert frechet_distance(both["a"], both["b"]) == pytest.approx(golden["fid"].item(), rel=1e-9)


def test_an_image_s_effect_is_the_distance_s_slope_in_its_weight():
    """An image that counts 1 + e times moves the distance by e * its effect / n."""
    features, reference = normal(40, 3, 0).double(), statistics_of(normal(60, 3, 1, shift=0.5))
    effects = image_effects(features, statistics_of(features), reference)
    assert effects.mean() == pytest.approx(0, abs=1e-12)

    def distance(image, weight):
        weights = np.ones(40)
        weights[image] = weight
        mu = np.average(features, axis=0, weights=weights)
        # As for statistics_of, which divides by n - 1.
        sigma = np.cov(features.T, aweights=weights, ddof=0) * 40 / 39
        return frechet_distance(Statistics(mu, sigma, 40), reference)

    for image in range(5):
        slope = (distance(image, 1 + 1e-4) - distance(image, 1 - 1e-4)) / 2e-4
        # The unbiased covariance has 1 / 39 where the effects have 1 / 40.
        assert slope * 40 == pytest.approx(effects[image], rel=0.02, abs=0.02)


@pytest.mark.parametrize("offset", [0.0, 2.0**20])
def test_sums_on_a_device_are_numpy_s(offset):
    """Over several blocks, and far from 0: float32 holds eighths beside 2^20."""
    eighths = (8 * normal(9000, 5, 0)).round() / 8
    near, far = statistics_of(eighths), eighths + offset
    mu, sigma = summed_statistics(far, CPU)
    np.testing.assert_allclose(mu - offset, near.mu, rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(sigma, near.sigma, rtol=1e-12, atol=1e-12)
    found = statistics_of(far)
    np.testing.assert_allclose(sigma, found.sigma, rtol=1e-12, atol=1e-12)

    linear, slope = np.arange(5.0), near.sigma + np.eye(5)
    x = far.double().numpy() - mu
    expected = x @ linear + np.einsum("ni,ij,nj->n", x, slope, x)
    effects = summed_effects(far, mu, linear, slope, CPU)
    np.testing.assert_allclose(effects, expected, rtol=1e-12, atol=1e-12)


def test_the_noise_of_a_distance_is_its_spread_over_draws():
    """Against 200 sets drawn anew; and a difference of two paired sets has much less of it."""
    reference = statistics_of(normal(2000, 8, 0))
    sets = [normal(500, 8, seed, shift=0.3) for seed in range(1, 201)]
    others = [each + 0.1 for each in sets]
    spread = np.std([frechet_distance(statistics_of(each), reference) for each in sets])
    effects = image_effects(sets[0], statistics_of(sets[0]), reference)
    assert effects.std() / 500**0.5 == pytest.approx(spread, rel=0.2)
    apart = [
        frechet_distance(statistics_of(a), reference)
        - frechet_distance(statistics_of(b), reference)
        for a, b in zip(sets, others, strict=True)
    ]
    between = (
        effects - image_effects(others[0], statistics_of(others[0]), reference)
    ).std() / 500**0.5
    assert between == pytest.approx(np.std(apart), rel=0.2)
    assert between < 0.7 * spread
    groups = np.array(grouped_effects(effects))
    assert groups.std(ddof=1) / len(groups) ** 0.5 == pytest.approx(spread, rel=0.4)


def test_gaussians_with_commuting_covariances():
    """In their common basis the distance is |mu|^2 + sum (sqrt(p) - sqrt(q))^2."""
    basis, _ = np.linalg.qr(np.array([[1.0, 2.0, 0.5], [0.0, 1.0, 3.0], [2.0, 1.0, 1.0]]))
    p, q = np.array([4.0, 1.0, 9.0]), np.array([1.0, 0.25, 16.0])
    a = gaussian([1.0, 0.0, 2.0], basis @ np.diag(p) @ basis.T)
    b = gaussian([0.0, 2.0, 0.0], basis @ np.diag(q) @ basis.T)
    expected = 9.0 + 1.0 + 0.25 + 1.0
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("counts", [(50, 50), (50, 80), (None, 50)])
def test_the_distance_is_the_same_in_both_directions(counts):
    """To the bit, and not below 0, also of features whose rounding is large."""
    found = set()
    for seed in range(10):
        a, b = (
            replace(statistics_of(1e6 * normal(count or 50, 16, 2 * seed + i)), count=count)
            for i, count in enumerate(counts)
        )
        found |= {frechet_distance(a, b), frechet_distance(b, a)}
        # Equal but for their number of images, their mean, or their covariance.
        moved, more, wide = (
            replace(a, mu=a.mu + 1),
            replace(a, count=1000),
            replace(a, sigma=2 * a.sigma),
        )
        for other in (a, moved, more, wide):
            assert frechet_distance(a, other) == frechet_distance(other, a) >= 0
        assert frechet_distance(a, moved) == pytest.approx(16, abs=1)
    assert len(found) == 10


def test_statistics_that_cannot_be_compared_are_refused():
    with pytest.raises(ShapeError, match="over 1 and 2 features"):
        frechet_distance(gaussian([0], [[1]]), gaussian([0, 0], np.eye(2)))


# ---- the kernel distance ----


def mmd2(x, y):
    """Unbiased: pairs of an image with itself are left out; Binkowski et al., equation 4."""

    def k(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    m = len(x)
    same = sum(
        k(s[i], s[j]) / (m * (m - 1)) for s in (x, y) for i in range(m) for j in range(m) if i != j
    )
    return same - 2 * sum(k(a, b) for a in x for b in y) / (m * m)


def test_kid_of_subsets_is_their_mean_and_deviation():
    x, y = normal(20, 3, 2), normal(30, 3, 3, shift=1.0)
    drawn = {"subsets": 7, "subset_size": 6}
    draw = np.random.RandomState(11)
    values = []
    for _ in range(7):
        i, j = (draw.choice(n, 6, replace=False) for n in (20, 30))
        values.append(mmd2(x[i].double(), y[j].double()))
    found = kernel_distance(x, y, **drawn, seed=11)
    assert found == pytest.approx((np.mean(values), np.std(values)), rel=1e-11)
    assert kernel_distance(x, y, **drawn, seed=12) != found


# ---- precision and recall ----


def precision_recall_written_out(generated, real, k):
    def covered(points, others):
        """Share of the points within the k-th neighbour's distance of any of the others."""
        radii = [sorted(float((a - b).norm()) for b in others)[k] for a in others]
        inside = [
            any(float((p - a).norm()) <= radius for a, radius in zip(others, radii, strict=True))
            for p in points
        ]
        return sum(inside) / len(points)

    return covered(generated, real), covered(real, generated)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_are_the_formula(k):
    real, generated = normal(30, 2, 6), 1.5 * normal(25, 2, 7, shift=1.5)
    expected = precision_recall_written_out(generated.double(), real.double(), k)
    assert precision_recall(generated, real, k) == pytest.approx(expected)
    assert min(expected) < 1
    # Swapping the two sets swaps precision and recall.
    assert precision_recall(real, generated, k) == pytest.approx(expected[::-1])


def test_the_images_themselves_are_precise_and_complete():
    """Far from the origin as well, where distances of many rows are taken by scalar products."""
    features = 1000 + normal(60, 16, 8)
    assert precision_recall(features, features, 1) == (1.0, 1.0)


# ---- images ----


def test_to_uint8_cuts_fractions_off_as_edm_does():
    """127.5 x + 128: 0 is 128, and -1, at 0.5, is 0; nothing is rounded up."""
    x = torch.tensor([-9.0, -1.0, -0.996, 0.0, 0.0039, 0.004, 0.9961, 0.9999, 1.0, 9.0])
    assert to_uint8(x).tolist() == [0, 0, 1, 128, 128, 128, 255, 255, 255, 255]
    assert to_uint8(x).dtype == torch.uint8


def test_bytes_survive_floats_and_back():
    every_byte = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1)
    assert torch.equal(to_uint8(to_float(every_byte)), every_byte)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_pixels_that_are_not_finite_are_counted(value):
    images = torch.zeros(2, 1, 2, 2)
    images[1, 0, 0, :] = value
    with pytest.raises(NonFiniteError, match="2 of 8 pixel values"):
        to_uint8(images)


# ---- one pass ----


def test_each_image_is_seen_once(tmp_path, cache):
    extractor, calls = counting(scripted(ColourMeans(), tmp_path))
    real = Dataset("tiny", random_images(20, seed=1), "a" * 64)
    reference = dataset_reference(real, extractor, cache=cache, with_features=True)
    assert calls == [20]
    found = measure_images(
        random_images(10),
        extractor,
        reference,
        metrics=("fid", "kid", "prc"),
        settings=MetricSettings(kid_subset_size=10, neighbours=2),
        nfe=3,
        seeds={"evaluation": 4},
    )
    assert calls == [20, 10]
    generated = features_of(random_images(10), extractor)
    assert found.fid.value == frechet_distance(
        statistics_of(generated), statistics_of(reference.features)
    )
    expected = precision_recall(generated, reference.features, 2)
    assert (found.prc.precision, found.prc.recall) == expected


# ---- what cannot be measured ----


def reference_of(count):
    features = torch.zeros(count, 1)
    return Reference(name="few", statistics=gaussian([0], [[1]], count), features=features)


@pytest.mark.parametrize(
    ("metrics", "images", "reference", "message"),
    [
        (["is"], 10, reference_of(10), "unknown metric 'is'; known are fid, kid, prc"),
        (
            ["fid", "prc", "kid"],
            10,
            Reference(name="refs.npz:00", statistics=gaussian([0], [[1]], None)),
            "kid and prc .* refs.npz:00 ",
        ),
        (["kid"], 7, reference_of(10), "kid needs at least 8 images, got 7; .*subset size, or le"),
        (["kid"], 10, reference_of(7), "kid needs at least 8 reference images, got 7"),
        (["prc"], 5, reference_of(10), "prc needs at least 6 images, got 5; .* neighbours, or le"),
        (["prc"], 10, reference_of(5), "prc needs at least 6 reference images, got 5"),
    ],
)
def test_what_cannot_be_measured_is_refused_beforehand(metrics, images, reference, message):
    with pytest.raises(InputError, match=message):
        require_measurable(
            metrics, MetricSettings(kid_subset_size=8), images, reference, (1, 8, 8)
        )


# ---- the conditions ----

CONDITIONS = {
    "images": 4096,
    "reference": "digits",
    "reference_images": 1797,
    "extractor": "digits-classifier",
    "extractor_sha256": "ab" * 32,
    "nfe": 2,
    "seeds": {"training": 0, "evaluation": 1},
}
KID_SETTINGS = {"subsets": 100, "subset_size": 1000, "subset_seed": 2020}


def test_every_metric_carries_its_conditions():
    fid = FID(value=4.4, noise=0.2, effects=[0.5, -0.5], **CONDITIONS)
    kid = KID(mean=0.1, std=0.02, **KID_SETTINGS, **CONDITIONS)
    prc = PrecisionRecall(precision=0.7, recall=0.6, neighbours=5, **CONDITIONS)
    assert fid.conditions() == CONDITIONS
    prompts = PromptFile.of("folder/captions.csv:text", ["a three", "a seven"])
    under = replace(fid, prompts=prompts)
    assert under.conditions() == CONDITIONS | {"prompts": asdict(prompts)}
    assert (prompts.file, prompts.count) == ("captions.csv:text", 2)
    assert "2 prompts of captions.csv:text" in under.in_full()
    under = replace(under, guidance=0.0, decoded="x")  # 0 is a guidance
    assert (under.conditions()["guidance"], under.conditions()["decoded"]) == (0, "x")
    assert "guidance 0" in under.in_full()
    assert FID.read(json.loads(json.dumps(under.as_dict()))) == under
    others = replace(fid, prompts=PromptFile.of("captions.csv:text", ["a three"]))
    assert under.differing(others) == ["prompts"]
    assert under.differing(replace(others, prompts=replace(prompts, file="same.txt"))) == []
    # One of before does not say them.
    assert under.differing(fid) == fid.differing(under) == []
    assert kid.conditions() == CONDITIONS | KID_SETTINGS
    assert Metrics(fid=fid, kid=kid, prc=prc).as_dict() == {
        "fid": {"value": 4.4, "noise": 0.2, "effects": [0.5, -0.5], **CONDITIONS},
        "kid": {"mean": 0.1, "std": 0.02, **KID_SETTINGS, **CONDITIONS},
        "prc": {"precision": 0.7, "recall": 0.6, "neighbours": 5, **CONDITIONS},
    }


def test_the_library_refuses_images_of_another_shape(digits_extractor, shared_cache):
    extractor = digits_extractor
    reference = dataset_reference(load_dataset("digits"), extractor, cache=shared_cache)
    for shape in ((3, 8, 8), (1, 7, 7)):
        images = torch.zeros(4, *shape, dtype=torch.uint8)
        with pytest.raises(ShapeError, match="cannot be compared with digits, whose images are 1"):
            measure_images(images, extractor, reference, nfe=1, seeds={})
