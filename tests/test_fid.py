"""Frechet distances: the formula, the extractors, and the conditions a distance carries."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bdense.data import Dataset, load_dataset
from bdense.errors import BdenseError, CheckpointError, InputError, NonFiniteError, ShapeError
from bdense.extractors import DIGITS_CLASSIFIER, TORCHSCRIPT
from bdense.fid import (
    FID,
    Statistics,
    feature_statistics,
    frechet_distance,
    reference_statistics,
    statistics_of,
)
from bdense.sampling import to_uint8
from tests.features import ColourMeans, random_images, scripted
from tests.goldens import discover

# The files that users have are TorchScript all the same.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.:FutureWarning")


def gaussian(mu, sigma, count=100):
    return Statistics(np.array(mu, dtype=np.float64), np.array(sigma, dtype=np.float64), count)


# ---- the formula ----


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


def test_gaussians_with_commuting_covariances():
    """In their common basis the distance is |mu|^2 + sum (sqrt(p) - sqrt(q))^2."""
    basis, _ = np.linalg.qr(np.array([[1.0, 2.0, 0.5], [0.0, 1.0, 3.0], [2.0, 1.0, 1.0]]))
    p, q = np.array([4.0, 1.0, 9.0]), np.array([1.0, 0.25, 16.0])
    a = gaussian([1.0, 0.0, 2.0], basis @ np.diag(p) @ basis.T)
    b = gaussian([0.0, 2.0, 0.0], basis @ np.diag(q) @ basis.T)
    expected = 9.0 + 1.0 + 0.25 + 1.0
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_one_feature_has_a_covariance_too():
    found = statistics_of(torch.tensor([[1.0], [3.0]]))
    assert (found.mu.tolist(), found.sigma.tolist(), found.count) == ([2.0], [[2.0]], 2)
    assert frechet_distance(found, gaussian([2.0], [[8.0]])) == pytest.approx(2.0)  # (2 - 1)^2 * 2


def test_statistics_that_cannot_be_compared_are_refused():
    with pytest.raises(ShapeError, match="over 1 and 2 features"):
        frechet_distance(gaussian([0], [[1]]), gaussian([0, 0], np.eye(2)))
    with pytest.raises(NonFiniteError, match="100 images are not finite"):
        gaussian([np.nan], [[1]])
    with pytest.raises(NonFiniteError, match="not finite"):
        gaussian([0], [[np.inf]])
    with pytest.raises(ShapeError, match=r"\[2\] and \[1, 1\]"):
        gaussian([0, 0], [[1]])


# ---- images ----


def test_to_uint8_cuts_fractions_off_as_edm_does():
    """127.5 x + 128: 0 is 128, and -1, at 0.5, is 0; nothing is rounded up."""
    x = torch.tensor([-9.0, -1.0, -0.996, 0.0, 0.0039, 0.004, 0.9961, 0.9999, 1.0, 9.0])
    assert to_uint8(x).tolist() == [0, 0, 1, 128, 128, 128, 255, 255, 255, 255]
    assert to_uint8(x).dtype == torch.uint8


def test_bytes_survive_floats_and_back():
    every_byte = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1)
    assert torch.equal(to_uint8(Dataset("all", every_byte, "0").float_images()), every_byte)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_pixels_that_are_not_finite_are_counted(value):
    images = torch.zeros(2, 1, 2, 2)
    images[1, 0, 0, :] = value
    with pytest.raises(NonFiniteError, match="2 of 8 pixel values"):
        to_uint8(images)
    assert issubclass(NonFiniteError, BdenseError)


def test_too_few_images(digits_extractor):
    for count in (0, 1):
        with pytest.raises(InputError, match=f"at least 2 images, got {count}"):
            feature_statistics(random_images(count), digits_extractor)
    with pytest.raises(InputError, match="batch must be at least 1, got 0"):
        feature_statistics(random_images(4), digits_extractor, batch=0)


def test_the_batch_size_does_not_matter(tmp_path):
    extractor = scripted(ColourMeans(), tmp_path)
    images = random_images(10)
    whole = feature_statistics(images, extractor)
    parts = feature_statistics(images, extractor, batch=3)
    np.testing.assert_allclose(whole.mu, images.double().mean(dim=(0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(parts.mu, whole.mu, rtol=1e-6)
    np.testing.assert_allclose(parts.sigma, whole.sigma, rtol=1e-6)
    assert parts.count == 10


# ---- agreement with torch-fidelity as a whole ----


class Rows(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images.expand(-1, 3, -1, -1)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]


@pytest.mark.parametrize("kind", ["digits-classifier", "torchscript"])
def test_calculate_metrics_gives_the_same(kind, digits_extractor, shared_cache, tmp_path):
    from torch_fidelity import calculate_metrics

    if kind == "torchscript":
        name, weights, extractor = (
            TORCHSCRIPT,
            tmp_path / "features.pt",
            scripted(ColourMeans(), tmp_path),
        )
    else:
        (weights,) = shared_cache.glob("digits-classifier-*.safetensors")
        name, extractor = DIGITS_CLASSIFIER, digits_extractor
    digits = load_dataset("digits").images
    real = digits[:300]
    fake = (digits[300:600].float() * 0.8).to(torch.uint8)
    theirs = calculate_metrics(
        input1=Rows(fake),
        input2=Rows(real),
        fid=True,
        feature_extractor=name,
        feature_extractor_weights_path=weights,
        cuda=False,
        save_cpu_ram=True,
        verbose=False,
    )["frechet_inception_distance"]
    ours = frechet_distance(*(feature_statistics(each, extractor) for each in (fake, real)))
    assert ours > 1
    # It takes the mean of the features in float32.
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_worse_images_are_further_away(digits_extractor):
    digits = load_dataset("digits").images
    reference = feature_statistics(digits, digits_extractor)
    noise = 40 * torch.randn(digits.shape, generator=torch.Generator().manual_seed(0))
    distances = [
        frechet_distance(
            feature_statistics(
                (digits + share * noise).clip(0, 255).to(torch.uint8), digits_extractor
            ),
            reference,
        )
        for share in (0, 0.25, 0.5, 1)
    ]
    assert distances[0] == pytest.approx(0, abs=1e-3)
    assert distances == sorted(distances)


# ---- reference statistics and the value ----


def test_reference_statistics_are_made_once(digits_extractor, cache):
    digits = load_dataset("digits")
    first = reference_statistics(digits, digits_extractor, cache=cache)
    (path,) = cache.rglob("*.npz")
    made = path.stat().st_mtime_ns
    second = reference_statistics(digits, digits_extractor, cache=cache)
    assert path.stat().st_mtime_ns == made
    assert np.array_equal(first.mu, second.mu)
    assert np.array_equal(first.sigma, second.sigma)
    assert (first.count, first.mu.dtype, first.sigma.dtype) == (1797, np.float64, np.float64)
    expected = feature_statistics(digits.images, digits_extractor)
    assert np.array_equal(first.sigma, expected.sigma)


def test_other_pixels_or_another_extractor_have_statistics_of_their_own(tmp_path, cache):
    colours = scripted(ColourMeans(), tmp_path)
    half = Dataset("tiny", random_images(8), "a" * 64)
    other = Dataset("tiny", random_images(8, seed=1), "b" * 64)
    renamed = dataclasses.replace(colours, sha256="c" * 64)
    for dataset, extractor in ((half, colours), (other, colours), (half, renamed)):
        reference_statistics(dataset, extractor, cache=cache)
    assert len(list(cache.rglob("*.npz"))) == 3


@pytest.mark.parametrize("contents", [b"", b"no zip", None])
def test_broken_statistics_are_named(contents, tmp_path, cache):
    dataset, extractor = (
        Dataset("tiny", random_images(4), "a" * 64),
        scripted(ColourMeans(), tmp_path),
    )
    reference_statistics(dataset, extractor, cache=cache)
    (path,) = cache.rglob("*.npz")
    path.write_bytes(path.read_bytes()[:-30] if contents is None else contents)
    with pytest.raises(CheckpointError, match=rf"{path.name} cannot be read .* delete the file"):
        reference_statistics(dataset, extractor, cache=cache)


CONDITIONS = {
    "images": 4096,
    "reference": "digits",
    "reference_images": 1797,
    "extractor": "digits-classifier",
    "extractor_sha256": "ab" * 32,
    "nfe": 2,
    "seeds": {"training": 0, "evaluation": 1},
}


def test_a_fid_carries_its_conditions():
    fid = FID(value=4.4, **CONDITIONS)
    assert fid.conditions() == CONDITIONS
    assert fid.as_dict() == {"value": 4.4, **CONDITIONS}
    fid.require_comparable(FID(value=9.0, **CONDITIONS))


@pytest.mark.parametrize(
    ("name", "value"),
    [("images", 5), ("reference", "mnist"), ("nfe", 3), ("seeds", {"evaluation": 2})],
)
def test_what_differs_is_named(name, value):
    one = FID(value=4.4, **CONDITIONS)
    two = FID(value=4.4, **{**CONDITIONS, name: value})
    with pytest.raises(InputError, match=f"not comparable.*{name}: .* against") as caught:
        one.require_comparable(two)
    assert str(caught.value).count("against") == 1
