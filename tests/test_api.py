"""The search from Python, and Optuna's own tools on its studies."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import pandas as pd
import pytest

import search
from bdense.errors import InputError
from search.analysis.plans import plan_confirmation
from search.errors import NoSearchError, SpecError, UnknownStudyError
from search.report.report_files import HTML_PAGE
from search.spec.space import search_space
from search.study.folders import row_folder
from search.study.preparing import PreparationNote
from search.study.retention import CHECKPOINT
from tests.measured import command, refused
from tests.programs import WEIGHTS, planned, score, work, written
from tests.test_package import modules_after


def test_results_are_records_and_a_frame(losses, tmp_path):
    study = search.open_study("losses")
    rows, frame = study.trials, study.frame()
    assert [row.state for row in rows] == ["complete"] * 6
    assert list(frame["value"]) == [row.value for row in rows]
    points = frame[frame["arm"].isna()]
    assert list(points["value"]) == [
        score(x, y) for x, y in zip(points["x"], points["y"], strict=True)
    ]
    assert isinstance(frame, pd.DataFrame)
    best = study.best
    assert best.value == points["value"].min()
    assert study.baselines["defaults"].value == score(2, 1)
    assert study.recommended.arm.trial == best.number
    assert study.confirmed is None
    told = json.loads(command("best", "losses", "--json").out)
    assert told["best"]["number"] == best.number
    assert (study.counts.complete, study.spec, study.name) == (3, losses.spec, "losses")
    assert "error_rate" not in study._repr_markdown_()
    assert f"{best.value:.4g}" in study._repr_markdown_()
    assert [figure.axes[0].get_xlabel() for figure in study.plots()] == ["log10 x", "y"]
    page = study.report(tmp_path / "report")
    assert page.with_name(HTML_PAGE).is_file()


def test_a_study_of_a_file_of_objects_and_of_a_name_is_one(url, tmp_path, monkeypatch, capfd):
    path = written(tmp_path)
    study = search.open_study(path)
    assert capfd.readouterr() == ("", "")
    assert study.counts.planned == 2
    # Objects' paths are relative to the current folder, as there is no file.
    monkeypatch.chdir(tmp_path)
    tree = {
        "name": "losses",
        "method": {"name": "command", "run": [sys.executable, "program.py"]},
        "weights": WEIGHTS,
        "plan": {"trials": 2, "replicates": 1},
    }
    assert search.open_study(tree).spec.fingerprint() == study.spec.fingerprint()
    assert search.open_study(study.spec, trials=3).counts.planned == 3
    assert search.open_study("losses", trials=5).counts.planned == 5
    again = search.open_study("losses", storage=url)
    assert again.record.url == url
    assert repr(again) == f"<study 'losses' of {url}>"


def test_a_point_comes_first(url, tmp_path):
    study = search.open_study(written(tmp_path))
    assert study.enqueue(x=1, y=0.5)
    assert not study.enqueue(x=1.0, y=0.5)
    with pytest.raises(InputError, match="y 3 lies outside"):
        study.enqueue(x=1, y=3)
    work(study.record)
    assert study.best.value == 0.0


def test_mistakes_are_those_of_the_command(url, tmp_path):
    with pytest.raises(UnknownStudyError, match=r"nothing.*name and the storage"):
        search.open_study("nothing")
    with pytest.raises(SpecError, match=r"losses\.yaml:\d+:\d+: method\.run"):
        search.open_study(written(tmp_path, method={"run": ["no-such-program"]}))
    with pytest.raises(SpecError, match="study: plan is missing"):
        search.open_study({"name": "losses", "method": {"name": "command", "run": ["true"]}})
    planned(url, written(tmp_path, plan={"arms": ["defaults"], "seeds": [0]}))
    with pytest.raises(InputError, match="trials 3 is for a search"):
        search.open_study("losses", trials=3)


def test_given_arms_have_no_best_but_a_recommended_one(url, tmp_path):
    plan = {"arms": ["defaults", {"x": 1, "y": 0.5}], "seeds": [0, 1]}
    study = search.open_study(written(tmp_path, plan=plan))
    work(study.record)
    asked = (lambda: study.best, lambda: study.baselines, study.confirm, study.promote)
    for ask in (*asked, lambda: study.enqueue(x=1, y=1)):
        with pytest.raises(NoSearchError, match=r"no search; .*report losses"):
            ask()
    assert study.recommended.arm.params == {"x": 1, "y": 0.5}
    assert study.confirmed is None


def test_errors_name_arguments_in_python_and_options_in_a_shell(url, searched, tmp_path):
    study = search.open_study("digits")
    with pytest.raises(InputError, match=r"^seeds must be .* unless `to` is given, got 1,2$"):
        study.promote(weights={"a": 1.0, "b": 0.0}, seeds=[1, 2])
    asked = ("promote", "digits", "--weights", "1,0", "--seeds", "1,2")
    assert "--seeds must be the number of fresh seeds, 1 or more, unless --to is" in refused(
        command(*asked)
    )
    (tmp_path / "report").touch()
    with pytest.raises(InputError, match=r"^out .*report is a file"):
        study.report(tmp_path / "report")
    assert "--out " in refused(command("report", "digits", "--out", tmp_path / "report"))


@pytest.mark.parametrize("plan", [{}, {"plan": {"arms": ["defaults"], "seeds": [0]}}])
def test_a_study_that_is_planned_anew_is_the_one_that_was_opened(url, tmp_path, plan):
    held = search.open_study(written(tmp_path, **plan))
    before = held.spec.fingerprint()
    written(tmp_path, "negative", **plan)
    again = search.open_study(tmp_path / "losses.yaml")
    assert held.spec.fingerprint() == again.spec.fingerprint() != before
    work(held.record)
    assert [row.value for row in held.trials] == [row.value for row in again.trials]
    assert held.counts == again.counts
    assert command("delete", "losses", "--yes").status == 0
    with pytest.raises(UnknownStudyError, match="no study 'losses'"):
        _ = held.counts


def test_a_trial_s_log(losses):
    study = search.open_study("losses")
    events = study.logs(1)
    assert [event["event"] for event in events] == ["claimed", "started", "complete"]
    assert (events[-1]["trial"], events[-1]["value"]) == (1, study.trials[-2].value)
    printed = command("logs", "losses", 1, "--json").out
    assert events == [json.loads(line) for line in printed.splitlines()]
    assert study.logs(baseline="defaults")[-1]["value"] == score(2, 1)
    with pytest.raises(InputError, match="no trial 9"):
        study.logs(9)
    with pytest.raises(InputError, match="`baseline` must be given"):
        study.logs()


def test_files_and_the_study_itself_are_deleted(url, tmp_path):
    study = search.open_study(written(tmp_path))
    work(study.record)
    left = row_folder("losses", 0) / CHECKPOINT
    left.write_bytes(bytes(1000))
    assert study.clean(checkpoints=True) == {"checkpoints": 1000}
    assert study.clean() == {"trajectories": 0}
    assert not left.exists()
    with pytest.raises(InputError, match=r"^keep 0: no student"):
        study.clean(keep=[0])
    work(plan_confirmation(study.record, method={}, seeds=3, count=1))
    assert (study.confirmed.ended, study.confirmed.winner.arm.trial) == (True, study.best.number)
    planned(url, written(tmp_path, name="other"))
    study.enqueue(x=1, y=1)
    plan = {"trials": 3, "replicates": 1}
    ledger = planned(url, written(tmp_path, plan=plan)).search
    taken = ledger.claim(search_space(study.spec), None)
    with pytest.raises(InputError, match="1 trials of losses are worked on"):
        study.delete()
    ledger.release(taken)
    study.delete()
    assert optuna.get_all_study_names(url) == ["other", "other.baselines"]
    assert not row_folder("losses", 0).parent.exists()


def test_a_complete_study_prepares_nothing(url, tmp_path):
    study = work(planned(url, written(tmp_path, plan={"trials": 1, "replicates": 1})))
    PreparationNote(study.main).tell("teacher", "loss 1.5")  # a launch was killed there
    assert "preparing" in command("status", "losses").out
    search.open_study("losses").run()
    assert "preparing" not in command("status", "losses").out


def test_a_run_in_another_thread_is_refused(url, tmp_path):
    study = search.open_study(written(tmp_path))
    with ThreadPoolExecutor(1) as thread:
        refusal = thread.submit(study.run).exception()
    assert isinstance(refusal, InputError)
    assert "main thread" in str(refusal)
    assert study.counts.running == 0


def test_the_api_is_loaded_when_it_is_asked_for():
    assert not {"ray", "torch", "optuna"} & modules_after("import search")
    assert not {"ray", "torch"} & modules_after("from search import open_study")
    with pytest.raises(AttributeError, match="close_study"):
        search.close_study  # noqa: B018


def test_optuna_s_own_tools_read_our_studies(losses):
    best = search.open_study("losses").best
    loaded = optuna.load_study(study_name="losses", storage=losses.url)
    assert loaded.best_trial.number == best.number
    assert loaded.best_value == best.value
    assert loaded.metric_names == ["loss"]
    assert list(loaded.trials_dataframe()["value_loss"]) == [
        trial.value for trial in search.open_study("losses").optuna.trials
    ]
    optuna_cli = Path(sys.executable).with_name("optuna")
    asked = ["best-trial", "--study-name", "losses", "--format", "json"]
    said = subprocess.run(
        [optuna_cli, "--storage", losses.url, *asked], capture_output=True, text=True, check=True
    )
    told = json.loads(said.stdout)
    assert (told["number"], told["params"]["x"]) == (best.number, best.parameters["x"])


def test_mistakes_are_named_before_anything_runs(url, tmp_path):
    for given in (None, 5):
        with pytest.raises(InputError, match=r"study must be str \| Path \| Mapping"):
            search.open_study(given)
    odd = tmp_path / "study.txt"
    odd.write_text("name: losses")
    with pytest.raises(InputError, match=r"ends in \.yaml or \.yml"):
        search.open_study(str(odd))
    study = search.open_study(written(tmp_path))
    with pytest.raises(InputError, match="workers must be at least 1, or None, got 0"):
        study.run(workers=0)
    with pytest.raises(InputError, match="seeds must be at least 1, or None, got 0"):
        study.confirm(seeds=0)
    for call, given in {
        study.run: {"workers": "2"},
        study.confirm: {"candidates": 1.5},
        study.promote: {"nfe": "23"},  # a sequence, too
        study.report: {"out": None},
    }.items():
        ((name, value),) = given.items()
        with pytest.raises(InputError, match=f"{name} must be .*, got {type(value).__name__}"):
            call(**given)
    with pytest.raises(SpecError, match=r"^study: nmae is unknown; did you mean name"):
        search.open_study({"nmae": "losses", "method": {"name": "command", "run": ["python"]}})
