"""Reference sets: statistics and features made once, and EDM's .npz read and written."""

import dataclasses
import zipfile

import numpy as np
import pytest
import torch

from bdense.data.datasets import Dataset
from bdense.errors import CheckpointError, InputError, NonFiniteError, ShapeError
from bdense.files import sha256_file
from bdense.metrics.metrics import frechet_distance
from bdense.metrics.references import (
    Statistics,
    dataset_reference,
    features_of,
    read_reference,
    statistics_of,
    write_reference,
)
from tests.features import ColourMeans, counting, random_images, scripted
from tests.fuzz import LEFT_BY_DOWNLOADS

# Deprecated, but users have such files.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.:FutureWarning")


@pytest.fixture
def colours(tmp_path):
    return scripted(ColourMeans(), tmp_path)


@pytest.fixture
def tiny() -> Dataset:
    return Dataset("tiny", random_images(8), "a" * 64)


def edm_file(path, **changes):
    """What NVlabs' fid.py writes: np.savez(path, mu=mu, sigma=sigma), and nothing else."""
    arrays = {"mu": np.array([100.0, 120.0, 90.0]), "sigma": 25 * np.eye(3)} | changes
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


# ---- features and statistics ----


def test_one_feature_has_a_covariance_too():
    found = statistics_of(torch.tensor([[1.0], [3.0]]))
    assert (found.mu.tolist(), found.sigma.tolist(), found.count) == ([2.0], [[2.0]], 2)


def test_statistics_of_nonsense_are_refused():
    with pytest.raises(NonFiniteError, match="features of 100 images are not finite"):
        Statistics(np.array([np.nan]), np.eye(1), 100)
    with pytest.raises(NonFiniteError, match="the features are not finite"):
        Statistics(np.zeros(1), np.array([[np.inf]]), None)
    with pytest.raises(ShapeError, match=r"\[2\] and \[1, 1\]"):
        Statistics(np.zeros(2), np.eye(1), 100)
    with pytest.raises(ShapeError, match=r"\[0\] and \[0, 0\]"):
        Statistics(np.zeros(0), np.eye(0), 100)


def test_too_few_images(colours):
    for count in (0, 1):
        with pytest.raises(InputError, match=f"at least 2 images, got {count}"):
            features_of(random_images(count), colours)
        with pytest.raises(InputError, match=f"at least 2 images, got {count}"):
            statistics_of(torch.zeros(count, 3))


def test_the_batch_size_does_not_matter(colours, monkeypatch):
    images = random_images(10)
    expected = images.double().mean(dim=(2, 3))
    for batch in (3, 10, 256):
        monkeypatch.setattr("bdense.metrics.references.FEATURES_BATCH", batch)
        features = features_of(images, colours)
        assert features.dtype == torch.float32
        np.testing.assert_allclose(features, expected, rtol=1e-6)
    found = statistics_of(features)
    np.testing.assert_allclose(found.mu, expected.mean(dim=0), rtol=1e-6)
    np.testing.assert_allclose(found.sigma, np.cov(expected.T), rtol=1e-5)
    assert found.count == 10


# ---- a data set, seen once ----


def test_a_data_set_is_seen_once(colours, tiny, cache):
    counted, calls = counting(colours)
    first = dataset_reference(tiny, counted, cache=cache)
    assert (calls, first.features, first.name) == ([8], None, "tiny")
    second = dataset_reference(tiny, counted, cache=cache, with_features=True)
    assert calls == [8]
    assert torch.equal(second.features, features_of(tiny.images, colours))
    for found in (first.statistics, second.statistics):
        expected = statistics_of(second.features)
        assert np.array_equal(found.mu, expected.mu)
        assert np.array_equal(found.sigma, expected.sigma)
        assert (found.count, found.mu.dtype, found.sigma.dtype) == (8, np.float64, np.float64)


def test_a_cache_that_cannot_be_written_names_its_variable(colours, tiny, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/cache cannot be written .*BDENSE_CACHE"):
        dataset_reference(tiny, colours, cache=tmp_path / "file" / "cache")


def test_statistics_of_before_features_were_kept_stay(colours, tiny, cache):
    """A study's own reference must not move under it: only what is missing is made."""
    dataset_reference(tiny, colours, cache=cache)
    (statistics,) = cache.rglob("*.npz")
    (features,) = cache.rglob("*.safetensors")
    features.unlink()
    before = statistics.read_bytes()
    counted, calls = counting(colours)
    dataset_reference(tiny, counted, cache=cache)
    assert calls == []
    found = dataset_reference(tiny, counted, cache=cache, with_features=True)
    assert (calls, len(found.features)) == ([8], 8)
    assert statistics.read_bytes() == before


def test_other_pixels_or_another_extractor_have_files_of_their_own(colours, tiny, cache):
    other = Dataset("tiny", random_images(8, seed=1), "b" * 64)
    renamed = dataclasses.replace(colours, sha256="c" * 64)
    for dataset, extractor in ((tiny, colours), (other, colours), (tiny, renamed)):
        dataset_reference(dataset, extractor, cache=cache)
    assert len(list(cache.rglob("*.npz"))) == 3
    assert len(list(cache.rglob("*.safetensors"))) == 3
    # A set of files is named by its last folder only, which others may share.
    named = dataclasses.replace(tiny, name="folder:images")
    assert dataset_reference(named, colours, cache=cache).name == f"folder:images:{'a' * 16}"


@pytest.mark.parametrize("contents", [b"", b"no zip", None])
@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_broken_files_are_named(kind, contents, colours, tiny, cache):
    dataset_reference(tiny, colours, cache=cache)
    (path,) = cache.rglob(f"*.{kind}")
    path.write_bytes(path.read_bytes()[:-30] if contents is None else contents)
    with pytest.raises(CheckpointError, match=rf"{path.name} cannot be read .* delete the file"):
        dataset_reference(tiny, colours, cache=cache, with_features=True)


def test_features_of_other_images_are_not_taken(colours, tiny, cache):
    dataset_reference(tiny, colours, cache=cache)
    (path,) = cache.rglob("*.safetensors")
    fewer = Dataset("fewer", random_images(5), "d" * 64)
    dataset_reference(fewer, colours, cache=cache)
    (other,) = set(cache.rglob("*.safetensors")) - {path}
    path.write_bytes(other.read_bytes())
    with pytest.raises(CheckpointError, match=r"not of shape \[8, 3\].* delete the file"):
        dataset_reference(tiny, colours, cache=cache, with_features=True)


# ---- EDM's .npz ----


def test_a_file_of_ours_comes_back(colours, tiny, tmp_path, cache):
    statistics = dataset_reference(tiny, colours, cache=cache).statistics
    path = tmp_path / "refs" / "tiny.npz"
    write_reference(path, statistics, "tiny", colours)
    found = read_reference(path, colours)
    assert np.array_equal(found.statistics.mu, statistics.mu)
    assert np.array_equal(found.statistics.sigma, statistics.sigma)
    assert (found.statistics.count, found.features) == (8, None)
    # Two files may have one name, and their distances must not compare.
    assert found.name == f"tiny.npz:{sha256_file(path)[:16]}"
    # NVlabs' fid.py reads it: dict(np.load(f)), then ref["mu"] and ref["sigma"].
    with path.open("rb") as file:
        ref = dict(np.load(file))
    assert np.array_equal(ref["mu"], statistics.mu)
    assert np.array_equal(ref["sigma"], statistics.sigma)
    assert str(ref["extractor_sha256"]) == colours.sha256


def test_a_file_is_read_once(colours, tmp_path, monkeypatch):
    path = edm_file(tmp_path / "cifar10-32x32.npz")
    read, load = [], np.load
    monkeypatch.setattr(
        np, "load", lambda *given, **more: read.append(given) or load(*given, **more)
    )
    read_reference(path, colours)
    assert read == [(path,)]


def test_a_file_of_nvlabs_has_no_count(colours, tmp_path):
    path = edm_file(tmp_path / "cifar10-32x32.npz", mu=np.float32([100, 120, 90]))
    found = read_reference(path, colours)
    assert found.statistics.count is None
    assert found.statistics.mu.tolist() == [100.0, 120.0, 90.0]
    assert found.statistics.mu.dtype == np.float64
    ours = Statistics(np.array([103.0, 124.0, 90.0]), 100 * np.eye(3), 10)
    # |(3, 4, 0)|^2 + 3 (10 - 5)^2
    assert frechet_distance(ours, found.statistics) == pytest.approx(100)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mu": None}, r"has no mu \(it holds sigma\); .* as `bdense reference` writes it"),
        ({"mu": None, "sigma": None}, r"no mu and no sigma \(it holds nothing\)"),
        ({"mu": np.zeros((3, 1))}, r"mu \[d\] and sigma \[d, d\], got \[3, 1\] and \[3, 3\]"),
        ({"sigma": -np.eye(3)}, "sigma is not a covariance: .*eigenvalue"),
        ({"sigma": np.triu(np.ones((3, 3)))}, "sigma is not a covariance: .*symmetric"),
        ({"sigma": np.eye(2)}, r"got \[3\] and \[2, 2\]"),
        ({"mu": np.array([1.0, np.nan, 0.0])}, "features are not finite; make the file again"),
        ({"sigma": np.full((3, 3), "x")}, "'sigma' in .* is not an array of floats"),
        ({"sigma": np.eye(3, dtype=complex)}, "'sigma' in .* is not an array of floats"),
        ({"mu": np.array([None] * 3)}, "cannot be read as .npz .*allow_pickle=False"),
        ({"count": np.array("many")}, "'count' in .* is not a number of images"),
        ({"count": np.array(0)}, "'count' in .* is not a number of images"),
        ({"count": np.array([5, 6])}, "'count' in .* is not a number of images"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(changes, message, colours, tmp_path):
    path = edm_file(tmp_path / "refs.npz", **changes)
    with pytest.raises(CheckpointError, match=message):
        read_reference(path, colours)


def test_files_that_are_no_npz_are_named(colours, tmp_path):
    path = tmp_path / "refs.npz"
    with pytest.raises(CheckpointError, match=r"no reference file at .*refs\.npz"):
        read_reference(path, colours)
    whole = edm_file(path).read_bytes()
    np.save(tmp_path / "array.npy", np.eye(3))
    with zipfile.ZipFile(tmp_path / "texts.npz", "w") as archive:
        archive.writestr("mu", "no array")
        archive.writestr("sigma", "no array")
    damaged = bytearray(whole)
    damaged[whole.index(np.float64(120.0).tobytes())] ^= 0xFF
    contents = {
        "empty": b"",
        "text": b"no zip",
        "cut": whole[:-30],
        "half": whole[: len(whole) // 2],
        "damaged": bytes(damaged),
        "array": (tmp_path / "array.npy").read_bytes(),
        "texts": (tmp_path / "texts.npz").read_bytes(),
    }
    for content in contents.values():
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"refs\.npz cannot be read as \.npz"):
            read_reference(path, colours)
    for content, said in LEFT_BY_DOWNLOADS:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=said):
            read_reference(path, colours)


def test_objects_in_a_file_are_not_unpickled(colours, tmp_path, monkeypatch):
    class Payload:
        def __reduce__(self):
            return (print, ("ran",))

    path = edm_file(tmp_path / "refs.npz", count=np.array(Payload(), dtype=object))
    with pytest.raises(CheckpointError, match="allow_pickle=False"):
        read_reference(path, colours)


def test_a_file_of_other_features_is_refused(colours, tmp_path):
    path = edm_file(tmp_path / "refs.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(ShapeError, match=r"2048 features.* .*features\.pt gives 3; .*inception"):
        read_reference(path, colours)
    write_reference(path, Statistics(np.zeros(3), np.eye(3), 5), "tiny", colours)
    assert read_reference(path, colours).image_shape is None
    write_reference(path, Statistics(np.zeros(3), np.eye(3), 5), "tiny", colours, (3, 8, 8))
    assert read_reference(path, colours).image_shape == (3, 8, 8)
    other = dataclasses.replace(colours, name="another", sha256="e" * 64)
    ours = colours.sha256[:16]
    with pytest.raises(InputError, match=rf"features\.pt .*{ours}.*another .*e{{16}}"):
        read_reference(path, other)
