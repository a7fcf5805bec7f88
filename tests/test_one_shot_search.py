"""A search by a one-shot training: its plan, its row, its curve, the trials that follow."""

import json
import math

import pytest

from bdense.metrics.records import FID
from search.errors import SpecError
from search.spec.file import parse, read_spec
from search.spec.plan import OneShotSpec, SearchPlan
from search.spec.resolve import resolve
from search.spec.space import make_sampler, search_space
from search.storage.ledger import Claim
from search.study.arms import ROW_SPACE, ArmRow, one_shot_arm
from search.study.curve import curve_of, enqueue_best, one_shot_pending
from search.study.notes import trial_note
from search.study.results import Curve, CurvePoint, TrialResult
from search.study.study import Study
from search.worker.one_shot import CURVE_FILE
from search.worker.worker import Worker
from tests.measured import command, fid, finish
from tests.rows import (
    PD,
    SFD,
    InterruptedRunError,
    comparable,
    interrupted_after,
    loaded,
    run,
    task,
)
from tests.studies import (
    CONSISTENCY,
    NORMALISED,
    PROMOTION,
    STUDY,
    changed,
    resolve_here,
    spec,
    write,
)

ONE = {"one_shot": {"length": 2, "points": 3, "best": 2}, "replicates": 1}
SEARCHED = changed(STUDY, weights=NORMALISED, plan=ONE)
DDPM = {"checkpoint": "google/ddpm-cifar10-32"}


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch, shared_cache) -> None:
    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("BDENSE_CACHE", str(shared_cache))


# ---- the plan ----


def test_the_word_is_a_search_of_its_best_points_alone():
    word = spec(SEARCHED, plan="one-shot").plan
    assert word == SearchPlan(trials=3, one_shot=OneShotSpec())
    assert spec(SEARCHED, plan={"one_shot": {"best": 5}}).search.trials == 5
    assert spec(SEARCHED, plan={"one_shot": {}, "trials": 9}).search.trials == 9


def test_a_one_shot_training_leaves_a_study_s_fingerprint():
    usual = spec(SEARCHED, plan={"trials": 4})
    assert spec(SEARCHED).fingerprint() == usual.fingerprint()
    stored = usual.as_dict()
    del stored["plan"]["one_shot"]  # as before there was one
    assert type(usual).read(stored) == usual


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"weights": {"name": "learned"}}, "plan.one_shot: learned weights have no coordinates"),
        ({"method": CONSISTENCY}, "plan.one_shot: .* single images"),
        ({"method__nfe": [1, 2]}, r"plan.one_shot: nfe \[1, 2\]"),
        ({"method__guidance_student": 2.0}, "method.guidance_student 2 needs"),
        ({"plan": {**ONE, "trials": 1}}, "plan.trials 1 .* one_shot.best 2"),
        ({"plan": {"one_shot": {"points": 1}}}, "plan.one_shot.points .* got 1"),
        ({"plan": {"one_shot": {"lenght": 1}}}, "plan.one_shot.lenght .*did you mean length"),
        ({"plan": "one-shoot"}, "plan must be one-shot or a mapping"),
    ],
)
def test_what_cannot_be_asked_so_is_refused_in_one_line(keys, said):
    with pytest.raises(SpecError, match=said) as refusal:
        resolve(parse(changed(SEARCHED, **keys), source="study.yaml"), source="study.yaml")
    assert "\n" not in str(refusal.value)


def test_networks_of_diffusers_can_be_told_weights():
    judge = {"extractor": "cifar10-classifier", "images": 256}
    tree = changed(PROMOTION, data="cifar10", teacher=DDPM, plan="one-shot", evaluation=judge)
    assert spec(tree).search.one_shot == OneShotSpec()


def test_trials_of_the_command_line_extend_a_plan_of_one_word(tmp_path, monkeypatch):
    resolve_here(monkeypatch)
    path = write(tmp_path, SEARCHED, plan="one-shot")
    found = read_spec(path, {"plan": {"trials": 8}}).search
    assert (found.trials, found.one_shot) == (8, OneShotSpec())


# ---- its row in the study ----


def curve(fids: dict[float, float]) -> Curve:
    points = [
        CurvePoint(params={"a": a}, coordinates=[a], fid=value, error=0.1)
        for a, value in fids.items()
    ]
    return Curve(axes=["a"], points=points, conditions=FID.read(fid(1.0)).conditions())


def end_one_shot(study: Study, found: Curve) -> None:
    """Complete the one-shot row with a chosen curve."""
    assert study.given is not None
    claim = study.given.claim(ROW_SPACE, None)
    assert isinstance(claim, Claim)
    row = ArmRow(**claim.params)
    assert study.arms[row.arm] == one_shot_arm(study.spec)
    lowest = found.ranked[0].fid
    ended = TrialResult(
        value=lowest,
        curve=found,
        fingerprint="",
        seeds={},
        versions={},
        device="",
        worker="",
        timings={},
    )
    study.given.complete(claim, lowest, ended.attrs())


def test_trials_wait_for_the_curve_and_begin_with_its_best_points(url):
    study = Study.create(url, spec(SEARCHED, plan={**ONE, "trials": 4}))
    assert one_shot_pending(study)
    assert enqueue_best(study) == []
    end_one_shot(study, curve({-0.5: 4.0, 0.0: 2.5, 1.25: 2.75, 3.0: 2.0}))
    assert not one_shot_pending(study)
    again = Study.open(url, study.name)
    for each in (study, again, study):  # workers at once, or one that took over
        assert [point.params for point in enqueue_best(each)] == [{"a": 3.0}, {"a": 1.25}]
    own = study.spec
    claimed = [
        again.search.claim(search_space(own), lambda n: make_sampler(own, n)) for _ in range(4)
    ]
    params = [claim.params["a"] for claim in claimed if isinstance(claim, Claim)]
    assert params[:2] == [3.0, 1.25]
    assert len(set(params)) == 4


def test_points_beyond_the_bound_are_no_trials(url):
    bounded = {**NORMALISED, "largest": 3.0}
    study = Study.create(url, spec(SEARCHED, weights=bounded))
    end_one_shot(study, curve({3.0: 2.0, 0.5: 2.5, 1.0: 2.6}))
    assert [point.params for point in enqueue_best(study)] == [{"a": 0.5}, {"a": 1.0}]


def test_another_range_or_length_is_another_training(url):
    study = Study.create(url, spec(SEARCHED))
    end_one_shot(study, curve({0.5: 2.0}))
    assert curve_of(study) is not None
    wider = {**NORMALISED, "a": {"low": -1.0, "high": 3.0}}
    for change in ({"weights": wider}, {"plan__one_shot__length": 4}):
        other = Study.create(url, spec(SEARCHED, **change))
        assert one_shot_pending(other)
        assert curve_of(other) is None
    assert curve_of(Study.create(url, spec(SEARCHED))) == curve_of(study)


def test_the_curve_is_no_baseline_and_is_shown(url):
    study = Study.create(url, spec(SEARCHED))
    assert "one_shot" in json.loads(command("status", study.name, "--json").out)
    found = curve({-0.5: 4.0, 0.5: 2.5, 1.0: 2.0})
    end_one_shot(study, found)
    finish(study, lambda arm, _: 12.0 if arm.baseline == "plain" else 11.0)
    told = json.loads(command("best", study.name, "--json").out)
    assert Curve.read(told["one_shot"]) == found
    assert set(told["baselines"]) == {"sfd", "uniform"}
    shown = command("best", study.name).out
    assert "one-shot curve: FID 2.000 at a 1.000" in shown
    assert "2.500" in shown
    assert "FID 2.000 at a 1.000" in command("status", study.name).out
    _, _, row = study.complete_arms()[0]
    assert "2.500" in trial_note("one-shot", TrialResult.of(row.value, row.user_attrs), [])


# ---- its work ----


def one_shot_task(tree, **keys):
    arm = one_shot_arm(spec(tree, **keys))
    assert arm is not None
    return loaded(tree, **keys), task(arm.params, arm=arm.name)


@pytest.mark.parametrize("tree", [SFD, PD], ids=["sfd", "progressive"])
def test_a_row_is_a_curve_on_latents_of_its_own(tmp_path, tree):
    tree = changed(tree, plan=ONE)
    assets, own = one_shot_task(tree)
    folder, told = tmp_path / "study/00000", []
    found = run(assets, folder, own, report=told.append)
    assert found.curve.axes == ["a"]
    space = assets.spec.space.a
    middle = (space.low + space.high) / 2
    assert [p.coordinates for p in found.curve.points] == [[space.low], [middle], [space.high]]
    assert found.value == min(p.fid for p in found.curve.points)
    assert found.curve.ranked[0].error == 0
    assert all(math.isfinite(p.error) for p in found.curve.points)
    assert found.curve.conditions["seeds"]["evaluation"] != assets.spec.seeds.evaluation
    assert (found.fid, found.student, list(folder.glob("*.safetensors"))) == (None, None, [])
    length = 2 * assets.spec.resolved.stages[-1].num_updates
    assert any(f"training {length}/{length}" in text for text in told)
    assert run(assets, folder, own) == found  # read, not measured


def test_a_row_that_is_interrupted_ends_as_one_that_was_not(tmp_path):
    """In its training, and between two points of its curve."""
    tree = changed(SFD, plan=ONE, resources={"gpus": 0, "checkpoint_seconds": 1e-9})
    assets, own = one_shot_task(tree)
    whole = run(assets, tmp_path / "whole/00000", own)
    folder = tmp_path / "study/00000"
    for checks in (3, 9):
        with pytest.raises(InterruptedRunError):
            run(assets, folder, own, check=interrupted_after(checks))
    while not (folder / CURVE_FILE).exists():
        checks += 1
        with pytest.raises(InterruptedRunError):
            run(assets, folder, own, check=interrupted_after(checks))
    assert comparable(run(assets, folder, own)) == comparable(whole)


def test_several_coordinates_are_told_and_their_best_points_are_of_the_space(tmp_path):
    free = {"name": "free", "log_ratio": {"low": -2.0, "high": 2.0}}
    plan = {"one_shot": {"length": 1, "points": 4, "best": 2}}
    assets, own = one_shot_task(SFD, weights=free, plan=plan)
    found = run(assets, tmp_path / "study/00000", own).curve
    assert found.axes == ["l_1", "l_2", "l_3"]
    assert len({tuple(point.coordinates) for point in found.points}) == 4
    for point in found.points:
        assert assets.spec.space.coordinates(point.params) == tuple(point.coordinates)
        assert all(-2 <= x <= 2 for x in point.coordinates)


def test_a_whole_study_ends_with_the_best_points_as_trials(url):
    study = Study.create(url, spec(changed(SFD, plan=ONE)))
    worker, order = Worker(study), []
    while (claimed := worker.claim()) is not None:
        order.append(claimed.ledger.study.study_name)
        worker.work(claimed)
    assert order == [f"{study.name}.baselines"] * 3 + [study.name] * 2
    found = curve_of(study)
    assert found is not None
    trials = [trial.params["a"] for trial in study.search.study.trials]
    wanted = [p.params["a"] for p in found.ranked if p.params["a"] != 0.0][:2]
    assert trials == wanted
    assert all(trial.value is not None for trial in study.search.study.trials)
    assert study.left() == 0
