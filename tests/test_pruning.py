"""Trials that are looked at on their way, and ended there: a real ledger, and real digits."""

import json
from pathlib import Path

import pytest
import torch
from optuna.distributions import FloatDistribution
from optuna.samplers import RandomSampler
from optuna.trial import TrialState
from search.spec.study_spec import StudySpec
from search.worker.trial import train_and_measure
from search.worker.workers import SearchWorker
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from search.errors import SpecChangedError
from search.storage.ledger import Claim, Ledger
from search.study.artifacts import attached
from search.study.folders import GRID, row_folder
from search.study.retention import CHECKPOINT, RESULT, STUDENT
from search.study.study import Study
from search.study.summary import headline, standing
from search.worker import assets
from search.worker.pruning import LOOKS_FILE, judge_of
from tests.e2e.study import small_study
from tests.studies import spec
from tests.test_trial import InterruptedRunError, interrupted_after

AT = [0.25, 0.5]
HALVING = {"pruner": "successive-halving", "at": AT, "startup_trials": 1}
# 40 iterations of 64 images: looks after 640 and 1280.
STEPS = (640, 1280)


class Search:
    """A study whose trials' FIDs on the way are given, and nothing is trained."""

    def __init__(self, folder: Path, pruning: dict) -> None:
        self.spec = spec(pruning=pruning)
        url = f"sqlite:///{folder}/study.db"
        self.ledger = Ledger.open(url, "digits", budget=100)

    def claim(self) -> Claim:
        claim = self.ledger.claim({"a": FloatDistribution(0.0, 1.0)}, RandomSampler)
        assert isinstance(claim, Claim)
        return claim

    def trial(self, *fids: float) -> int | None:
        """Run one with these FIDs at its looks; the images after which it was pruned, if it was.

        It ends with the last of them.
        """
        claim = self.claim()
        judge = judge_of(self.spec, self.ledger, claim)
        for step, fid in zip(STEPS, fids, strict=True):
            if judge(step, fid):
                self.ledger.prune(claim, {})
                return step
        self.ledger.complete(claim, fids[-1], {})
        return None


def test_the_median_ends_what_is_worse_than_most_after_the_first_trials(tmp_path):
    looked = Search(tmp_path, {"pruner": "median", "at": AT, "startup_trials": 3})
    for fid in (20.0, 30.0, 90.0):
        assert looked.trial(fid, fid) is None
    assert looked.trial(29.0, 28.0) is None
    assert looked.trial(29.9, 31.0) == 640  # the median of 20, 29, 30, 90 is 29.5
    # The best of its FIDs so far counts: 28.5 is not above the median of the second looks, 29.
    assert looked.trial(28.5, 95.0) is None
    assert looked.trial(29.4, 29.4) == 640
    counts = looked.ledger.counts()
    assert (counts.complete, counts.pruned) == (5, 2)


def test_a_percentile_ends_all_but_the_best_share(tmp_path):
    pruning = {"pruner": "percentile", "percentile": 25, "at": AT, "startup_trials": 4}
    looked = Search(tmp_path, pruning)
    for fid in (10.0, 20.0, 30.0, 40.0):
        looked.trial(fid, fid)
    assert looked.trial(17.0, 18.0) is None  # the first quartile is 17.5, then 17
    assert looked.trial(17.1, 17.1) == 640


def test_halving_has_a_rung_at_each_look_and_lets_half_of_each_go_on(tmp_path):
    looked = Search(tmp_path, HALVING)
    assert looked.trial(20.0, 15.0) is None
    assert looked.trial(30.0, 10.0) == 640  # the better of 2 goes on
    assert looked.trial(25.0, 10.0) == 640  # the best of 3
    assert looked.trial(21.0, 16.0) == 1280  # among the best 2 of 4; of 2 at the second rung not
    assert looked.trial(19.0, 14.0) is None  # of 3 there the best
    assert looked.trial(20.5, 14.5) is None  # of 6 the third, of 4 there the second


def test_the_factor_says_of_how_many_one_goes_on(tmp_path):
    looked = Search(tmp_path, HALVING | {"factor": 4})
    verdicts = [looked.trial(fid, fid) for fid in (10.0, 11.0, 12.0, 13.0, 10.5)]
    # Of 5 at the first rung one goes on, by halves the second best would.
    assert verdicts == [None, 640, 640, 640, 640]
    (tmp_path / "halves").mkdir()
    looked = Search(tmp_path / "halves", HALVING)
    verdicts = [looked.trial(fid, fid) for fid in (10.0, 11.0, 12.0, 13.0, 10.5)]
    assert verdicts == [None, 640, 640, 640, 1280]


def test_hyperbands_brackets_begin_to_prune_at_one_look_each_and_one_never(tmp_path):
    looked = Search(tmp_path, HALVING | {"pruner": "hyperband"})
    verdicts = [looked.trial(10.0 + number, 10.0 + number) for number in range(40)]
    assert set(verdicts) == {640, 1280, None}
    # 3 brackets get 4, 3 and 3 of 10 trials; the first trial of each goes on.
    assert verdicts.count(None) >= 6


def test_a_patient_median_waits_for_a_trial_that_still_gains(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.test_pruning.STEPS", (640, 1280, 1920))
    at = [*AT, 0.75]
    pruning = {"pruner": "patient-median", "at": at, "startup_trials": 2, "patience": 0}
    looked = Search(tmp_path, pruning)
    for _ in range(3):
        assert looked.trial(10.0, 9.0, 8.0) is None
    assert looked.trial(50.0, 40.0, 30.0) is None
    assert looked.trial(50.0, 51.0, 30.0) == 1280


def test_none_looks_and_ends_nothing(tmp_path):
    looked = Search(tmp_path, {"at": AT})
    assert [looked.trial(fid, fid) for fid in (10.0, 99.0, 999.0)] == [None] * 3
    stored = [trial.intermediate_values for trial in looked.ledger.study.trials]
    assert stored == [{640: fid, 1280: fid} for fid in (10.0, 99.0, 999.0)]


def test_a_look_told_again_by_who_took_over_is_judged_as_before(tmp_path):
    looked = Search(tmp_path, HALVING)
    looked.trial(20.0, 20.0)
    claim = looked.claim()
    assert not judge_of(looked.spec, looked.ledger, claim)(640, 15.0)
    looked.ledger.release(claim)
    again = looked.claim()
    assert again.number == claim.number
    judge = judge_of(looked.spec, looked.ledger, again)
    assert not judge(640, 15.0)
    assert judge(1280, 30.0)  # the second rung's first trial is 20.0
    assert looked.ledger.study.trials[1].intermediate_values == {640: 15.0, 1280: 30.0}


@pytest.mark.parametrize("pruner", ["successive-halving", "hyperband", "median"])
def test_a_verdict_stands_for_whoever_takes_over(tmp_path, pruner):
    """Its worker dies before it tells; meanwhile others make the trial look better."""
    looked = Search(tmp_path, HALVING | {"pruner": pruner})
    for fid in (20.0, 19.0, 18.0, 17.0):
        looked.trial(fid, fid)
    claim = looked.claim()
    while not judge_of(looked.spec, looked.ledger, claim)(640, 90.0):
        claim = looked.claim()  # hyperband's brackets are of different patience
    looked.ledger.release(claim)
    ahead = looked.claim()
    assert ahead.number == claim.number
    assert judge_of(looked.spec, looked.ledger, ahead)(640, 90.0)
    looked.ledger.prune(ahead, {})
    assert looked.ledger.counts().pruned >= 1


@pytest.mark.parametrize("lost_at", ["completed_rung_0", "verdict:640"])
def test_a_verdict_whose_answer_was_lost_is_the_same(tmp_path, monkeypatch, lost_at):
    """A note of successive halving would change the next judgement of the same look."""
    looked = Search(tmp_path, HALVING)
    looked.trial(20.0, 20.0)
    claim = looked.claim()
    storage = looked.ledger.study._storage
    write, lost = storage.set_trial_system_attr, []

    def losing(trial_id: int, key: str, value: object) -> None:
        write(trial_id, key, value)
        if key == lost_at and not lost:
            lost.append(key)
            raise PoolTimeoutError("no connection")

    monkeypatch.setattr(storage, "set_trial_system_attr", losing)
    assert judge_of(looked.spec, looked.ledger, claim)(640, 30.0)
    assert lost == [lost_at]
    # The others see its rung, once.
    stored = looked.ledger.study.trials[claim.number].system_attrs
    assert stored["completed_rung_0"] == 30.0


# ---- real digits ----


@pytest.fixture
def folders(tmp_path, monkeypatch, shared_cache) -> Path:
    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("BDENSE_CACHE", str(shared_cache))
    return tmp_path


def digits(**sections) -> StudySpec:
    study = small_study(
        weights={"a": {"low": -20.0, "high": 3.0}},
        resources={"gpus": 0, "checkpoint_seconds": 60},
    )
    study["teacher"]["train"]["kimg"] = 2
    budget = study["budget"] | {"kimg": 0.64, "batch": 32} | sections.pop("budget", {})
    return StudySpec.model_validate(study | {"budget": budget} | sections)


def prepared(study: StudySpec) -> assets.Assets:
    cpu = torch.device("cpu")
    assets.prepare(study, cpu, lambda *_: None)
    return assets.load(study, cpu, record=True)


def run(study: StudySpec, points: list[float], folder: Path) -> Study:
    """The search's own worker on these points, in this process."""
    prepared(study)
    record = Study.create(f"sqlite:///{folder}/study.db", study)
    for a in points:
        record.trials.enqueue({"a": a})
    worker = SearchWorker(record)
    while (claimed := worker.claim()) is not None:
        worker.work(claimed)
    return record


@pytest.mark.slow
def test_a_clearly_bad_point_is_pruned_and_the_others_are_what_they_would_be(folders):
    """a = -20 leaves the branch that draws as the teacher made it."""
    pruning = {"pruner": "median", "at": AT, "images": 128, "startup_trials": 2}
    record = run(digits(pruning=pruning), [1.0, 0.5, -20.0], folders)
    first, second, bad = record.trials.study.trials
    states = [trial.state for trial in (first, second, bad)]
    assert states == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.PRUNED]
    looks = first.user_attrs["intermediate"]
    assert [(look["fraction"], look["trained_images"]) for look in looks] == [
        (0.25, 160),
        (0.5, 320),
    ]
    # Each FID on the way says what it is of; the last one is of other images.
    assert {(look["images"], look["nfe"], look["reference"]) for look in looks} == {
        (128, 2, "digits")
    }
    assert first.user_attrs["fid"]["images"] == 256
    assert first.intermediate_values == {160: looks[0]["fid"], 320: looks[1]["fid"]}
    attrs = bad.user_attrs
    assert (attrs["pruned_at"], attrs["a"]) == (0.25, -20.0)
    [look] = attrs["intermediate"]
    assert look["fid"] > max(trial.intermediate_values[160] for trial in (first, second))
    expected = f"median: FID {look['fid']:.3f} of 128 images at 0.25 of the budget"
    assert attrs["reason"] == expected
    assert {"student_seconds", "looks_seconds", "service_seconds"} == set(attrs["timings"])
    folder = row_folder("small", 2)
    assert not (folder / CHECKPOINT).exists()
    assert not (folder / STUDENT).exists()
    (grid,) = attached(record.trials.storage, bad)
    assert grid.filename == GRID
    assert (row_folder("small", 1) / STUDENT).exists()
    # Baselines are looked at by nobody.
    assert [row.intermediate_values for row in record.baselines.study.trials] == [{}, {}]
    now = standing(record)
    assert headline(now) == "study small: 2 of 3 trials complete, 1 pruned, 0 failed, 0 running"
    assert now.best["fid"] == min(first.value, second.value)
    # Looks and pruning change no trial's number.
    plain = digits(name="plain")
    quiet = {"check": lambda: None, "report": lambda _: None}
    found = train_and_measure(prepared(plain), {"a": 1.0}, folders / "plain" / "00000", **quiet)
    assert found["value"] == first.value
    assert "intermediate" not in found["attrs"]
    # FIDs on the way of other images would be compared with these.
    other = digits(pruning=pruning | {"images": 64})
    expected = r"pruning.at \[0.25, 0.5\] of 128 images stored, .* of 64 given\); restore them"
    with pytest.raises(SpecChangedError, match=expected):
        Study.create(record.url, other)
    Study.create(record.url, digits())


def test_whoever_takes_over_tells_the_looks_again_and_ends_the_same(folders):
    study = digits(budget={"kimg": 0.256}, pruning={"at": AT, "images": 64})
    shared = prepared(study)  # 8 iterations, looks after 2 and 4
    quiet = {"report": lambda _: None}
    told: list[tuple[int, float]] = []

    def judge(images: int, fid: float) -> bool:
        told.append((images, fid))
        return False

    place, calm = (folders / "study" / name for name in ("00000", "00001"))
    expected = train_and_measure(
        shared, {"a": 1.0}, calm, check=lambda: None, judge=judge, **quiet
    )
    before = list(told)
    # Checks: 2 iterations, 64 images drawn and judged, 2 iterations, and the second look begun.
    with pytest.raises(InterruptedRunError):
        train_and_measure(
            shared, {"a": 1.0}, place, check=interrupted_after(6), judge=judge, **quiet
        )
    assert (place / CHECKPOINT).exists()
    assert len(json.loads((place / LOOKS_FILE).read_text())) == 1
    told.clear()
    found = train_and_measure(shared, {"a": 1.0}, place, check=lambda: None, judge=judge, **quiet)
    assert told == before[1:]
    assert found["value"] == expected["value"]
    assert found["attrs"]["intermediate"] == expected["attrs"]["intermediate"]
    assert [look["fid"] for look in found["attrs"]["intermediate"]] == [fid for _, fid in before]


def test_a_pruned_trial_that_nobody_told_is_told_by_whoever_takes_over(folders):
    """Not judged again, by when others may have made it look better."""
    study = digits(budget={"kimg": 0.256}, pruning={"at": AT, "images": 64})
    shared, place = prepared(study), folders / "study" / "00000"
    quiet = {"check": lambda: None, "report": lambda _: None}
    first = train_and_measure(shared, {"a": 1.0}, place, judge=lambda *_: True, **quiet)
    assert (first["value"], first["attrs"]["pruned_at"]) == (None, 0.25)
    assert not (place / CHECKPOINT).exists()
    assert json.loads((place / RESULT).read_text()) == first
    assert (place / GRID).exists()
    again = train_and_measure(shared, {"a": 1.0}, place, judge=lambda *_: False, **quiet)
    assert again == first
