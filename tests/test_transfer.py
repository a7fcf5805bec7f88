"""A study's weights under another's conditions: which rows, and one trained in this process."""

import pytest
import torch
from search.analysis.retraining import variant, variants
from search.analysis.transfer import plan_transfer, transfer_name
from search.spec.study_spec import StudySpec
from search.worker.trial import train_and_measure
from search.worker.workers import RetrainWorker

from bdense.errors import InputError
from search.analysis.comparison import compare
from search.errors import SpecChangedError
from search.run import launch
from search.study.arms import PLAIN, UNIFORM, Planned, PlannedRow
from search.study.study import Study
from search.worker import assets
from tests.measured import (
    command,
    copy_storage,
    finish,
    normalised,
    open_once,
    refused,
    search,
    searched_valley,
)
from tests.studies import CHAIN, LEARNED, NORMALISED, spec, write

TINY = {
    "teacher__train__kimg": 0.128,
    "teacher__train__batch": 32,
    "budget__kimg": 0.064,
    "budget__batch": 32,
    "trajectories": {"mode": "live"},
    "resources": {"gpus": 0},
    "evaluation__images": 64,
}


@pytest.fixture
def study(tmp_path, monkeypatch, tmp_path_factory) -> Study:
    """The search, in a storage that the command uses."""
    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("BDENSE_STORAGE", f"sqlite:///{tmp_path / 'study.db'}")
    open_once(monkeypatch)
    monkeypatch.setattr(launch, "check_apart", launch._check)
    made = searched_valley(tmp_path_factory.getbasetemp())
    copy_storage(made, tmp_path / "study.db")
    return Study.open(f"sqlite:///{tmp_path / 'study.db'}", "digits")


def other(**keys) -> StudySpec:
    """Another NFE, K, budget and seed."""
    changes = {"student__nfe": 3, "student__substeps": 2, "budget__kimg": 5.0}
    return spec(name="others", weights=NORMALISED, seeds={"training": 1}, **{**changes, **keys})


def plan(study: Study, to: StudySpec | None = None, *, top: int = 2, seeds: int = 2) -> Planned:
    return plan_transfer(study, normalised(), to or other(), top=top, seeds=seeds)


def test_the_top_weights_and_the_baselines_of_the_other_study(study):
    planned = plan(study)
    assert planned.name == transfer_name("others", "digits") == "others.from.digits"
    assert planned.arms[:2] == [PLAIN, UNIFORM]
    assert [arm.trial for arm in planned.arms[2:]] == [3, 2]
    # Seeds 0 and 1 are the other study's own.
    assert planned.unfinished() == [
        PlannedRow(arm=arm, seed=seed, kimg=5.0, nfe=3) for seed in (2, 3) for arm in range(4)
    ]
    assert planned.facts == {"of": "digits"}
    assert planned.spec(StudySpec) == other()


def test_weights_are_taken_literally(study):
    """(a, b) that summed to K = 4 do not at K = 2."""
    arm = plan(study).arms[2]
    assert arm.params["a"] == 1.25
    trial = study.trials.study.trials[3]
    assert arm.params["b"] == trial.user_attrs["b"]


def test_asked_again_only_what_is_new_is_added(study):
    finish(plan(study), lambda arm, row: 9.0 - row.arm)
    assert plan(study).left() == 0
    planned = plan(study, seeds=3)
    assert {row.seed for row in planned.unfinished()} == {4}
    finish(planned, lambda arm, row: 9.0 - row.arm)
    assert [arm.trial for arm in plan(study, top=3).arms[2:]] == [3, 2, 4]
    assert plan(study, top=3).unfinished() == [
        PlannedRow(arm=4, seed=seed, kimg=5.0, nfe=3) for seed in (2, 3)
    ]
    # Fewer take nothing away, and ask for nothing new.
    assert plan(study, top=1).left() == 2
    with pytest.raises(SpecChangedError, match=r"\(budget.kimg: 5.0 stored, 6.0 given\)"):
        plan(study, other(budget__kimg=6.0))


def test_a_study_is_not_transferred_to_itself(study):
    with pytest.raises(InputError, match="--to names study digits itself; give another's file"):
        plan(study, normalised())


def test_learned_weights_are_transferred_with_their_memory(tmp_path):
    learned = spec(weights=LEARNED | {"memory": 7})
    trials = [({"rule": "uncertainty", "strength": 0.5}, 9.0)]
    study = search(f"sqlite:///{tmp_path / 'study.db'}", trials, study=learned)
    planned = plan_transfer(study, learned, other(), top=1, seeds=1)
    assert planned.arms[2].params == {"rule": "uncertainty", "strength": 0.5, "memory": 7}


# ---- trained in this process ----


def test_rows_train_as_their_variant_does(study, tmp_path, monkeypatch, shared_cache):
    """Under the first fresh seed: the promoted weights' FID is that without the ledger."""
    monkeypatch.setenv("BDENSE_CACHE", str(shared_cache))
    to = other(**TINY)
    planned = plan(study, to, top=1, seeds=1)
    (made,) = variants(planned, to)
    assets.prepare(made, torch.device("cpu"), lambda *_: None)
    worker = RetrainWorker(planned)
    while (claimed := worker.claim()) is not None:
        worker.work(claimed)
    comparison = compare(planned)
    assert [list(result.fids) for result in comparison.results] == [[2]] * 3
    shared = assets.load(
        variant(to, PlannedRow(arm=0, seed=2, kimg=0.064, nfe=3)), torch.device("cpu")
    )
    quiet = {"check": lambda: None, "report": lambda _: None}
    ours = comparison.results[2]
    alone = train_and_measure(shared, ours.arm.params, tmp_path / "alone/00000", **quiet)
    assert ours.fids == {2: alone["value"]}
    assert ours.conditions == alone["attrs"]["fid"]
    plain, uniform, ours = planned.ledger.study.trials
    assert plain.user_attrs["weights"] == [1.0]
    assert uniform.user_attrs["weights"] == [1.0, 1.0]
    assert len(ours.user_attrs["weights"]) == 2
    assert ours.user_attrs["arm"] == "a 1.250 (trial 3)"
    assert (ours.user_attrs["kimg"], ours.user_attrs["fid"]["nfe"]) == (0.064, 3)
    assert ours.user_attrs["fid"]["seeds"] == {"training": 2, "evaluation": 2}
    assert ours.user_attrs["student"] == "others.from.digits/00002/student.safetensors"
    assert (tmp_path / "runs" / ours.user_attrs["student"]).exists()


# ---- on the command line ----


def test_a_transfer_that_is_complete_is_told(study, tmp_path):
    planned = plan(study, top=1, seeds=2)
    finish(planned, lambda arm, row: 9.0 - row.arm)
    to = write(
        tmp_path,
        name="others",
        weights=NORMALISED,
        seeds={"training": 1},
        **{"student__nfe": 3, "student__substeps": 2, "budget__kimg": 5.0},
    )
    answer = command("transfer", "digits", "--to", to, "--top", "1", "--seeds", "2")
    assert answer.status == 0, answer.err
    headline, *table, conditions = answer.out.splitlines()
    assert headline.startswith("others.from.digits: 6 of 6 rows complete")
    assert table == compare(planned).table()
    assert table[-1].endswith("-22.2 %, -2.00 [-2.00, -2.00]  -12.5 %, -1.00 [-1.00, -1.00]")
    assert "256 images at NFE 3" in conditions


def test_mistakes(study, tmp_path):
    assert "--to names study digits itself" in refused(
        command("transfer", "digits", "--to", write(tmp_path, weights=NORMALISED))
    )
    assert "is a promotion, not a study" in refused(
        command("transfer", "digits", "--to", write(tmp_path, CHAIN))
    )
    path = write(tmp_path, name="others")
    assert "no study 'nobody'" in refused(command("transfer", "nobody", "--to", path))
    assert "absent.yaml cannot be read" in refused(
        command("transfer", "digits", "--to", "absent.yaml")
    )
    usage = command("transfer", "digits", "--to", path, "--top", "0")
    assert (usage.status, "argument --top: must be 1 or more, got 0" in usage.err) == (2, True)
