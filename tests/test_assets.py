"""What a study's trials share: made as the spec asks, and refused before anything is spent."""

from pathlib import Path

import pytest
import torch
from search.worker.trial import STUDENT, train_and_measure

from bdense.data.datasets import Dataset, load_dataset
from bdense.errors import InputError
from bdense.execution import Execution
from bdense.metrics.references import dataset_reference, write_reference
from bdense.models.store import load_denoiser, save_denoiser
from search.worker import assets
from tests.small import same_weights, small_teacher
from tests.studies import NORMALISED, REMOVED, spec

CPU = torch.device("cpu")
TINY = {
    "budget": {"trials": 1, "kimg": 0.064, "batch": 32, "lr": 5e-4},
    "weights": NORMALISED,
    "trajectories": {"mode": "live"},
}


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch, shared_cache) -> None:
    """The digits classifier is trained once for all tests."""
    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("BDENSE_CACHE", str(shared_cache))


@pytest.fixture
def finished(tmp_path, digits_extractor, shared_cache) -> dict:
    """A study's keys where teacher and reference are files."""
    save_denoiser(tmp_path / "teacher.safetensors", small_teacher(), {})
    digits = dataset_reference(load_dataset("digits"), digits_extractor, cache=shared_cache)
    write_reference(tmp_path / "digits.npz", digits.statistics, "digits", digits_extractor)
    return TINY | {
        "data": REMOVED,
        "teacher": {"checkpoint": str(tmp_path / "teacher.safetensors")},
        "evaluation__reference": str(tmp_path / "digits.npz"),
    }


@pytest.fixture
def no_data(monkeypatch) -> None:
    """Whoever asks for a data set is stopped."""

    def refuse(name: str) -> Dataset:
        raise AssertionError(f"{name} was asked for")

    monkeypatch.setattr(assets, "load_dataset", refuse)


def run(study, folder: Path) -> float:
    assets.prepare(study, CPU, lambda *_: None)
    shared = assets.load(study, CPU)
    quiet = {"check": lambda: None, "report": lambda _: None}
    return train_and_measure(shared, {"a": 1.0}, folder, **quiet)["value"]


@pytest.mark.usefixtures("no_data")
def test_with_a_finished_teacher_and_a_reference_no_data_is_loaded(tmp_path, finished):
    assert run(spec(**finished), tmp_path / "00000") > 0
    # Nor where a data set is named that is not needed.
    assert assets.load_data(spec(**finished | {"data": "cifar10"})) is None


def test_teacher_and_students_compute_as_the_study_asks(tmp_path, finished):
    """bfloat16 has 8 bits: close to float32, and not equal to it."""
    halved = spec(**finished, precision="bfloat16", resources={"channels_last": True})
    folders = {study.precision: tmp_path / study.precision for study in (halved, spec(**finished))}
    values = {s.precision: run(s, folders[s.precision]) for s in (halved, spec(**finished))}
    asked = assets.load(halved, CPU).teacher.execution
    assert asked == Execution(precision="bfloat16", channels_last=True)
    assert values["bfloat16"] != values["float32"]
    assert values["bfloat16"] == pytest.approx(values["float32"], rel=0.2)
    students = {p: load_denoiser(folder / STUDENT) for p, folder in folders.items()}
    assert not same_weights(students["bfloat16"][0], students["float32"][0])
    assert all(metadata["precision"] == p for p, (_, metadata) in students.items())
    parameters = students["bfloat16"][0].parameters()
    assert {parameter.dtype for parameter in parameters} == {torch.float32}


@pytest.mark.usefixtures("no_data")
@pytest.mark.parametrize("precision", ["float16", "tf32"])
def test_what_a_machine_does_not_compute_is_refused_first(precision):
    study = spec(**TINY, precision=precision)
    with pytest.raises(InputError, match=f"precision {precision} needs a CUDA device, not cpu"):
        assets.prepare(study, CPU, lambda *_: None)


def test_gpus_that_torch_cannot_use_are_refused(monkeypatch):
    """Ray hands them out all the same, and they would be held for nothing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for gpus in (0.5, 1, 2):
        study = spec(resources={"gpus": gpus})
        with pytest.raises(
            InputError, match=f"^resources.gpus is {gpus:g}, and on .* no GPU: "
        ) as e:
            assets.use_device(study)
        assert f"torch {torch.__version__} is built " in str(e.value)
        assert "or set resources.gpus to 0 to train on CPUs" in str(e.value)
    for gpus in (0, "auto"):
        assert assets.use_device(spec(resources={"gpus": gpus})) == CPU
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(InputError, match="is built without CUDA; install"):
        assets.use_device(spec(resources={"gpus": 1}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for gpus in (0, 0.5, 1, "auto"):
        device = assets.use_device(spec(resources={"gpus": gpus}))
        assert device.type == ("cuda" if gpus else "cpu")
