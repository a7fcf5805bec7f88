"""Method ``command``: studies whose trials are runs of a program, by workers of this process."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from bdense.errors import InputError
from search.analysis.comparison import compare
from search.analysis.confirmation import verdict
from search.analysis.plans import plan_confirmation, plan_given
from search.analysis.recommendation import noise_of, recommend
from search.errors import SpecChangedError
from search.report.overview import overview_of
from search.report.plots import study_plots
from search.report.report_files import write_report
from search.storage.stop_flags import ask_all
from search.study.arms import arms_study
from search.study.study import Study
from search.study.trial_log import LOG_FILE, read_log
from search.worker import guard
from search.worker.command import _Values
from tests.e2e.study import wait_until
from tests.goldens import ROOT
from tests.measured import command, refused
from tests.programs import (
    WEIGHTS,
    end_of_work,
    given_to,
    planned,
    program_file,
    row,
    score,
    spec_of,
    work,
    worker_config,
    written,
)


def trials(study: Study) -> list[optuna.trial.FrozenTrial]:
    """Of a search, in order."""
    return study.search.study.get_trials(deepcopy=False)


def only(study: Study) -> optuna.trial.FrozenTrial:
    """The one row of a study."""
    (found,) = study.main.study.get_trials(deepcopy=False)
    return found


def one_row(folder: Path, *told: str, **keys) -> Path:
    """A study file of one row, of the defaults."""
    return written(folder, *told, plan={"arms": ["defaults"], "seeds": [0]}, **keys)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---- a search ----


def test_a_search_s_trials_are_runs_of_the_program(losses):
    for trial in trials(losses):
        x, y = trial.params["x"], trial.params["y"]
        assert trial.state is TrialState.COMPLETE
        assert trial.value == score(x, y)
        assert 0.1 <= x <= 10
        assert 0 <= y <= 2
        assert given_to(losses, trial.number)["params"] == {"x": x, "y": y}
        (started,) = [
            each
            for each in read_log(row(losses, trial.number, LOG_FILE))[0]
            if each["event"] == "started"
        ]
        assert started["program"][-2:] == [repr(x), "0"]
    # Defaults under both seeds, and the best trial under the second.
    found = compare(losses)
    assert found.results[0].arm.name == "defaults"
    assert found.results[0].values == {0: score(2, 1), 1: score(2, 1, 1)}
    assert [sorted(each.values) for each in found.results] == [[0, 1], [0, 1]]
    assert noise_of(found).replicates == 2
    best = min(trials(losses), key=lambda trial: trial.value)
    assert recommend(found).arm.trial == best.number


def test_outputs_name_the_metric(losses, tmp_path):
    best = min(trial.value for trial in trials(losses))
    printed = {verb: command(verb, "losses") for verb in ("status", "best", "trials")}
    assert {answer.status for answer in printed.values()} == {0}
    page = write_report(losses, tmp_path / "report").read_text()
    texts = [*(answer.out for answer in printed.values()), command("list").out, page]
    for text in texts:
        assert "FID" not in text
        assert "w_1" not in text
    assert all("loss" in text for text in texts[1:])
    told = json.loads(command("best", "losses", "--json").out)
    assert told["best"]["value"] == best
    assert (told["best"]["metric"], told["best"]["others"]) == ("loss", {"steps": 4.0})
    assert told["baselines"]["defaults"]["value"] == score(2, 1)
    assert {row["value"] for row in json.loads(command("trials", "losses", "--json").out)} >= {
        best
    }
    (listed,) = json.loads(command("list", "--json").out)
    assert (listed["metric"], listed["best_value"]) == ("loss", best)
    plots = [plot.key for plot in study_plots(overview_of(losses))]
    assert plots == ["loss-over-log10-x", "loss-over-y"]
    assert losses.search.study.metric_names == ["loss"]


def test_a_point_is_enqueued_and_a_study_deleted(url, tmp_path):
    study = planned(url, written(tmp_path))
    answer = command("enqueue", "losses", "--set", "x=1", "--set", "y=0.5")
    assert (answer.status, "x 1, y 0.5" in answer.out) == (0, True)
    assert "y" in refused(command("enqueue", "losses", "--set", "x=1"))
    row(study, 0).mkdir(parents=True)
    assert command("delete", "losses", "--yes").status == 0
    assert not row(study, 0).parent.exists()


def test_more_is_better_where_it_is_asked_for(url, tmp_path):
    path = written(
        tmp_path,
        "negative",
        plan={"trials": 3, "replicates": 2, "race": 1},
        method={"direction": "maximise"},
    )
    study = work(planned(url, path))
    best = max(trials(study), key=lambda trial: trial.value)
    assert study.search.study.best_trial.number == best.number == study.search.best().number
    assert json.loads(command("best", "losses", "--json").out)["best"]["number"] == best.number
    assert recommend(compare(study)).arm.trial == best.number
    assert json.loads(command("list", "--json").out)[0]["best_value"] == best.value
    # Candidates and defaults under fresh seeds, in pairs.
    work(plan_confirmation(study, method={}, seeds=3, count=2))
    found = verdict(study)
    ranked = sorted(found.comparison.results, key=lambda each: each.mean().mean)
    assert found.winner == ranked[-1]
    assert recommend(found.comparison).arm == found.winner.arm
    pair = found.comparison.against(found.winner, found.comparison.baseline("defaults"))
    params = found.winner.arm.params
    assert pair.n == 3
    assert pair.mean == pytest.approx(score(2, 1) - score(**params))
    # Equal under every seed, which moves a value by 1/64: the interval is of that resolution.
    assert 0 < pair.mean - pair.low <= 1.0142 / 64
    told = json.loads(command("best", "losses", "--json").out)["confirmed"]
    assert told["winner"]["params"] == params
    assert sorted(told["arms"][0]["values"]) == ["2", "3", "4"]
    assert "vs_defaults" in told["arms"][1]


def test_given_arms_and_variants(url, tmp_path):
    path = written(
        tmp_path,
        plan={
            "arms": ["defaults", {"x": 1, "y": 1}],
            "seeds": [1],
            "variants": [{}, {"run": [sys.executable, "program.py", "negative"]}],
        },
    )
    study = work(planned(url, path))
    assert [row.value for _, _, row in study.complete_arms()] == [
        sign * score(x, 1, 1) for sign in (1, -1) for x in (2, 1)
    ]


# ---- the pruner ----


def test_intermediate_values_reach_the_pruner_which_ends_the_program(url, tmp_path):
    pruner = {"name": "ThresholdPruner", "upper": 9.5, "n_warmup_steps": 1}
    plan = {"trials": 2, "replicates": 1, "pruner": pruner}
    study = planned(url, written(tmp_path, "values", "waits", plan=plan))
    (tmp_path / "gate").write_text("1")
    for y in (0.25, 1.5):
        study.search.enqueue({"x": 1.0, "y": y})
    work(study)
    kept, pruned = trials(study)
    assert kept.value == score(1, 0.25)
    assert kept.intermediate_values == {step: 10.25 - step for step in range(4)}
    assert pruned.state is TrialState.PRUNED
    assert pruned.user_attrs["reason"] == "ThresholdPruner: loss 10.5 at step 1"
    assert "ThresholdPruner" in command("trials", "losses").out
    # The baseline is measured to its end, whatever its values are.
    (baseline,) = study.given.study.get_trials(deepcopy=False)
    assert (baseline.value, len(baseline.intermediate_values)) == (score(2, 1), 4)


# ---- ends and takeovers ----


WORKER = """
import json, sys
from search.worker.ray_tasks import WorkerConfig, slot
slot({"worker": WorkerConfig(**json.loads(sys.argv[1])), "mark": sys.argv[2]})
"""


def as_words(study: Study, program: str) -> list[str]:
    """A worker's process of its own."""
    known = worker_config(study)
    asked = {name: getattr(known, name) for name in ("study", "storage", "runs", "cache")}
    return [sys.executable, "-c", program, json.dumps(asked), f"{row(study, 0)}.mark"]


@pytest.fixture
def worked_on() -> Iterator[Callable[[Study], threading.Thread]]:
    """Starts a worker in a thread."""
    started = []

    def start(study: Study) -> threading.Thread:
        started.append(threading.Thread(target=work, args=(study,)))
        started[-1].start()
        return started[-1]

    yield start
    for thread in started:
        thread.join(60)


def waiting_program(study: Study) -> int:
    """The process of the program, once it waits in its third step."""
    wait_until(
        lambda: row(study, 0, "work", "step").exists() and program_file(study, 0, "step") == "2"
    )
    return int(program_file(study, 0, "starts").split()[-1])


def test_a_killed_worker_takes_its_program_along_and_another_goes_on(url, tmp_path):
    study = planned(url, one_row(tmp_path, "waits", "forks", "values"))
    with subprocess.Popen(as_words(study, WORKER), stderr=subprocess.DEVNULL) as killed:
        try:
            program = waiting_program(study)
            children = [int(pid) for pid in program_file(study, 0, "children").split()]
            assert all(map(alive, [program, *children]))
        finally:
            killed.kill()
    # Its guard takes the program along. A gate that opens earlier would let the program go on.
    wait_until(lambda: not any(map(alive, [program, *children])))
    # It may have been killed in the middle of a line.
    with row(study, 0, "values.jsonl").open("a") as file:
        file.write('{"st')
    (tmp_path / "gate").touch()
    work(study)
    assert only(study).value == score(2, 1)
    assert only(study).user_attrs["score"]["others"] == {"steps": 2.0}
    starts = program_file(study, 0, "starts").splitlines()
    assert [line.split()[0] for line in starts] == ["0", "2"]
    assert only(study).intermediate_values == {step: 11.0 - step for step in range(4)}


def test_a_stop_lets_the_program_save_and_it_goes_on_from_there(url, tmp_path, worked_on):
    study = planned(url, one_row(tmp_path, "waits"))
    stopped = worked_on(study)
    program = waiting_program(study)
    ask_all(study.ledgers)
    stopped.join(60)
    assert not alive(program)
    assert program_file(study, 0, "step") == "3"
    events = [each["event"] for each in read_log(row(study, 0, LOG_FILE))[0]]
    assert events[-2:] == ["checkpoint", "released"]
    work(Study.open(url, "losses"))
    assert only(study).user_attrs["score"]["others"] == {"steps": 1.0}
    assert only(study).user_attrs["tries"] == 1


def test_a_program_that_ignores_the_signal_is_killed_after_the_grace(url, tmp_path, worked_on):
    path = one_row(tmp_path, "waits", "deaf", method={"grace_seconds": 0.2})
    study = planned(url, path)
    stopped = worked_on(study)
    program = waiting_program(study)
    ask_all(study.ledgers)
    stopped.join(60)
    assert not alive(program)
    killed = next(
        each for each in read_log(row(study, 0, LOG_FILE))[0] if each["event"] == "killed"
    )
    assert "SIGTERM for 0.2 s" in killed["why"]
    assert only(study).state is TrialState.RUNNING  # given back


def test_children_that_a_program_leaves_behind_are_killed_and_its_last_output_is_kept(
    url, tmp_path
):
    shell = "(true & true) & wait; sleep 0.1; echo '{\"loss\": 1}' > $BDENSE_RESULT"
    runs = [[sys.executable, "program.py", "forks", "chatty"], ["sh", "-c", shell]]
    plan = {"arms": ["defaults"], "seeds": [0], "variants": [{"run": run} for run in runs]}
    study = work(planned(url, written(tmp_path, plan=plan, method={"log_mib": 0.25})))
    assert [each.value for _, _, each in study.complete_arms()] == [score(2, 1), 1]
    children = [int(pid) for pid in program_file(study, 0, "children").split()]
    assert len(children) == 2
    assert not any(map(alive, children))
    # Of the second they ended by themselves.
    logs = [read_log(row(study, number, LOG_FILE))[0] for number in (0, 1)]
    assert [any(each["event"] == "children" for each in log) for log in logs] == [True, False]
    kept = [row(study, 0, name) for name in ("stdout.1.log", "stdout.log")]
    size = sum(path.stat().st_size for path in kept)
    assert 0.1 * 2**20 < size <= 0.25 * 2**20
    lines = "".join(path.read_text() for path in kept).splitlines()
    assert lines[-1].startswith("line 19999 ")


def guard_of(program: int) -> int:
    """The process that started a program."""
    return int(Path(f"/proc/{program}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize("whom", [guard_of, int], ids=["guard", "program"])
def test_a_signal_from_another_process_lets_the_program_save(url, tmp_path, worked_on, whom):
    study = planned(url, one_row(tmp_path, "waits"))
    worked = worked_on(study)
    os.kill(whom(waiting_program(study)), signal.SIGTERM)
    worked.join(60)
    assert only(study).value == score(2, 1)
    assert only(study).user_attrs["score"]["others"] == {"steps": 1.0}  # of the second attempt
    assert only(study).user_attrs["tries"] == 2


def test_what_a_killed_guard_leaves_alive_ends_before_the_next_program(url, tmp_path, worked_on):
    study = planned(url, one_row(tmp_path, "waits", "forks"))
    worked = worked_on(study)
    program = waiting_program(study)
    children = [int(pid) for pid in program_file(study, 0, "children").split()]
    os.kill(guard_of(program), signal.SIGKILL)
    wait_until(lambda: not alive(program))
    (tmp_path / "gate").touch()
    worked.join(60)
    assert only(study).user_attrs["score"]["others"] == {"steps": 2.0}
    released = next(
        each for each in read_log(row(study, 0, LOG_FILE))[0] if each["event"] == "released"
    )
    assert released["why"].startswith("ProgramDiedError")
    assert not any(map(alive, [program, *children]))


def test_a_lock_that_cannot_be_had_starts_nothing(tmp_path):
    (tmp_path / guard.LOCK_FILE).mkdir()
    order = guard.Order(
        words=["touch", str(tmp_path / "ran")],
        cwd=str(tmp_path),
        signal="TERM",
        grace_seconds=1,
        folder=str(tmp_path),
        most_bytes=100,
    )
    words = [sys.executable, guard.__file__, json.dumps(dataclasses.asdict(order))]
    said = subprocess.run(words, stdin=subprocess.PIPE, capture_output=True, check=True).stdout
    assert json.loads(said)["hindered"] == "lock"
    assert not (tmp_path / "ran").exists()


def test_faults_strike_the_worker_of_a_program(url, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    told = "(folder / 'processes').write_text(json.dumps(program_processes()))"
    path = program_of(tmp_path, "from benchmarks.counting import program_processes", told, DONE)
    study = work(planned(url, path))
    worker, *others = json.loads(program_file(study, 0, "processes"))
    assert worker == os.getpid()
    assert len({worker, *others}) == 3


# ---- values at the end ----


@pytest.fixture
def judged_late(monkeypatch) -> None:
    """Values are not looked at until the program has ended."""
    monkeypatch.setattr("search.worker.command.POLL_SECONDS", 60)


def test_a_program_that_has_ended_is_not_pruned(url, tmp_path, judged_late):
    pruner = {"name": "ThresholdPruner", "upper": 0.5}
    study = planned(
        url, written(tmp_path, "values", plan={"trials": 1, "replicates": 1, "pruner": pruner})
    )
    work(study)
    (trial,) = trials(study)
    assert trial.state is TrialState.COMPLETE
    assert len(trial.intermediate_values) == 4


def program_of(folder: Path, *lines: str, **keys) -> Path:
    """A study of one row, whose program is these lines of Python."""
    path = one_row(folder, **keys)
    start = ["import json, os, time", "from pathlib import Path"]
    names = ("folder", "result", "values")
    start += [f"{name} = Path(os.environ['BDENSE_{name.upper()}'])" for name in names]
    (folder / "program.py").write_text("\n".join([*start, *lines]))
    return path


DONE = "result.write_text('{\"loss\": 1}')"


def test_values_that_a_second_start_writes_anew_are_read_from_the_first(url, tmp_path):
    path = program_of(
        tmp_path,
        "first = not (folder / 'began').exists()",
        "(folder / 'began').touch()",
        "lines = [json.dumps({'step': s, 'value': s}) for s in ((0, 1, 2) if first else (5, 6))]",
        "with values.open('w') as file:",
        "    file.write('\\n\\n'.join(lines) + '\\n')",
        "if first: os.abort()",
        DONE,
    )
    study = work(planned(url, path))
    assert only(study).intermediate_values == {0: 0, 1: 1, 2: 2, 5: 5, 6: 6}


def test_values_of_a_file_that_shrinks_are_read_from_its_start(tmp_path):
    path = tmp_path / "values"
    values = _Values(path)
    path.write_text('{"step": 10, "value": 1}\n{"step": 11, "value": 1}\n')
    assert [step for step, _ in values.new()] == [10, 11]
    path.write_text('{"step": 12, "value": 1}\n')
    assert [step for step, _ in values.new()] == [12]


# ---- a program that is edited ----


def test_a_program_that_is_edited_while_it_runs_stores_nothing(url, tmp_path):
    path = program_of(tmp_path, "Path('program.py').write_text('raise ValueError')", DONE)
    study = planned(url, path)
    error = end_of_work(study)
    assert "run.1_sha256" in error.message
    assert error.is_input_error
    assert not only(study).state.is_finished()
    assert not row(study, 0, "result.json").exists()
    with pytest.raises(SpecChangedError, match="run"):
        plan_given(url, spec_of(path))


# ---- bad programs ----


FAILURES = {
    "silent": ("error", "ended without a metric.*'loss'.*BDENSE_RESULT"),
    "nan": ("diverged", "loss nan"),
    "list": ("error", "mapping with a number 'loss'.*[1.0]"),
    "word": ("error", "mapping with a number 'loss'.*low"),
    "half": ("error", "metric.json is not JSON"),
    "huge": ("diverged", "loss inf"),
    "folder": ("error", "metric.json is not a regular file"),
    "pipe": ("error", "metric.json is not a regular file"),
    # Values that are looked at when it has ended count, too.
    "last-nan": ("diverged", "loss is nan at step 1"),
    "last-word": ("error", "got loss 3"),
    "fails": ("error", "exit status 3.*stderr.log: first words.*ValueError: the data are bad"),
}


def test_a_program_that_fails_says_why(url, tmp_path, judged_late):
    variants = [{"run": [sys.executable, "program.py", told]} for told in FAILURES]
    plan = {"arms": ["defaults"], "seeds": [0], "variants": variants}
    study = work(planned(url, written(tmp_path, plan=plan)))
    rows = study.main.study.get_trials(deepcopy=False)
    status = command("status", "losses").out
    for trial, (reason, said) in zip(rows, FAILURES.values(), strict=True):
        assert (trial.state, trial.user_attrs["reason"]) == (TrialState.FAIL, reason)
        (error,) = trial.user_attrs["error"].splitlines()
        require_in_order(said, error)
        assert error in status
    assert row(study, len(rows) - 1, "stderr.log").read_text().endswith("the data are bad\n")


def require_in_order(said: str, told: str) -> None:
    """Each part of ``said``, between ``.*``, one after another."""
    place = 0
    for words in said.split(".*"):
        assert words in told[place:], told
        place = told.index(words, place)


SHELL = ["sh", "-c", "echo x >> $BDENSE_FOLDER/starts; sh -c 'kill -SEGV $$'; exit $?"]


@pytest.mark.parametrize(("run", "starts"), [(None, ["0", "4"]), (SHELL, ["x", "x"])])
def test_a_program_that_a_signal_ends_is_tried_again_and_then_given_up(url, tmp_path, run, starts):
    """Also where a shell says so in its place."""
    resources = {"max_attempts": 2, "gpus": 0}
    path = one_row(tmp_path, "dies", method={"run": run} if run else {}, resources=resources)
    study = work(planned(url, path))
    trial = only(study)
    assert (trial.state, trial.user_attrs["reason"]) == (TrialState.FAIL, "error")
    assert "SIGSEGV" in trial.user_attrs["error"]
    lines = program_file(study, 0, "starts").splitlines()
    assert [line.split()[0] for line in lines] == starts


def test_a_line_of_another_form_fails_the_trial(url, tmp_path):
    path = one_row(tmp_path)
    (tmp_path / "program.py").write_text(
        "import os, pathlib, time\n"
        "pathlib.Path(os.environ['BDENSE_VALUES']).write_text('{\"step\": -1, \"value\": 2}\\n')\n"
        "time.sleep(600)\n"
    )
    study = work(planned(url, path))
    assert only(study).user_attrs["reason"] == "error"
    assert 'got {"step": -1, "value": 2}' in only(study).user_attrs["error"]


# ---- the study file ----


@pytest.mark.parametrize(
    ("keys", "key", "said"),
    [
        ({"method": {"run": ["no-such-program"]}}, "method.run", "no program no-such-program"),
        ({"method": {"run": ["./program.py"]}}, "method.run", "not executable"),
        ({"method": {"run": ["./other.py"]}}, "method.run", "no program"),
        ({"method": {"run": [sys.executable, "{z}"]}}, "method.run", "{z}.*x, y, seed"),
        ({"method": {"run": [sys.executable, "{z}"]}}, "method.run", "{{z}}"),
        ({"method": {"run": []}}, "method.run", "empty"),
        ({"method": {"run": ["sh", "-c", "a\0b"]}}, "method.run", "NUL"),
        ({"method": {"grace_seconds": 56}}, "method.grace_seconds", "56"),
        ({"method": {"log_mib": 0.001}}, "method.log_mib", "0.001"),
        ({"method": {"folder": "~nosuchuser/x"}}, "method.folder", "~nosuchuser/x"),
        ({"method": {"folder": "a\0b"}}, "method.folder", "not a path"),
        ({"weights": {"name": WEIGHTS["x"]}}, "weights.name", "choose another"),
        ({"weights": {"x": {**WEIGHTS["x"], "high": 10**400}}}, "weights.x.high", "number"),
        ({"plan": {"arms": [{"x": 10**400, "y": 1}]}}, "plan.arms.0", "x must be a finite"),
        ({"method": {"files": ["other.json"]}}, "method.files", "no file"),
        ({"method": {"folder": "elsewhere"}}, "method.folder", "no folder"),
        ({"method": {"metric": "top 1"}}, "method.metric", "'top 1'"),
        ({"method": {"checkpoint_on": "KILL"}}, "method.checkpoint_on", "TERM"),
        ({"method": {"grace": 3}}, "method.grace", "grace_seconds"),
        ({"weights": "normalised"}, "weights", "by their names"),
        ({"weights": {}}, "weights", "empty"),
        ({"weights": {"x": 1}}, "weights.x", "mapping of low, high and default"),
        ({"weights": {"x": {"low": 0, "high": 1}}}, "weights.x.default", "missing"),
        (
            {"weights": {"x": {"low": 0, "high": 1, "default": 2}}},
            "weights.x.default",
            "outside 0 to 1",
        ),
        (
            {"weights": {"x": {"low": 0, "high": 1, "default": 1, "log": True}}},
            "weights.x.low",
            "above 0",
        ),
        ({"weights": {"seed": WEIGHTS["x"]}}, "weights.seed", "name"),
        ({"data": "digits"}, "data", "leave it out"),
        ({"teacher": {"recipe": "latent-digits"}}, "teacher", "leave it out"),
        ({"resources": {"compile": True}}, "resources.compile", "leave it out"),
        (
            {"resources": {"gradient_checkpointing": True}},
            "resources.gradient_checkpointing",
            "leave it out",
        ),
        ({"plan": {"trials": 4, "at": [0.5]}}, "plan.at", "leave it out"),
        ({"plan": {"trials": 4, "stop": True}}, "plan.stop", "leave it out"),
        ({"plan": {"trials": 4, "sampler": "NoSampler"}}, "plan.sampler.name", "NoSampler"),
        ({"plan": {"arms": ["plain"]}}, "plan.arms", "defaults"),
        ({"plan": {"arms": [{"x": 1}]}}, "plan.arms.0", "x, y"),
        ({"plan": {"arms": [{"x": -1, "y": 1}]}}, "plan.arms.0", "above 0"),
        (
            {"plan": {"arms": ["defaults"], "variants": [{"metric": "other"}]}},
            "plan.variants.0.metric",
            "whole study's",
        ),
        ({"confirm": {"method": {"run": ["no-such-program"]}}}, "confirm.method.run", "no-such"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path, keys, key, said):
    path = written(tmp_path, **keys)
    with pytest.raises(InputError) as refusal:
        spec_of(path)
    (told,) = str(refusal.value).splitlines()
    assert told.startswith((f"{path}: {key} ", f"{path}: {key}: "))
    require_in_order(said, told)


def test_what_decides_the_metric_is_part_of_the_fingerprint(url, tmp_path):
    path = written(tmp_path)
    before = spec_of(path)
    assert "folder" not in json.dumps(before.conditions())
    written(tmp_path, method={"grace_seconds": 3, "log_mib": 1})
    assert spec_of(path).fingerprint() == before.fingerprint()
    written(tmp_path, "negative")
    assert spec_of(path).fingerprint() != before.fingerprint()
    work(planned(url, one_row(tmp_path)))
    (tmp_path / "program.py").write_text("print('another')")
    with pytest.raises(SpecChangedError, match="run"):
        Study.create(url, spec_of(path))


def test_a_script_and_the_programs_of_variants_are_part_of_the_fingerprint(tmp_path):
    other = {"run": [sys.executable, "other.py"]}
    plan = {"arms": ["defaults"], "variants": [{}, other]}
    path = written(tmp_path, plan=plan, method={"run": ["./t.sh"]}, confirm={"method": other})
    script, program = tmp_path / "t.sh", tmp_path / "other.py"
    found = []
    for texts in (("a", "a"), ("b", "a"), ("b", "b")):
        for file, text in zip((script, program), texts, strict=True):
            file.write_text(text)
            file.chmod(0o755)
        found.append(spec_of(path).fingerprint())
    assert len(set(found)) == 3
    # A search may still be confirmed by another program than it was planned to be.
    path = written(tmp_path, confirm={"method": other})
    search = spec_of(path)
    confirmation = arms_study(search, "losses.confirm")
    before = search.fingerprint(), confirmation.fingerprint()
    program.write_text("c")
    assert search.fingerprint() == before[0]
    assert confirmation.fingerprint() != before[1]


def test_no_weight_has_the_name_of_a_field_beside_it(losses, tmp_path):
    fields = json.loads(command("best", "losses", "--json").out)["best"].keys()
    columns = command("trials", "losses", "--csv").out.splitlines()[0].split(",")
    names = {*fields, *columns} - WEIGHTS.keys()
    assert {"number", "metric", "confirmed", "seconds"} <= names
    for name in names:
        with pytest.raises(InputError, match=rf"weights\.{name} "):
            spec_of(written(tmp_path, weights={name: WEIGHTS["y"]}))


def test_doubled_braces_are_braces(tmp_path):
    run = [sys.executable, "program.py", "${{HOME}}", "{x}", "{{{x}}}", "{", "{print $1}"]
    words = spec_of(written(tmp_path, method={"run": run})).workload.config.words({"x": 0.5})
    assert words[2:] == ["${HOME}", "0.5", "{0.5}", "{", "{print $1}"]


def test_a_word_may_be_a_long_script(tmp_path):
    run = ["sh", "-c", "true; " * 100]
    assert spec_of(written(tmp_path, method={"run": run})).workload.config.words({}) == run


def test_what_is_for_students_is_refused(losses, tmp_path):
    path = Path(losses.spec.workload.config.folder) / "losses.yaml"
    assert "program's own" in refused(command("export", "losses", tmp_path / "model"))
    assert "program's own" in refused(command("promote", "losses", "--weights", "1,0"))
    assert command("fetch", path).status == 0
    dry = command("launch", path, "--dry-run")
    assert (dry.status, "# rows: " in dry.out, "extractor" in dry.out) == (0, True, False)


def test_an_option_behind_two_dashes_is_not_suggested_again(tmp_path):
    answer = command("launch", tmp_path / "x.yaml", "--", "--trials", 3)
    (told,) = answer.err.splitlines()
    assert answer.status == 2
    assert "--trials" in told
    assert "did you mean" not in told


NO_TORCH = """
import json, sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision"):
            raise ImportError(f"a worker of programs imports {name}")

sys.meta_path.insert(0, NoTorch())
from search.worker.ray_tasks import WorkerConfig, prepare_task, slot
worker = WorkerConfig(**json.loads(sys.argv[1]))
assert list(prepare_task(worker, 1)) == []
assert slot({"worker": worker, "mark": sys.argv[2]}) == {"error": None}
"""


def test_neither_preparation_nor_worker_need_torch(url, tmp_path):
    study = planned(url, written(tmp_path, plan={"trials": 1, "replicates": 1}))
    subprocess.run(as_words(study, NO_TORCH), check=True, cwd=ROOT)
    assert study.left() == 0


OURS = ["BDENSE_STORAGE", "PGPASSWORD", "PGPASSFILE", "PGSERVICEFILE"]
OURS += ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"]


def test_the_program_s_environment_holds_no_password_of_ours(url, tmp_path, monkeypatch):
    for name in OURS:
        monkeypatch.setenv(name, url)
    dump = "(folder / 'environment').write_text(json.dumps(dict(os.environ)))"
    path = program_of(tmp_path, dump, DONE)
    study = work(planned(url, path))
    known = json.loads(program_file(study, 0, "environment"))
    assert not known.keys() & set(OURS)
    assert json.loads(known["BDENSE_PARAMS"]) == {"x": 2.0, "y": 1.0}
    assert (known["BDENSE_SEED"], known["OMP_NUM_THREADS"]) == ("0", "1")
    assert Path(known["BDENSE_TRIAL"]) == row(study, 0, "given.json").resolve()
