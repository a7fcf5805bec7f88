"""``bdense verify``: a recorded FID is found again, or said to be another one."""

import json
import math

import pytest

from bdense.metrics.classifiers import classifier_path
from bdense.models.diffusers_files import EXTRACTOR
from bdense.models.folder import export_folder
from bdense.models.store import load_denoiser, save_denoiser
from tests.commands import DIGITS, SHORT, TINY, bdense, done, refused


@pytest.fixture(scope="module")
def student(tmp_path_factory, shared_cache):
    folder = tmp_path_factory.mktemp("verify")
    done("teacher", *TINY, "--out", folder / "teacher.safetensors")
    path = folder / "student.safetensors"
    cache = ("--cache", shared_cache, "--images", 64, "--threads", 1)
    made = ("distill", folder / "teacher.safetensors", *SHORT, *DIGITS, *cache, "--out", path)
    done(*made)
    before = path.read_bytes()
    done(*made)  # its FID is not recorded twice
    assert path.read_bytes() == before
    return path


def verified(path, cache, *options):
    return bdense("verify", path, "--cache", cache, "--json", *options)


def changed(student, path, **metadata):
    """The student with other metadata, as a file."""
    denoiser, known = load_denoiser(student)
    save_denoiser(path, denoiser, known | metadata)
    return path


def test_an_untouched_student_gives_its_fid(student, shared_cache):
    found = json.loads(verified(student, shared_cache).out)
    assert (found["verdict"], found["differing"]) == ("equal", [])
    assert found["fid"] == found["recorded"] == load_denoiser(student)[1]["fid"]["value"]
    assert (found["setup"]["threads"], found["setup"]["batch"]) == (1, 128)


@pytest.mark.parametrize(
    ("factor", "verdict", "status"), [(1 + 1e-5, "within rounding", 0), (1.001, "different", 1)]
)
def test_another_figure_is_within_rounding_or_different(
    student, shared_cache, tmp_path, factor, verdict, status
):
    fid = load_denoiser(student)[1]["fid"]
    fid["value"] *= factor
    answer = verified(changed(student, tmp_path / "s.safetensors", fid=fid), shared_cache)
    found = json.loads(answer.out)
    assert (found["verdict"], answer.status) == (verdict, status)
    assert (f"{found['recorded']:.8g}" in answer.err) == bool(status)


def test_changed_weights_are_named(student, shared_cache, tmp_path):
    denoiser, known = load_denoiser(student)
    for parameter in denoiser.parameters():
        parameter.data *= 1.1
    save_denoiser(tmp_path / "s.safetensors", denoiser, known)
    answer = verified(tmp_path / "s.safetensors", shared_cache)
    assert answer.status == 1
    assert json.loads(answer.out)["differing"] == ["weights_sha256"]


def test_a_student_of_before_is_measured_by_its_conditions(student, shared_cache, tmp_path):
    """Its file has no setup: nothing is said to differ."""
    before = changed(student, tmp_path / "s.safetensors", fid_setup={})
    found = json.loads(verified(before, shared_cache).out)
    assert (found["verdict"], found["differing"]) == ("equal", [])


def test_a_folder_has_its_own_classifier(student, shared_cache, cache, tmp_path):
    """Not the one in the cache, which another machine would train otherwise."""
    model = tmp_path / "model"
    weights = classifier_path("digits-classifier", shared_cache)
    denoiser, known = load_denoiser(student)
    pictures = {"s.png": lambda path: path.touch()}
    export_folder(model, denoiser, known, pictures=pictures)
    (model / EXTRACTOR).write_bytes(weights.read_bytes())
    assert json.loads(verified(model, cache).out)["verdict"] == "equal"
    assert not classifier_path("digits-classifier", cache).exists()


def test_a_folder_without_its_weights_says_so(student, tmp_path):
    model = tmp_path / "model"
    denoiser, known = load_denoiser(student)
    export_folder(model, denoiser, known, pictures={"samples.png": lambda path: path.touch()})
    (model / "model.safetensors").unlink()
    assert "without its weights, model.safetensors" in refused(bdense("verify", model))


@pytest.mark.parametrize(
    ("fid", "options", "names"),
    [
        ({"extractor_sha256": "ab" * 32}, (), "abababab"),
        ({"reference": "digits@16"}, ("--data", "digits"), "digits@16"),
        ({"reference": "mine.npz:0123456789abcdef"}, (), "--reference is missing"),
        ({"reference": "folder:mine:0123456789abcdef"}, (), "--data is missing"),
        ({"nfe": 7}, (), "NFE 7"),
        ({"extractor": "torchscript:mine.pt"}, (), "--extractor is missing"),
        ({"seeds": {}}, (), "records no FID that can be measured again (no 'evaluation')"),
        ({"seeds": None}, (), "records no FID"),
        ({"seeds": {"evaluation": "7"}}, (), "its seed is '7'"),
        ({"value": "low"}, (), "value must be float"),
        ({"value": math.nan}, (), "its value is nan"),
    ],
)
def test_what_cannot_be_measured_again_is_refused(
    student, shared_cache, tmp_path, fid, options, names
):
    known = load_denoiser(student)[1]["fid"]
    model = changed(student, tmp_path / "s.safetensors", fid=known | fid)
    assert names in refused(verified(model, shared_cache, *options))


@pytest.mark.parametrize(
    ("setup", "names"),
    [
        ({"data_sha256": "cd" * 32}, "cdcdcdcd"),
        ({"threads": "x"}, "threads must be int"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"execution": {"precision": "tf32"}}, "tf32 needs a CUDA device"),
    ],
)
def test_another_setup_is_refused(student, shared_cache, tmp_path, setup, names):
    known = load_denoiser(student)[1]["fid_setup"] | setup
    model = changed(student, tmp_path / "s.safetensors", fid_setup=known)
    assert names in refused(verified(model, shared_cache))
