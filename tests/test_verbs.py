"""Verbs on a study that is in the storage: launch by name, trials, delete."""

import csv
import dataclasses
import io
import json

import optuna
import pytest

from search.analysis.confirmation import CONFIRM_SUFFIX
from search.storage.engine import open_storage
from search.study.arms import ROW_SPACE
from search.study.artifacts import artifact_store, attach, is_stored
from search.study.folders import row_folder
from search.study.study import Study
from search.study.trial_list import list_rows, rows_csv
from tests.commands import Answer
from tests.measured import command, created, refused, search
from tests.reported import POINTS, reported, take
from tests.studies import spec


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("BDENSE_ARTIFACTS", raising=False)


# ---- launch NAME: a study goes on without its file ----


def launch(url: str, *options: str) -> Answer:
    return command("launch", *options, "--storage", url)


def test_a_complete_study_is_shown(url):
    study = search(url, [({"a": 1.0}, 12.5)])
    answer = launch(url, study.name)
    assert answer.status == 0
    assert "12.500" in answer.out
    assert f"launch {study.name} --trials 2" in answer.out
    assert "complete" in answer.err


def test_a_name_that_the_storage_lacks_is_refused(url):
    search(url, [({"a": 1.0}, 12.5)])
    assert "digitz" in refused(launch(url, "digitz"))


def test_a_row_of_given_arms_that_can_be_mended_is_planned_again_once(url):
    study = reported(url, "sfd-arms")  # one row diverged, which it would again
    study.plan(study.arms[:1], [8])
    claim = study.given.claim(ROW_SPACE, None)
    study.given.fail(claim, "error", "a file was missing", {})
    assert study.left() == 0
    for _ in range(2):
        study.plan_failed_again()
        assert study.left() == 1
    assert study.given.claim(ROW_SPACE, None).params == claim.params


def test_given_arms_have_no_number_of_trials(url):
    study = reported(url, "sfd-arms")
    assert "--trials 5" in refused(launch(url, study.name, "--trials", "5"))
    assert Study.open(url, study.name).counts() == study.counts()


# ---- trials: every row that was started, as a table, CSV and JSON ----


def trials(study: Study, *options: str) -> str:
    answer = command("trials", study.name, *options, "--storage", study.url)
    assert answer.status == 0
    return answer.out


@pytest.fixture
def searched(url) -> Study:
    return reported(url, "sfd-search")


def test_trials_come_after_the_baselines_each_with_its_weights(searched):
    rows = json.loads(trials(searched, "--json"))
    own = [row for row in rows if row["study"] == searched.name]
    assert rows == [row for row in rows if row not in own] + own
    arms = {(row["arm"], row["seed"]) for row in rows if row not in own}
    assert ("uniform weights", 0) in arms
    complete = [row for row in own if row["state"] == "complete"]
    assert [(row["params"], row["fid"]) for row in complete] == POINTS
    states = [row["state"] for row in own[len(POINTS) :]]
    assert states == ["pruned", "failed", "running"]
    assert [row["fid"] for row in own[len(POINTS) :]] == [None] * 3
    assert own[-2]["reason"]


def test_csv_has_a_column_for_each_parameter_and_weight(searched):
    rows = json.loads(trials(searched, "--json"))
    lines = [*csv.DictReader(io.StringIO(trials(searched, "--csv")))]
    assert [line["number"] for line in lines] == [str(row["number"]) for row in rows]
    first = next(line for line in lines if line["study"] == searched.name)
    params, value = POINTS[0]
    assert {name: float(first[name]) for name in params} == params
    assert float(first["fid"]) == value
    branches = max(len(row["weights"]) for row in rows)
    assert [name for name in first if name.startswith("w_")] == [
        f"w_{k}" for k in range(1, branches + 1)
    ]


def test_weights_that_differ_between_intervals_have_a_column_each(searched):
    (row,) = [row for row in list_rows(searched) if row.value == 12.5 and row.arm is None]
    rows = [
        dataclasses.replace(row, weights=weights)
        for weights in ([[1.0, 2.0], [3.0, 4.0]], [0.5, 1.5], [1.0])
    ]
    lines = [*csv.DictReader(io.StringIO(rows_csv(rows)))]
    names = [name for name in lines[0] if name.startswith("w_")]
    assert names == ["w_1_1", "w_1_2", "w_2_1", "w_2_2", "w_1", "w_2"]
    cells = [[line[name] for name in names] for line in lines]
    assert cells == [
        ["1.0", "2.0", "3.0", "4.0", "", ""],
        ["", "", "", "", "0.5", "1.5"],
        ["", "", "", "", "", "1.0"],
    ]


def test_the_table_names_each_trial(searched):
    table = trials(searched).splitlines()
    rows = json.loads(trials(searched, "--json"))
    assert len(table) == len(rows) + 1


def test_given_arms_are_named_with_their_seeds(url):
    study = reported(url, "progressive-arms")
    rows = json.loads(trials(study, "--json"))
    assert ("given", 1, 10.0) in {(row["arm"], row["seed"], row["fid"]) for row in rows}
    assert {row["study"] for row in rows} == {study.name}


def test_one_form_at_a_time(searched):
    told = command("trials", searched.name, "--csv", "--json", "--storage", searched.url)
    assert "--csv and --json" in refused(told)


# ---- delete: rows, folders and pictures of one study, after a question ----

TWO = [({"a": 1.0}, 12.5), ({"a": 0.5}, 11.0)]


@pytest.fixture
def study(url) -> Study:
    made = search(url, TWO)
    folder = row_folder(made.name, 0)
    folder.mkdir(parents=True)
    (folder / "student.safetensors").write_bytes(b"a student")
    return made


def delete(study: Study, *options: str) -> Answer:
    return command("delete", study.name, "--storage", study.url, *options)


def names(url: str) -> set[str]:
    return {each.study_name for each in optuna.get_all_study_summaries(open_storage(url))}


def test_the_study_goes_with_its_files_and_no_other_does(url, study):
    other = created(url, spec(name="other"))
    confirmation = created(url, dataclasses.replace(spec(), name=study.name + CONFIRM_SUFFIX))
    assert delete(study, "--yes").status == 0
    left = {ledger.study.study_name for ledger in other.ledgers}
    assert names(url) == left
    assert confirmation.name not in left
    assert not row_folder(study.name, 0).parent.exists()


def test_pictures_go_too(study, tmp_path):
    picture = tmp_path / "samples.png"
    picture.write_bytes(b"a picture")
    plan = dataclasses.replace(study.spec.search, trials=len(TWO) + 1)
    study = Study.create(study.url, dataclasses.replace(study.spec, plan=plan))
    claim, store = take(study, {"a": 0.1}), artifact_store()
    (identity,) = attach(study.search.storage, claim.trial_id, [picture], store).values()
    study.search.prune(claim, {})
    assert is_stored(store, identity)
    assert delete(study, "--yes").status == 0
    assert not is_stored(store, identity)


def test_without_a_yes_nothing_goes(url, study, monkeypatch):
    answer = delete(study)
    assert (answer.status, "--yes" in answer.err) == (2, True)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    for answer in ("", "n", "no way"):
        monkeypatch.setattr("builtins.input", lambda _, answer=answer: answer)
        assert delete(study).status == 0
    assert study.name in names(url)
    assert (row_folder(study.name, 0) / "student.safetensors").exists()
    monkeypatch.setattr("builtins.input", lambda _: "y")
    assert delete(study).status == 0
    assert names(url) == set()


def test_a_running_trial_forbids_it(url):
    study = reported(url, "sfd-search")
    assert f"stop {study.name}" in refused(delete(study, "--yes"))
    assert study.name in names(url)
