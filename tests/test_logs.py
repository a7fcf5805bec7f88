"""What a trial's log and the service's own log say."""

import contextvars
import json
import logging
import math
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa

from bdense.errors import InputError, StoppedError
from bdense.methods.distill import distill
from search.log import current_context, log_context, say, set_context, start_logging
from search.report.log_lines import LOSSES, log_line
from search.spec.space import search_space
from search.storage.engine import open_storage, resolve_storage_url
from search.storage.ledger import Claim, Ledger
from search.study.folders import row_folder
from search.study.results import TrialResult
from search.study.retention import CHECKPOINT
from search.study.study import SPEC, Study
from search.study.trial_log import LOG_FILE, TrialLog, is_noted, read_log, shortened
from search.worker.lifecycle import work_on_row
from search.worker.result import take_folder
from tests.contracts.scene import take, wait_until
from tests.measured import command, result
from tests.rows import SFD, loaded
from tests.rows import run as work_on
from tests.studies import spec


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch, shared_cache):
    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("BDENSE_CACHE", str(shared_cache))
    monkeypatch.delenv("BDENSE_STORAGE", raising=False)
    monkeypatch.delenv("BDENSE_LOG", raising=False)


def events(folder: Path) -> list[dict]:
    return read_log(folder / LOG_FILE)[0]


# The file.


def test_half_a_last_line_is_passed_over_and_the_next_one_is_whole(tmp_path):
    first = TrialLog(tmp_path).open()
    first("claimed")
    with (tmp_path / LOG_FILE).open("a") as file:
        file.write('{"event": "train')  # its worker died
    seen, offset = read_log(tmp_path / LOG_FILE)
    assert [event["event"] for event in seen] == ["claimed"]
    TrialLog(tmp_path).open()("adopted", from_attempt=1)
    assert [event["event"] for event in events(tmp_path)] == ["claimed", "adopted"]
    more, end = read_log(tmp_path / LOG_FILE, offset)
    assert [event["event"] for event in more] == ["adopted"]
    assert end == (tmp_path / LOG_FILE).stat().st_size
    assert read_log(tmp_path / LOG_FILE, end) == ([], end)
    assert read_log(tmp_path / "none") == ([], 0)


def test_an_event_says_when_who_and_what(tmp_path):
    with log_context(study="digits", trial=3, attempt=2):
        TrialLog(tmp_path).open()("checkpoint", iteration=7)
    (event,) = events(tmp_path)
    assert event.pop("time").endswith("+00:00")
    host, _, pid = event.pop("worker").rpartition(":")
    assert host
    assert int(pid) > 1
    assert event == {
        "level": "info",
        "study": "digits",
        "trial": 3,
        "attempt": 2,
        "event": "checkpoint",
        "iteration": 7,
    }


def test_a_log_that_cannot_be_written_is_no_reason_to_fail(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    TrialLog(tmp_path / "file").open()("claimed")
    TrialLog(tmp_path / "file").open()("claimed")
    assert "cannot be written" in caplog.text


def test_a_log_goes_to_the_folder_that_the_trial_takes(tmp_path):
    """Another study's folder is moved aside with its log; one that holds a log alone stays."""
    folder = tmp_path / "runs/digits/00000"
    TrialLog(folder).open()("released")
    take_folder(folder, {"params": {"a": 1.0}})
    log = TrialLog(folder)
    log("claimed")
    assert [event["event"] for event in events(folder)] == ["released"]
    take_folder(folder, {"params": {"a": 2.0}})
    log.open()
    assert [event["event"] for event in events(folder)] == ["claimed"]
    (aside,) = folder.parent.glob("00000.*")
    assert [event["event"] for event in events(aside)] == ["released"]


@pytest.mark.parametrize(("iterations", "lines"), [(1, 1), (40, 40), (199, 199), (12_345, 102)])
def test_long_trainings_get_as_many_lines_as_short_ones(iterations, lines):
    noted = [i for i in range(iterations) if is_noted(i, iterations)]
    assert len(noted) == lines
    assert (noted[0], noted[-1]) == (0, iterations - 1)


# What a trial notes.


def test_losses_are_those_of_each_interval_and_branch(tmp_path):
    assets = loaded(SFD, method__kimg=0.32, method__afs=False)
    folder, reports = tmp_path / "runs/digits/00000", []
    found = work_on(assets, folder)
    stages = distill(
        assets.method,
        assets.teacher,
        assets.config,
        lambda: assets.spec.space.weighting({"a": 1.0}, 4),
        assets.inputs(0),
        on_iteration=lambda _, report: reports.append(report),
    )
    assert len(list(stages)) == 1
    training = [event for event in events(folder) if event["event"] == "training"]
    assert [event["iteration"] for event in training] == list(range(1, 11))
    for event, report in zip(training, reports, strict=True):
        assert event["branch_losses"] == shortened(report.branch_losses)
        assert event["loss"] == pytest.approx(report.loss, rel=1e-5)
        assert [len(interval) for interval in event["branch_losses"]] == [4, 4]
    assert training[0]["weights"][0] == pytest.approx(found.weights, rel=1e-5)
    assert events(folder)[-1] == events(folder)[-1] | {"event": "evaluating", "images": 256}


def made(**keys) -> Study:
    return Study.create(resolve_storage_url(None), spec(**keys))


def claimed(study: Study) -> Claim:
    return take(study.search, space=search_space(spec()))


def run(study: Study, work) -> Claim:
    """Bring a trial to its end by a ``work`` that takes the lease, the folder and the log."""
    taken = claimed(study)

    def whole(*given) -> TrialResult:
        work(*given)
        return result(study, study.search, taken, 2.5)

    work_on_row(study.search, taken, whole, fingerprint="f", asked=0.0)
    return taken


def test_the_ends_of_attempts_are_told(tmp_path):
    study = made(resources={"max_attempts": 2})

    def stopped(*_):
        raise StoppedError("enough")

    def broken(holding, folder, log):
        (folder / CHECKPOINT).write_bytes(b"x")
        raise RuntimeError("a bug with postgresql://me:s3cret@host/db in it")

    def whole(holding, folder, log):
        take_folder(folder, {"params": {}})
        log.open()

    with pytest.raises(StoppedError):
        run(study, stopped)
    first = run(study, broken)
    run(study, broken)
    second = run(study, whole)
    assert (first.attempt, first.tries, second.number) == (2, 1, 1)
    folder = row_folder("digits", 0)
    assert [(e["attempt"], e["event"]) for e in events(folder)] == [
        (1, "claimed"),
        (1, "released"),
        (2, "adopted"),
        (2, "released"),
        (3, "adopted"),
        (3, "failed"),
    ]
    told = events(folder)
    assert told[1]["why"] == "stopped"
    assert told[2]["from_attempt"] == 1
    assert told[3]["why"] == "RuntimeError: a bug with postgresql://me:***@host/db in it"
    assert (told[5]["reason"], told[5]["level"]) == ("error", "warning")
    assert "s3cret" not in (folder / LOG_FILE).read_text()
    assert [path.name for path in folder.iterdir()] == [LOG_FILE]  # no checkpoint either
    assert not list(folder.parent.glob("00000.*"))
    assert [e["event"] for e in events(row_folder("digits", 1))] == ["claimed", "complete"]
    assert events(row_folder("digits", 1))[1]["fid"] == 2.5


# For people.

EVENT = {"time": "2026-01-02T03:04:05+00:00", "attempt": 2, "level": "info", "worker": "box:7"}


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (
            {"event": "adopted", "from_attempt": 1, "params": {"a": 1.25}},
            "2  adopted from attempt 1 by box:7: a 1.25",
        ),
        (
            {
                "event": "training",
                "iteration": 5,
                "iterations": 160,
                "loss": 12.5,
                "branch_losses": [[1.0, 2.0], [10.0, 1234.5]],
                "weights": [[1.0, 1.0]],
            },
            "2  training    5/160  loss     12.5  [1]        1        2  [2]       10     1234",
        ),
        (
            {
                "event": "training",
                "stage": "00004",
                "iteration": 5,
                "iterations": 9,
                "loss": 0.5,
                "branch_losses": [[0.25]],
            },
            "2  training  00004, 5/9  loss      0.5  [1]     0.25",
        ),
        ({"event": "complete", "fid": 9.87654321}, "2  complete  fid 9.87654"),
        ({"event": "failed", "reason": "diverged"}, "2  failed  reason diverged"),
    ],
)
def test_events_as_lines(event, line):
    shown = log_line(EVENT | event)
    assert shown[8:].strip() == line
    assert shown[2] == shown[5] == ":"


def test_logs_of_a_trial_are_followed_to_its_end():
    study = made()
    taken = claimed(study)
    log = TrialLog(row_folder("digits", 0)).open()
    with log_context(attempt=1):
        log("claimed", params={"a": 1.0})

    def end() -> None:
        log("complete", fid=3.0)
        study.search.complete(taken, 3.0, {})

    timer = threading.Timer(0.2, end)
    timer.start()
    status, out, _ = command("logs", "digits", "0", "--follow")
    timer.join()
    assert status == 0
    assert [line[19:].split(" ")[0] for line in out.splitlines()[1:]] == ["claimed", "complete"]
    status, out, _ = command("logs", "digits", "0", "--json")
    assert [json.loads(line)["event"] for line in out.splitlines()] == ["claimed", "complete"]


def test_logs_are_shown_of_a_study_that_another_version_stored():
    """Losses are explained once, before the first of them."""
    study = made()
    claimed(study)
    log = TrialLog(row_folder("digits", 0)).open()
    with log_context(attempt=1):
        log("claimed", params={"a": 1.0})
        for iteration in (1, 2):
            told = {"iteration": iteration, "iterations": 2, "loss": 1.0}
            log("training", **told, branch_losses=[[1.0, 2.0]])
    study.main.study.set_user_attr(SPEC, '{"plan": {"of_another_version": 1}}')
    with pytest.raises(InputError):
        _ = study.spec
    status, out, _ = command("logs", "digits", "0")
    words = [line[19:].split(" ")[0] for line in out.splitlines() if line[2:3] == ":"]
    assert (status, words) == (0, ["claimed", "training", "training"])
    assert [line == LOSSES for line in out.splitlines()] == [False, False, True, False, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("9",), "study digits has no trial 9: there are 1 so far, 3 more are to come, numbered"),
        (("0",), "trial 0 has no log in "),
        (("--baseline", "plain"), "trial 0 has no log in "),
        ((), "or --baseline must be given"),
        (("0", "--baseline", "plain"), "or --baseline must be given"),
        (("--baseline", "defaults"), "--baseline must be plain or uniform here, got defaults"),
        (("-1", "--follow"), "has no trial -1"),  # following it would never end
    ],
)
def test_logs_that_are_not_there(arguments, message):
    study = made()
    claimed(study)
    status, out, err = command("logs", "digits", *arguments)
    assert (status, out) == (2, "")
    assert message in err
    study.given.delete()
    Ledger.open(study.url, "digits.baselines", budget=2)
    assert "no baseline uniform yet" in command("logs", "digits", "--baseline", "uniform")[2]


# The service's own log.


@pytest.fixture
def as_json(monkeypatch):
    monkeypatch.setenv("BDENSE_LOG", "json")
    start_logging()
    yield
    monkeypatch.undo()
    start_logging()


def test_every_record_says_what_it_is_about(capsys, as_json):
    log = logging.getLogger("search.test")

    def write():
        with log_context(study="digits", trial=4, attempt=1):
            log.warning("password=s3cret\nin two lines %s", 1)
            log.debug("not this")
        log.info("no trial")
        say("a line for people")

    contextvars.Context().run(write)  # whatever an earlier test's worker left in this thread's
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line.pop("time")[-6:] for line in lines] == ["+00:00"] * 3
    keys = ("level", "logger", "study", "trial", "attempt", "message")
    first = ("warning", "search.test", "digits", 4, 1, "password=***\nin two lines 1")
    second = ("info", "search.test", None, None, None, "no trial")
    assert lines[:2] == [dict(zip(keys, each, strict=True)) for each in (first, second)]
    assert lines[2]["message"] == "a line for people"


def test_a_trial_s_events_and_its_lease_s_troubles_are_in_the_log(capsys, as_json):
    url, study = resolve_storage_url(None), made()

    def rename(old: str, new: str) -> None:
        with open_storage(url).engine.begin() as connection:
            connection.execute(sa.text(f"ALTER TABLE {old} RENAME TO {new}"))

    told: list[str] = []

    def is_told() -> bool:
        told.append(capsys.readouterr().err)
        return "not renewed" in "".join(told)

    def work(holding, folder, log):
        rename("bdense_lease", "gone")
        holding.report("x")  # a progress is written within a second
        wait_until(is_told)
        rename("gone", "bdense_lease")

    run(study, work)
    told.append(capsys.readouterr().err)
    lines = [json.loads(line) for line in "".join(told).splitlines()]
    ours = {(line["study"], line["trial"], line["attempt"]) for line in lines}
    assert ours == {("digits", 0, 1)}
    assert lines[0]["message"] == "claimed"
    assert any("lease of trial 0 not renewed" in line["message"] for line in lines)
    assert lines[-1] | {"message": "complete", "fid": 2.5} == lines[-1]


def test_a_record_hides_passwords_and_keeps_its_own_keys(capsys, as_json):
    fields = {
        "study": "theirs",
        "message": "theirs",
        "error": "postgresql://me:s3cret@host/db",
        "deep": {"urls": ["password=s3cret"], "loss": math.nan},
        "loss": [math.inf, -math.inf, 1.5],
        "path": Path("a/b"),
    }
    with log_context(study="digits"):
        log_exception("ours", fields=fields)
    (line,) = capsys.readouterr().err.splitlines()
    told = json.loads(line, parse_constant=pytest.fail)
    assert (told["study"], told["message"], told["level"]) == ("digits", "ours", "error")
    assert told["error"] == "postgresql://me:***@host/db"
    assert told["deep"] == {"urls": ["password=***"], "loss": "nan"}
    assert (told["loss"], told["path"]) == (["inf", "-inf", 1.5], "a/b")
    assert "ValueError: postgresql://me:***@host/db" in told["exception"]


def test_the_log_for_people_hides_passwords_too(capsys):
    start_logging()
    log_exception("password=s3cret")
    said = capsys.readouterr().err
    assert said.startswith("password=***\n")
    assert "ValueError: postgresql://me:***@host/db" in said


def log_exception(message: str, **extra) -> None:
    try:
        raise ValueError("postgresql://me:s3cret@host/db")
    except ValueError:
        logging.getLogger("search.test").exception(message, extra=extra)


def test_a_trial_s_log_is_json_whatever_the_losses_are(tmp_path):
    losses = {"loss": math.nan, "branch_losses": [[math.inf, 1.0]]}
    TrialLog(tmp_path).open()("training", iteration=1, iterations=9, time="theirs", **losses)
    (line,) = (tmp_path / LOG_FILE).read_text().splitlines()
    event = json.loads(line, parse_constant=pytest.fail)
    assert (event["loss"], event["branch_losses"]) == ("nan", [["inf", 1.0]])
    assert event["time"] != "theirs"
    assert "1/9  loss      nan  [1]      inf        1" in log_line(event)


def test_mistakes_are_told_in_the_log_too(as_json):
    answer = command("status", "nobody")
    (line,) = map(json.loads, answer.err.splitlines())
    assert answer.status == 2
    assert line["message"].startswith("bdense-search: no study 'nobody'")


def test_another_form_of_log_is_refused(monkeypatch):
    monkeypatch.setenv("BDENSE_LOG", "xml")
    status, _, err = command("status", "digits")
    assert (status, "BDENSE_LOG=xml" in err, "text or json" in err) == (2, True, True)


def test_what_a_thread_speaks_of_is_its_own():
    set_context(study="mine")
    seen: list[dict] = []
    thread = threading.Thread(target=lambda: seen.append(current_context()))
    thread.start()
    thread.join()
    assert seen == [{}]
    assert current_context()["study"] == "mine"
