"""Models are drawn as they were distilled, and compared with what they were trained on."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from bdense.data.datasets import load_dataset
from bdense.diffusion.sampling import Sampler, draw_images
from bdense.diffusion.schedules import Schedule
from bdense.errors import CheckpointError, InputError, ShapeError
from bdense.metrics.extractors import load_extractor
from bdense.metrics.metrics import frechet_distance, measure_images
from bdense.metrics.references import dataset_reference, read_reference, statistics_of
from bdense.models.store import load_denoiser, save_denoiser
from tests.commands import DIGITS, SHORT, TINY, bdense, done, refused
from tests.small import small_teacher

OWN = Sampler(num_intervals=3, afs=True)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def student(tmp_path):
    path = tmp_path / "student.safetensors"
    save_denoiser(path, small_teacher(), {"kind": "student", "sampler": OWN.describe()})
    return load_denoiser(path)[0]


def test_a_student_draws_with_its_own_sampler_unless_told(student):
    assert torch.equal(draw_images(student, count=3, seed=1), draw_images(student, OWN, 3, seed=1))


@pytest.mark.parametrize(
    "other",
    [
        Sampler(num_intervals=2, afs=True),
        Sampler(num_intervals=3, afs=False),
        Sampler(num_intervals=3, afs=True, schedule=Schedule(sigma_max=10.0)),
    ],
)
def test_a_student_refuses_levels_it_was_not_distilled_for(student, other):
    with pytest.raises(InputError, match="the student was distilled for NFE 2 with euler"):
        draw_images(student, other, 3, seed=1)


def test_a_teacher_draws_as_it_is_told():
    teacher = small_teacher()
    with pytest.raises(InputError, match="a teacher has no sampler of its own"):
        draw_images(teacher, count=2, seed=0)
    assert draw_images(teacher, OWN, 2, seed=0).shape == (2, 1, 8, 8)


def test_a_student_knows_its_sampler_and_its_teachers_data(tmp_path):
    teacher, path = tmp_path / "t.safetensors", tmp_path / "s.safetensors"
    done("teacher", *TINY, "--data", "digits@16", "--out", teacher)
    done("distill", teacher, *SHORT, "--plain", "--nfe", 2, "--out", path)
    student, metadata = load_denoiser(path)
    assert [each.nfe for each in student.samplers] == [2]
    # SFD learns from the teacher alone, without the data set.
    assert metadata["data"] == "digits@16"


def test_fid_compares_with_the_models_own_data(tmp_path, cache):
    path = tmp_path / "x.safetensors"
    options = ("--images", 4, *DIGITS, "--cache", cache)
    save_denoiser(path, small_teacher(), {"kind": "teacher", "data": "digits"})
    assert json.loads(done("fid", path, *options))["reference"] == "digits"
    for known, said in (({}, "does not say"), ({"data": "folder:cats"}, "folder:cats; ")):
        save_denoiser(path, small_teacher(), {"kind": "teacher", **known})
        line = refused(bdense("fid", path, *options))
        assert line.startswith("--data is missing: ")
        assert said in line
        done("fid", path, *options, "--data", "digits")


@pytest.mark.parametrize(
    ("channels", "data", "extractor"),
    [
        (3, "digits", "digits-classifier"),
        (1, "digits@16", "digits-classifier"),
    ],
)
def test_other_images_are_refused_before_one_is_drawn(
    tmp_path, cache, monkeypatch, channels, data, extractor
):
    path = tmp_path / "x.safetensors"
    save_denoiser(path, small_teacher(channels=channels), {"kind": "teacher"})

    def drawn(*_: object, **__: object) -> None:
        raise AssertionError("an image was drawn")

    monkeypatch.setattr("bdense.verbs.evaluation.draw_images", drawn)
    options = ("--data", data, "--extractor", extractor, "--cache", cache, "--images", 4)
    assert "digits" in refused(bdense("fid", path, *options))
    teacher = tmp_path / "t.safetensors"
    save_denoiser(teacher, small_teacher(channels=channels), {"kind": "teacher"})
    out = ("--out", tmp_path / "s.safetensors")
    assert "digits" in refused(bdense("distill", teacher, *SHORT, *options, *out))
    assert not (tmp_path / "s.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda sigma: -sigma, "eigenvalue"),
        (lambda sigma: sigma + np.triu(np.ones_like(sigma)), "symmetric"),
    ],
)
def test_statistics_whose_sigma_is_no_covariance_are_refused(tmp_path, cache, change, said):
    extractor = load_extractor("digits-classifier", cache=cache, device=torch.device("cpu"))
    found = dataset_reference(load_dataset("digits"), extractor, cache=cache).statistics
    path = tmp_path / "x.npz"
    np.savez(path, mu=found.mu, sigma=found.sigma.astype(np.float32))
    assert read_reference(path, extractor).statistics.mu.size == 64
    np.savez(path, mu=found.mu, sigma=change(found.sigma))
    with pytest.raises(CheckpointError, match=f"sigma is not a covariance: .*{said}"):
        read_reference(path, extractor)


def test_a_set_is_at_no_distance_below_0_from_itself():
    features = 1e6 * torch.rand(200, 32, generator=torch.Generator().manual_seed(0))
    found = statistics_of(features)
    assert 0 <= frechet_distance(found, found) < 1e-9 * np.trace(found.sigma)


@pytest.mark.parametrize("suffix", [".safetensors", ".pkl", ".npz"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
        (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "a page of HTML"),
    ],
)
def test_what_a_download_leaves_is_named(tmp_path, cache, suffix, content, said):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    if suffix == ".npz":
        extractor = load_extractor("digits-classifier", cache=cache, device=torch.device("cpu"))
        with pytest.raises(CheckpointError, match=said):
            read_reference(path, extractor)
    else:
        with pytest.raises(CheckpointError, match=said):
            load_denoiser(path)


def test_a_schedule_beyond_float64_is_refused():
    with pytest.raises(InputError, match=r"rho=0\.001"):
        Schedule(rho=1e-3)
    with torch.device("meta"):  # as a study is checked
        assert Schedule().rho == 7


def test_a_closed_standard_output_is_no_mistake(tmp_path):
    path = tmp_path / "x.safetensors"
    save_denoiser(path, small_teacher(), {"kind": "teacher"})
    draw = f"sample {path} --nfe 2 --images 2 --out {tmp_path / 'x.png'}"
    command = f"exec {sys.executable} -m bdense {draw} >&-"
    found = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")
    assert (tmp_path / "x.png").exists()


def test_the_library_refuses_images_of_another_shape(cache):
    extractor = load_extractor("digits-classifier", cache=cache, device=torch.device("cpu"))
    reference = dataset_reference(load_dataset("digits"), extractor, cache=cache)
    for shape in ((3, 8, 8), (1, 7, 7)):
        images = torch.zeros(4, *shape, dtype=torch.uint8)
        with pytest.raises(ShapeError, match="cannot be compared with digits, whose images are 1"):
            measure_images(images, extractor, reference, nfe=1, seeds={})
    with pytest.raises(InputError, match="at least 2 images, got 1"):
        measure_images(images[:1, :, :1], extractor, reference, nfe=1, seeds={})
