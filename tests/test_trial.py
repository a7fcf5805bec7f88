"""What a trial measures beside its FID, in this process: no Ray, no database."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from search.spec.study_spec import StudySpec
from search.worker.trial import CHECKPOINT, STUDENT, train_and_measure

from bdense.data.datasets import load_dataset
from bdense.diffusion.sampling import draw_images, sampler_from
from bdense.errors import InputError
from bdense.metrics.metrics import MetricSettings
from bdense.metrics.references import dataset_reference, write_reference
from bdense.models.cards import card_path, model_card
from bdense.models.store import load_denoiser, load_tensors, save_denoiser
from search.worker import assets
from tests.small import small_teacher
from tests.studies import NORMALISED, spec

CPU = torch.device("cpu")
SLOPE = {"a": 1.0}
TINY = {
    "teacher__train__kimg": 0.128,
    "teacher__train__batch": 32,
    "budget__kimg": 0.128,
    "budget__batch": 32,
    "weights": NORMALISED,
    "trajectories": {"mode": "live"},
    "resources": {"gpus": 0},
}


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch, shared_cache) -> None:
    """The digits classifier is trained once for all tests."""
    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("BDENSE_CACHE", str(shared_cache))


def prepared(study: StudySpec) -> assets.Assets:
    assets.prepare(study, CPU, lambda *_: None)
    return assets.load(study, CPU)


def attrs(shared: assets.Assets, folder: Path, params: Mapping[str, Any] = SLOPE) -> dict:
    quiet = {"check": lambda: None, "report": lambda _: None}
    return train_and_measure(shared, params, folder, **quiet)["attrs"]


def test_a_trial_stores_the_metrics_it_was_asked_for(tmp_path, monkeypatch):
    # A hundred subsets take a quarter of a minute.
    few = functools.partial(MetricSettings, kid_subsets=2)
    monkeypatch.setattr("bdense.metrics.metrics.MetricSettings", few)
    shared = prepared(
        spec(**TINY, evaluation__images=1000, evaluation__metrics=["fid", "kid", "prc"])
    )
    found = attrs(shared, tmp_path / "00000")
    assert shared.reference.features.shape == (1797, 64)
    kid, prc, fid = found["kid"], found["prc"], found["fid"]
    assert fid["value"] > 0
    assert kid["mean"] > kid["std"] > 0
    assert (kid["subsets"], kid["subset_size"], prc["neighbours"]) == (2, 1000, 5)
    assert 0 <= prc["precision"] <= 1
    for other in (kid, prc):
        assert {key: other[key] for key in fid if key != "value"} == {
            key: value for key, value in fid.items() if key != "value"
        }
    # What the study optimises is the same number without them.
    alone = attrs(prepared(spec(**TINY, evaluation__images=1000)), tmp_path / "00001")
    assert alone["fid"] == fid
    assert not alone.keys() & {"kid", "prc"}


class InterruptedRunError(Exception):
    pass


def interrupted_after(iterations: int) -> Callable[[], None]:
    """A ``check`` that ends the work in the iteration after so many."""
    left = iter(range(iterations))

    def check() -> None:
        if next(left, None) is None:
            raise InterruptedRunError

    return check


def test_learned_weights_are_stored_over_time_and_drawn_also_after_an_interruption(tmp_path):
    resources = {"gpus": 0, "checkpoint_seconds": 1e-9}
    shared = prepared(spec(**TINY | {"weights": "learned", "resources": resources}))
    params = {"rule": "gradient-norm", "strength": 1.5}
    calm, taken_over = tmp_path / "study" / "00000", tmp_path / "study" / "00001"
    expected = attrs(shared, calm, params)
    with pytest.raises(InterruptedRunError):
        train_and_measure(
            shared, params, taken_over, check=interrupted_after(2), report=lambda _: None
        )
    assert (taken_over / CHECKPOINT).exists()
    found = attrs(shared, taken_over, params)
    stored = ("fid", "rule", "strength", "weights", "weights_over_time")
    assert {key: found[key] for key in stored} == {key: expected[key] for key in stored}
    assert (found["rule"], found["strength"]) == ("gradient-norm", 1.5)
    assert not found.keys() & {"a", "b"}
    history = found["weights_over_time"]
    assert history["iterations"] == [0, 1, 2, 3]
    assert history["weights"][-1] == pytest.approx(found["weights"], abs=1e-6)
    assert found["weights_plot"] == "study/00001/weights.png"
    assert (taken_over / "weights.png").stat().st_size > 1000
    _, metadata = load_denoiser(taken_over / STUDENT)
    assert (metadata["weights"], metadata["params"]) == (found["weights"], params)
    assert metadata["weighting"] == params | {"memory": 100}
    card = card_path(taken_over / STUDENT).read_text()
    assert " at the end, learned by gradient-norm (strength 1.5, memory 100)" in card


@pytest.mark.parametrize("checks", [4, 6], ids=["drawing", "judging"])
def test_whoever_takes_over_from_an_evaluation_trains_no_more(tmp_path, checks):
    """Checks: 4 iterations, two batches of images drawn, one of them judged."""
    shared, quiet = prepared(spec(**TINY)), {"report": lambda _: None}
    place = tmp_path / "00000"
    with pytest.raises(InterruptedRunError):
        train_and_measure(shared, SLOPE, place, check=interrupted_after(checks), **quiet)
    assert load_tensors(place / CHECKPOINT)[1]["iteration"] == 4
    texts: list[str] = []
    found = train_and_measure(
        shared, SLOPE, place, check=interrupted_after(3), report=texts.append
    )
    assert texts == ["evaluating 128/256 images", "evaluating 256/256 images"]
    assert not (place / CHECKPOINT).exists()
    assert found["attrs"]["fid"] == attrs(shared, tmp_path / "00001")["fid"]


def test_given_weights_have_no_history(tmp_path):
    found = attrs(prepared(spec(**TINY)), tmp_path / "00000")
    assert found["a"] == 1.0
    assert "weighting" not in load_denoiser(tmp_path / "00000" / STUDENT)[1]
    assert not found.keys() & {"rule", "strength", "weights_over_time", "weights_plot"}
    assert not (tmp_path / "00000" / "weights.png").exists()


def test_too_few_images_for_a_metric_are_refused_before_a_trial():
    study = spec(**TINY, evaluation__metrics=["fid", "kid"])
    expected = "kid needs at least 1000 images, got 256; .* evaluation.images and evaluation.met"
    with pytest.raises(InputError, match=expected):
        assets.prepare(study, CPU, lambda *_: None)


def test_a_reference_file_takes_the_data_sets_place(tmp_path, digits_extractor, shared_cache):
    by_data = prepared(spec(**TINY))
    digits = dataset_reference(load_dataset("digits"), digits_extractor, cache=shared_cache)
    path = tmp_path / "digits.npz"
    write_reference(path, digits.statistics, "digits", digits_extractor)
    by_file = prepared(spec(**TINY, evaluation__reference=str(path)))
    found = attrs(by_file, tmp_path / "00000")["fid"]
    expected = attrs(by_data, tmp_path / "00001")["fid"]
    assert found["value"] == expected["value"]
    assert found["reference"].startswith("digits.npz:")
    assert (found["reference_images"], expected["reference"]) == (1797, "digits")


def test_a_students_images_can_be_drawn_again(tmp_path):
    """The metadata of the file that a trial leaves names its FID and how to draw."""
    from bdense.models.store import load_denoiser

    shared = prepared(spec(**TINY))
    found = attrs(shared, tmp_path / "00000")
    student, metadata = load_denoiser(tmp_path / "00000" / STUDENT)
    assert metadata["fid"] == found["fid"]
    images = draw_images(student, sampler_from(metadata["sampler"]), 4, seed=0)
    assert images.shape == (4, 1, 8, 8)


def test_a_trials_student_carries_its_teachers_licence(tmp_path):
    """In its header and in the card beside it."""
    teacher = small_teacher()
    path = tmp_path / "teacher.safetensors"
    save_denoiser(path, teacher, {"licence": "CC-BY-NC-SA-4.0", "source": "edm-x"})
    study = spec(**TINY | {"teacher": {"checkpoint": str(path)}})
    attrs(prepared(study), tmp_path / "00000")
    student, metadata = load_denoiser(tmp_path / "00000" / STUDENT)
    assert (metadata["licence"], metadata["teacher"]) == ("CC-BY-NC-SA-4.0", "edm-x")
    assert metadata["method"] == "sfd-bdense"
    card = card_path(tmp_path / "00000" / STUDENT).read_text()
    assert card == model_card(STUDENT, student, metadata)
    assert card.startswith("---\nlicense: cc-by-nc-sa-4.0\n")
    assert "| FID | " in card
