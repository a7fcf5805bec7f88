"""``bdense-search trials``: every row that was started, as a table, CSV and JSON."""

import csv
import dataclasses
import io
import json

import pytest

from search import cli
from search.study.trial_list import list_rows, rows_csv
from tests.reported import POINTS, reported


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path / "runs"))


def run(url: str, capsys, *options: str) -> str:
    capsys.readouterr()
    assert cli.main(["trials", *options, "--storage", url]) == 0
    return capsys.readouterr().out


@pytest.fixture
def search(url):
    return reported(url, "sfd-search")


def test_trials_come_after_the_baselines_each_with_its_weights(search, url, capsys):
    rows = json.loads(run(url, capsys, search.name, "--json"))
    own = [row for row in rows if row["study"] == search.name]
    assert rows == [row for row in rows if row not in own] + own
    arms = {(row["arm"], row["seed"]) for row in rows if row not in own}
    assert ("uniform weights", 0) in arms
    complete = [row for row in own if row["state"] == "complete"]
    assert [(row["params"], row["fid"]) for row in complete] == POINTS
    states = [row["state"] for row in own[len(POINTS) :]]
    assert states == ["pruned", "failed", "running"]
    assert [row["fid"] for row in own[len(POINTS) :]] == [None] * 3
    assert own[-2]["reason"]


def test_csv_has_a_column_for_each_parameter_and_weight(search, url, capsys):
    rows = json.loads(run(url, capsys, search.name, "--json"))
    lines = [*csv.DictReader(io.StringIO(run(url, capsys, search.name, "--csv")))]
    assert [line["number"] for line in lines] == [str(row["number"]) for row in rows]
    first = next(line for line in lines if line["study"] == search.name)
    params, value = POINTS[0]
    assert {name: float(first[name]) for name in params} == params
    assert float(first["fid"]) == value
    branches = max(len(row["weights"]) for row in rows)
    assert [name for name in first if name.startswith("w_")] == [
        f"w_{k}" for k in range(1, branches + 1)
    ]


def test_weights_that_differ_between_intervals_have_a_column_each(search):
    (row,) = [row for row in list_rows(search) if row.value == 12.5 and row.arm is None]
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


def test_the_table_names_each_trial(search, url, capsys):
    table = run(url, capsys, search.name).splitlines()
    rows = json.loads(run(url, capsys, search.name, "--json"))
    assert len(table) == len(rows) + 1


def test_given_arms_are_named_with_their_seeds(url, capsys):
    study = reported(url, "progressive-arms")
    rows = json.loads(run(url, capsys, study.name, "--json"))
    assert ("given", 1, 10.0) in {(row["arm"], row["seed"], row["fid"]) for row in rows}
    assert {row["study"] for row in rows} == {study.name}


def test_one_form_at_a_time(search, url, capsys):
    assert cli.main(["trials", search.name, "--csv", "--json", "--storage", url]) == 2
    assert "--csv and --json" in capsys.readouterr().err
