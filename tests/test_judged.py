"""Models are drawn as they were distilled, and compared with what they were trained on."""

import json

import pytest
import torch

from bdense.data.datasets import load_dataset
from bdense.diffusion.sampling import Sampler, draw_images
from bdense.diffusion.schedules import Schedule
from bdense.errors import InputError, ShapeError
from bdense.metrics.extractors import load_extractor
from bdense.metrics.metrics import measure_images
from bdense.metrics.references import dataset_reference
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

    monkeypatch.setattr("bdense.verbs.fid.draw_images", drawn)
    options = ("--data", data, "--extractor", extractor, "--cache", cache, "--images", 4)
    assert "digits" in refused(bdense("fid", path, *options))
    teacher = tmp_path / "t.safetensors"
    save_denoiser(teacher, small_teacher(channels=channels), {"kind": "teacher"})
    out = ("--out", tmp_path / "s.safetensors")
    assert "digits" in refused(bdense("distill", teacher, *SHORT, *options, *out))
    assert not (tmp_path / "s.safetensors").exists()


def test_the_library_refuses_images_of_another_shape(cache):
    extractor = load_extractor("digits-classifier", cache=cache, device=torch.device("cpu"))
    reference = dataset_reference(load_dataset("digits"), extractor, cache=cache)
    for shape in ((3, 8, 8), (1, 7, 7)):
        images = torch.zeros(4, *shape, dtype=torch.uint8)
        with pytest.raises(ShapeError, match="cannot be compared with digits, whose images are 1"):
            measure_images(images, extractor, reference, nfe=1, seeds={})
    with pytest.raises(InputError, match="at least 2 images, got 1"):
        measure_images(images[:1, :, :1], extractor, reference, nfe=1, seeds={})
