"""Data sets: their bytes, their range, their labels, their identity."""

import gzip
import hashlib
import importlib.util
import os
import pickle
import re
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

import bdense.data.datasets
from bdense.data.datasets import Dataset, image_shape, load_dataset, to_float
from bdense.errors import InputError, ShapeError
from tests.goldens import ROOT

DATA = Path(os.environ.get("BDENSE_DATA", ROOT / "../shared/data")).resolve()


def tiny(labels: torch.Tensor | None = None) -> Dataset:
    return Dataset("tiny", torch.zeros(3, 1, 2, 2, dtype=torch.uint8), "0", labels)


# ---- digits ----


def test_digits_are_the_scans_of_scikit_learn_in_full_range():
    digits = load_dataset("digits")
    assert digits.name == "digits"
    assert digits.images.shape == (1797, 1, 8, 8)
    assert digits.images.dtype == torch.uint8
    # 0..16 become round(v / 16 * 255); the first scan begins 0 0 5 13 9 1 0 0.
    assert digits.images[0, 0, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]
    assert sorted(set(digits.images.flatten().tolist())) == [
        *(0, 16, 32, 48, 64, 80, 96, 112, 128, 143, 159, 175, 191, 207, 223, 239, 255)
    ]
    # As scikit-learn counts them.
    assert digits.labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert digits.labels[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert digits.num_classes == 10


def test_the_hash_is_of_the_shape_and_the_pixels():
    digits = load_dataset("digits")
    assert load_dataset("digits").sha256 == digits.sha256
    assert digits.sha256 == "a2c68e1b959d7a317d96f4067f80b7a340ad844652a263506697b73d95cd89c6"
    shape_and_pixels = b"[1797, 1, 8, 8]" + digits.images.numpy().tobytes()
    assert digits.sha256 == hashlib.sha256(shape_and_pixels).hexdigest()


# ---- what a data set is ----


def test_floats_fill_minus_one_to_one():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1)
    floats = to_float(images)
    assert floats.dtype == torch.float32
    assert floats.flatten().tolist() == pytest.approx([-1.0, -0.6, 1.0], abs=1e-7)
    assert images.flatten().tolist() == [0, 51, 255]


def test_labels_that_a_network_cannot_take_are_refused():
    with pytest.raises(InputError, match="'tiny' has 3 classes and the network label_dim=2; set"):
        tiny(torch.tensor([2, 0, 1])).require_labels(2)
    assert tiny().num_classes == 0
    with pytest.raises(InputError, match=r"'tiny' has no labels.*label_dim=2"):
        tiny().require_labels(2)


def test_the_labels_have_a_hash_of_their_own():
    first, other = (tiny(torch.tensor(labels)) for labels in ([2, 0, 1], [1, 0, 2]))
    assert first.labels_sha256 != other.labels_sha256
    assert first.labels_sha256 == tiny(torch.tensor([2, 0, 1])).labels_sha256
    assert tiny().labels_sha256 == ""


BYTES = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
NO_LABELS = (torch.tensor([1, 2]), torch.ones(3), torch.ones(3, 1).long())


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(3, 1, 2, 2), None, r"give uint8 \[n, C, H, W\]"),
        (BYTES[:, 0], None, r"give uint8 \[n, C, H, W\]"),
        *((BYTES, wrong, "3 images and labels of .* give one int64") for wrong in NO_LABELS),
    ],
)
def test_images_are_bytes_and_labels_a_whole_number_for_each(images, labels, message):
    with pytest.raises(ShapeError, match=message):
        Dataset("tiny", images, "0", labels)


# ---- padding ----


def test_padding_by_name():
    digits, padded = load_dataset("digits"), load_dataset("digits@16")
    assert padded.name == "digits@16"
    assert torch.equal(padded.images[:, :, 4:12, 4:12], digits.images)
    assert padded.images.sum() == digits.images.sum()
    assert padded.sha256 != digits.sha256
    assert torch.equal(padded.labels, digits.labels)
    same = load_dataset("digits@8")
    assert (same.name, same.sha256) == ("digits@8", digits.sha256)


def test_an_odd_pixel_of_padding_goes_to_the_end(tmp_path):
    Image.fromarray(np.full((2, 3), 9, np.uint8)).save(tmp_path / "a.png")
    # 3 wide: 1 before, 2 after; 2 high: 2 and 2.
    assert load_dataset(f"folder:{tmp_path}@6").images[0, 0].tolist() == [
        *([[0] * 6] * 2),
        *([[0, 9, 9, 9, 0, 0]] * 2),
        *([[0] * 6] * 2),
    ]


def test_padding_does_not_cut():
    message = "digits@7: .* 8 x 8 pixels"
    for load in (load_dataset, image_shape):
        with pytest.raises(InputError, match=message):
            load("digits@7")


# ---- names ----


@pytest.mark.parametrize("spec", ["digit", "digits@0", "digits@x", "folder:", "tar:x", "zip", ""])
def test_an_unknown_name_lists_the_known_ones(spec):
    known = "cifar10, cifar10-test, digits, fashion-mnist, fashion-mnist-test, folder:PATH, zip:"
    with pytest.raises(InputError, match=f"unknown data set '{spec}'; known are {known}") as error:
        load_dataset(spec)
    assert "did you mean folder:" not in str(error.value)
    assert [len(image_shape(name)) for name in known.split(", ")[:5]] == [3] * 5


def test_a_folder_without_its_format_is_likened_to_one(tmp_path):
    with pytest.raises(InputError, match=f"did you mean folder:{re.escape(str(tmp_path))}"):
        load_dataset(str(tmp_path))


def test_a_path_gives_a_name_without_its_folders(tmp_path, monkeypatch):
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray(np.full((4, 6), 9, np.uint8)).save(folder / "a.png")
    assert load_dataset(f"folder:{folder}").name == "folder:photos"
    padded = load_dataset(f"folder:{folder}/@8")
    assert (padded.name, padded.images.shape) == ("folder:photos@8", (1, 1, 8, 8))
    assert image_shape(f"folder:{folder}") == (1, 4, 6)
    assert image_shape(f"folder:{folder}@16") == (1, 16, 16)
    monkeypatch.chdir(folder)
    assert load_dataset("folder:.").name == "folder:photos"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_dataset("folder:~/photos").sha256 == load_dataset("folder:.").sha256


def test_shapes_of_named_sets_need_no_files(tmp_path, monkeypatch):
    monkeypatch.setenv("BDENSE_DATA", str(tmp_path))
    assert image_shape("digits") == (1, 8, 8) == tuple(load_dataset("digits").images.shape[1:])
    assert image_shape("cifar10") == image_shape("cifar10-test") == (3, 32, 32)
    assert image_shape("fashion-mnist@32") == (1, 32, 32)
    assert list(tmp_path.iterdir()) == []


# ---- Fashion-MNIST ----


@pytest.fixture
def fashion(monkeypatch) -> Path:
    folder = DATA / "fashion-mnist"
    if not (folder / "train-images-idx3-ubyte.gz").exists():
        pytest.skip(f"{folder} is absent (BDENSE_DATA)")
    monkeypatch.setenv("BDENSE_DATA", str(DATA))
    return folder


@pytest.mark.parametrize(
    ("name", "part", "count"),
    [("fashion-mnist", "train", 60_000), ("fashion-mnist-test", "t10k", 10_000)],
)
def test_fashion_mnist_is_its_official_files(fashion, name, part, count):
    found = load_dataset(name)
    pixels = gzip.decompress((fashion / f"{part}-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((fashion / f"{part}-labels-idx1-ubyte.gz").read_bytes())[8:]
    assert found.images.shape == (count, 1, *image_shape(name)[1:]) == (count, 1, 28, 28)
    assert found.images.numpy().tobytes() == pixels
    assert bytes(found.labels.tolist()) == labels
    assert found.labels.bincount().tolist() == [count // 10] * 10


# ---- CIFAR-10 ----


@pytest.fixture(scope="module")
def webp() -> ModuleType:
    """The loader of the sheets that hold the official pixels."""
    path = DATA / "load_cifar10.py"
    if not path.exists():
        pytest.skip(f"{path} is absent (BDENSE_DATA)")
    spec = importlib.util.spec_from_file_location("load_cifar10", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cifar(webp, tmp_path_factory) -> Iterator[Path]:
    """The official pickles: all six, as torchvision looks at each; 4 seconds, 186 MB."""
    folder = tmp_path_factory.mktemp("cifar")
    webp.export_official(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "split"), [("cifar10", "train"), ("cifar10-test", "test")])
def test_cifar_10_is_its_official_pickles(webp, cifar, monkeypatch, name, split):
    monkeypatch.setenv("BDENSE_DATA", str(cifar))
    found = load_dataset(name)
    pixels, labels = webp.load(split)
    assert tuple(found.images.shape[1:]) == image_shape(name)
    assert np.array_equal(found.images.permute(0, 2, 3, 1), pixels)
    assert np.array_equal(found.labels, labels)
    assert found.labels.dtype == torch.int64


@pytest.fixture
def small_cifar(tmp_path, monkeypatch) -> Path:
    """An archive of torchvision's layout with two images a batch, and its MD5s in torchvision."""
    from torchvision.datasets import CIFAR10

    def batch(first: int) -> bytes:
        data = np.arange(first, first + 2, dtype=np.uint8)[:, None].repeat(3072, axis=1)
        return pickle.dumps({"data": data, "labels": [first % 10, (first + 1) % 10]})

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    for name in ("train_list", "test_list"):
        entries = []
        for file, _ in getattr(CIFAR10, name):
            content = batch(10 if file == "test_batch" else 2 * int(file[-1]) - 2)
            (folder / file).write_bytes(content)
            entries.append([file, hashlib.md5(content).hexdigest()])
        monkeypatch.setattr(CIFAR10, name, entries)
    meta = pickle.dumps({"label_names": list("abcdefghij")})
    (folder / "batches.meta").write_bytes(meta)
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": hashlib.md5(meta).hexdigest()})
    archive = tmp_path / "made.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, CIFAR10.base_folder)
    return archive


def test_cifar_10_is_fetched_and_unpacked_once(small_cifar, tmp_path, monkeypatch):
    fetched = []

    def fetch(url: str, path: Path, *, what: str, sha256: str) -> Path:
        fetched.append((url, path, sha256[:8]))
        path.parent.mkdir(exist_ok=True)
        return Path(shutil.copy(small_cifar, path))

    root = tmp_path / "data"
    monkeypatch.setenv("BDENSE_DATA", str(root))
    monkeypatch.setattr(bdense.data.datasets, "fetch", fetch)
    for _ in range(2):
        found = load_dataset("cifar10")
        assert found.images[:, 2, 31, 31].tolist() == found.labels.tolist() == [*range(10)]
    url = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
    assert fetched == [(url, root / "cifar-10-python.tar.gz", "6d958be0")]
    # A file that was cut short is unpacked again.
    (root / "cifar-10-batches-py/test_batch").write_bytes(b"half")
    assert load_dataset("cifar10-test").labels.tolist() == [0, 1]
    (root / "cifar-10-batches-py/batches.meta").unlink()
    assert load_dataset("cifar10-test").labels.tolist() == [0, 1]


# ---- sets that are not there ----


@pytest.mark.parametrize(
    ("name", "folder", "file"),
    [
        ("cifar10", "", "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"),
        (
            "fashion-mnist-test",
            "/fashion-mnist",
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/t10k-images-idx3-ubyte.gz",
        ),
    ],
)
def test_a_set_without_a_network_says_in_one_line_what_to_fetch(
    tmp_path, monkeypatch, capfd, name, folder, file
):
    """A refused proxy stands for every way of being offline."""
    for proxy in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    monkeypatch.setenv("BDENSE_DATA", str(tmp_path))
    with pytest.raises(InputError) as caught:
        load_dataset(name)
    (line,) = str(caught.value).splitlines()
    place = f"{tmp_path}{folder}/{file.rsplit('/', 1)[1]}"
    assert f"{tmp_path}{folder}: " in line
    assert f"fetch {file} by hand and put it at {place}" in line
    assert f"set BDENSE_DATA, now {tmp_path}, to the folder that has it" in line
    assert capfd.readouterr() == ("", "")
    assert not Path(place).exists()


def test_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("BDENSE_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert bdense.data.datasets.data_folder() == tmp_path / "bdense/data"
    monkeypatch.setenv("BDENSE_DATA", "~/sets")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert bdense.data.datasets.data_folder() == tmp_path / "sets"
