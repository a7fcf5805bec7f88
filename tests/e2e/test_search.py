"""The command line from a user's seat: real Ray, real torch, a real database."""

import contextlib
import json
import signal
import subprocess
from pathlib import Path

import pytest
from optuna_dashboard import get_note

from bdense.models.store import load_tensors
from search.storage.ledger import Ledger
from search.study.artifacts import FolderStore, attached
from search.study.trial_log import read_log
from tests.e2e.study import Workplace, kill, small_study, wait_until

BEST_KEYS = {"number", "a", "b", "weights", "fid", "nfe", "images", "extractor", "reference"}
RAY = Path("/tmp/ray")


@pytest.fixture(scope="module")
def calm_fids(tmp_path_factory, cache) -> dict[float, float]:
    """What four trials give in one process, without Ray, when nothing happens to them."""
    workplace = Workplace(tmp_path_factory.mktemp("calm"), cache)
    workplace.work(small_study(plan={"trials": 4}))
    return workplace.fids()


def sessions() -> set[Path]:
    """Ray's folders of logs."""
    return set(RAY.glob("session_2*"))


@pytest.mark.postgres
def test_a_study_from_launch_to_best(workplace, calm_fids, postgres):
    """On PostgreSQL, whose password shows in no file, process list, output or row."""
    password = "s3cret-Kx9"
    url = postgres.new_database().replace("postgres@", f"postgres:{password}@", 1)
    assert password in url
    study = workplace.write(small_study())
    before = sessions()
    launcher = workplace.start("launch", study, "--storage", url)
    # The first moments belong to the user's own command line.
    own = Path(f"/proc/{launcher.pid}/cmdline")
    wait_until(
        lambda: (text := own.read_text()) and password not in text,  # empty while it is executed
        what="the password leaves ps",
    )
    seen_running = False
    while launcher.poll() is None:
        lines = process_list()
        seen_running |= any("ray::" in line for line in lines)
        assert not [line for line in lines if password in line]
        with contextlib.suppress(subprocess.TimeoutExpired):
            launcher.wait(timeout=1)
    out, err = launcher.communicate()
    assert launcher.returncode == 0, err
    assert seen_running
    assert password not in out + err
    assert out.startswith("study small: 3 of 3 trials complete, 0 pruned, 0 failed")
    assert "best of n, not confirmed" in out

    # As in one process, number for number.
    workplace.storage = url
    fids = workplace.fids()
    assert fids == dict([*calm_fids.items()][:3])
    assert_shown(workplace, "small", "small.baselines")
    best = json.loads(workplace.ran("best", "small", "--json"))
    assert ":***@" in best["storage"]
    assert password not in json.dumps(best)
    states = {"planned": 3, "complete": 3, "pruned": 0, "failed": 0, "running": 0}
    assert (best["study"], best["trials"]) == ("small", states)
    found = best["best"]
    assert found.keys() >= BEST_KEYS
    assert (found["fid"], found["nfe"], found["images"]) == (min(fids.values()), 2, 64)
    assert sum(found["weights"]) == pytest.approx(4.0)
    assert found["confirmed"] is False
    assert list(best["baselines"]) == ["sfd", "uniform"]
    record = workplace.ledger("small")
    stored = record.study.user_attrs["baselines"]
    assert stored == {"plain": best["baselines"]["sfd"], "uniform": best["baselines"]["uniform"]}
    assert (workplace.runs / found["student"]).exists()
    trial = record.study.trials[found["number"]]
    stored = {"seeds", "fingerprint", "versions", "timings", "weights", "fid"}
    assert trial.user_attrs.keys() >= stored

    again = workplace.command("launch", study)
    assert (again.status, workplace.fids()) == (0, fids)
    assert "nothing is left to do" in again.err
    changed = workplace.refused("launch", workplace.write(small_study(method={"lr": 1e-3})))
    assert "method.lr: 0.0005 stored, 0.001 given" in changed
    freed = [float(workplace.done("clean", "small").split()[0]) for _ in range(2)]
    assert freed == [pytest.approx(5.0, abs=0.1), 0.0]

    written = [*workplace.folder.rglob("*"), *workplace.cache.rglob("*")]
    written += [path for session in sessions() - before for path in session.rglob("*")]
    files = [path for path in written if path.is_file() and not path.is_symlink()]
    assert len(files) > 20
    assert not [path for path in files if password.encode() in path.read_bytes()]
    rows = record.study.get_trials(deepcopy=False)
    assert password not in repr([(t.user_attrs, t.system_attrs) for t in rows])


def assert_shown(workplace: Workplace, *names: str) -> None:
    """Each trial has its pictures once, as they are in its folder; the study note."""
    folder = FolderStore(workplace.runs / "artifacts")
    for name in names:
        of = workplace.ledger(name)
        for trial in of.study.get_trials(deepcopy=False):
            metas = attached(of.storage, trial)
            assert sorted(meta.filename for meta in metas) == ["loss.png", "samples.png"]
            for meta in metas:
                kept = workplace.runs / name / f"{trial.number:05d}" / meta.filename
                with folder.open_reader(meta.artifact_id) as stored:
                    assert stored.read() == kept.read_bytes()
    assert "3 of 3 trials complete" in get_note(workplace.ledger(names[0]).study)


def process_list() -> list[str]:
    """Arguments of every process, as ``ps`` would show them."""
    lines = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines.append(entry.read_bytes().decode(errors="replace"))
    return lines


@pytest.mark.slow
@pytest.mark.faults
def test_killed_workers_and_launchers_lose_nothing(workplace, calm_fids):
    """kill -9 of a worker, Ctrl-C, kill -9 of the launcher: same trials, same FIDs."""
    study, names = workplace.write(small_study()), ("small.baselines", "small")
    launcher = workplace.start("launch", study)
    killed, _ = workplace.worker_at("training", *names)
    kill(killed)
    interrupted, _ = workplace.worker_at("training", *names)
    launcher.send_signal(signal.SIGINT)
    _, err = launcher.communicate(timeout=900)
    assert launcher.returncode == 130, err
    assert "run the same command again to continue" in err

    launcher = workplace.start("launch", study)
    wait_until(
        lambda: workplace.worker_at("training", *names)[0] not in (killed, interrupted),
        what="a new worker",
    )
    kill(launcher.pid)
    launcher.communicate(timeout=300)

    # Extended on the way.
    assert "4 of 4 trials complete" in workplace.ran("launch", study, "--trials", "4")
    assert workplace.fids() == calm_fids
    record = workplace.ledger("small")
    changes = [(c["key"], c["old"], c["new"]) for c in record.study.user_attrs["changes"]]
    assert changes == [("budget", 3, 4)]
    for name in names:
        counts = workplace.ledger(name).counts()
        assert counts.complete == counts.planned
        assert (counts.failed, counts.running, counts.waiting) == (0, 0, 0)


@pytest.mark.slow
@pytest.mark.faults
def test_a_stopped_study_saves_at_once_and_carries_on(workplace, tmp_path_factory, cache):
    """`stop` from another process: nothing is trained twice, the FIDs are those of a calm run."""
    # Long enough for another process to start; no checkpoint but the one for the stop.
    tree = small_study(
        plan={"trials": 1}, method={"kimg": 6.4}, resources={"checkpoint_seconds": 1e6}
    )
    calm = Workplace(tmp_path_factory.mktemp("calm"), cache)
    calm.work(tree)
    study = workplace.write(tree)
    launcher = workplace.start("launch", study)
    _, number = workplace.worker_at("training", "small")
    assert "is stopped: no trial is worked on" in workplace.ran("stop", "small", "--wait")
    out, err = launcher.communicate(timeout=900)
    assert (launcher.returncode, out) == (130, "")
    assert "stopped by `bdense-search stop`; nothing is lost" in err
    assert "Traceback" not in err

    folder = workplace.runs / f"small/{number:05d}"
    saved = load_tensors(folder / "checkpoint.safetensors")[1]["iteration"]
    events, _ = read_log(folder / "log.jsonl")
    assert [e["event"] for e in events if e["event"] != "training"] == [
        "claimed",
        "checkpoint",
        "released",
    ]
    assert saved == events[-2]["iteration"] > 0
    assert workplace.ledger("small").counts().failed == 0
    assert "asked to stop at" in workplace.done("status", "small")

    workplace.extra["BDENSE_LOG"] = "json"
    before = sessions()
    again = workplace.run("launch", study)
    del workplace.extra["BDENSE_LOG"]
    assert again.returncode == 0, again.stderr
    assert workplace.fids() == calm.fids()
    said = [json.loads(line)["message"] for line in again.stderr.splitlines()]
    assert any(message.startswith("carrying on with study small") for message in said)
    told = [
        json.loads(line)
        for session in sessions() - before
        for path in session.glob("logs/worker-*.err")
        for line in path.read_text().splitlines()
        if line.startswith("{")
    ]
    mine = {(e["study"], e["trial"], e["attempt"], e["message"]) for e in told}
    assert ("small", number, 2, "complete") in mine
    assert "asked to stop at" not in workplace.done("status", "small")
    events, _ = read_log(folder / "log.jsonl")
    after = [e for e in events if e["attempt"] == 2]
    assert after[0]["event"] == "adopted"
    trained = [e["iteration"] for e in events if e["event"] == "training"]
    assert trained == list(range(1, 101)), "an iteration twice, or none"
    trial = workplace.ledger("small").study.trials[number]
    assert trial.user_attrs["tries"] == 1, "the stop was held against it"
    shown = workplace.done("logs", "small", str(number))
    assert "training  100/100  loss" in shown
    # With AFS two of three intervals are trained.
    assert (shown.count("  [2] "), shown.count("  [3] ")) == (100, 0)
    assert len(workplace.done("logs", "small", "--baseline", "plain").splitlines()) > 100


# Studies that one process works on, without Ray.

SHORT = {"kimg": 0.128}


def work(workplace: Workplace, *points: dict[str, float], **sections: object) -> Ledger:
    """The trials of a study of two updates a trial."""
    return workplace.work(small_study(method=SHORT, **sections), points).search


def test_a_trial_that_diverges_fails_with_its_reason_and_the_study_goes_on(workplace):
    """exp(4 a) overflows float32 from a = 22.2 on."""
    space = {"name": "log-linear", "a": {"low": 0, "high": 500}, "b": {"low": 0, "high": 0}}
    points = [{"a": a, "b": 0.0} for a in (1.0, 40.0, 2.0)]
    done = work(workplace, *points, weights=space)
    good, diverged, after = done.study.get_trials(deepcopy=False)
    assert [t.params["a"] for t in (good, diverged, after)] == [1.0, 40.0, 2.0]
    assert diverged.state.name == "FAIL"
    assert diverged.user_attrs["reason"] == "diverged"
    assert "not finite at iteration 0, interval 1" in diverged.user_attrs["error"]
    assert good.value > 0
    assert after.value > 0
    counts = done.counts()
    assert (counts.planned, counts.complete, counts.failed, counts.running) == (3, 2, 1, 0)


def test_weights_beyond_the_bound_are_not_trained(workplace):
    """K = 4 normalised: the largest weight stays below 2 for |a| up to about 0.7."""
    done = work(workplace, weights={"largest": 2.0})
    trials = done.study.get_trials(deepcopy=False)
    refused = [t for t in trials if t.user_attrs.get("out_of_bounds")]
    assert refused
    assert all(t.params["a"] > 0.5 and "weights" not in t.user_attrs for t in refused)
    complete = [t for t in trials if t.value is not None]
    assert len(complete) == 3
    assert all(max(t.user_attrs["weights"]) <= 2.0 for t in complete)
    counts = done.counts()
    assert (counts.planned, counts.complete, counts.pruned, counts.failed) == (3, 3, 0, 0)


# Mistakes, and nothing started.


def test_dry_run_starts_nothing(workplace, monkeypatch):
    monkeypatch.setattr("search.worker.cost.PATIENCE_SECONDS", 0.0)
    said = workplace.done("launch", workplace.write(small_study()), "--dry-run")
    for part in (
        "# rows: 5, each of a student, 40 updates and 64 images",
        "memory: ",  # why it is not measured
        "# teacher: trained on 256 images, once",
        "# fingerprint ",
    ):
        assert part in said
    assert not workplace.runs.exists()


def test_mistakes_exit_with_2_and_one_line(workplace):
    wrong = workplace.write(small_study(name="wrong", plan={"trails": 3}))
    assert "the study file absent.yaml cannot be read" in workplace.refused("best", "absent.yaml")
    usage = workplace.command("launch", wrong, "--workers", "0")
    assert (usage.status, "--workers " in usage.err) == (2, True)
    answer = workplace.run("launch", wrong)
    assert (answer.returncode, answer.stdout, answer.stderr.count("\n")) == (2, "", 1)
    assert "plan.trails" in answer.stderr
    assert not workplace.runs.exists()
