"""The command line from a user's seat: real Ray, real torch, a real database."""

import contextlib
import json
import signal
import subprocess
from pathlib import Path

import pytest
from optuna_dashboard import get_note

from bdense.data.datasets import load_dataset
from bdense.models.store import load_tensors
from search.storage.engine import resolve_storage_url
from search.storage.ledger import Ledger
from search.storage.reader import Running
from search.study.artifacts import FolderStore, attached
from search.study.study import Study
from search.study.trial_log import read_log
from search.worker.assets import load_teacher, prepare, trajectory_store, use_device
from search.worker.ray_tasks import Orders, slot
from tests.e2e.study import Workplace, kill, small_study, wait_until

BEST_KEYS = {"number", "a", "b", "weights", "fid", "nfe", "images", "extractor", "reference"}


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def workplace(tmp_path, cache) -> Workplace:
    return Workplace(tmp_path, cache)


def ledger(workplace: Workplace, name: str = "small") -> Ledger:
    url = workplace.storage or f"sqlite:///{workplace.folder}/runs/bdense.db"
    return Ledger.open(resolve_storage_url(url), name, budget=None)


def fids(workplace: Workplace) -> dict[float, float]:
    trials = ledger(workplace).study.get_trials(deepcopy=False)
    found = {trial.params["a"]: trial.value for trial in trials if trial.value is not None}
    assert len(found) == len(trials), "a parameter twice, or a trial without value"
    return found


@pytest.fixture(scope="session")
def calm_fids(tmp_path_factory, cache) -> dict[float, float]:
    """What three trials give when nothing happens to them."""
    workplace = Workplace(tmp_path_factory.mktemp("calm"), cache)
    done = workplace.run("launch", workplace.write(small_study()))
    assert done.returncode == 0, done.stderr
    return fids(workplace)


def assert_shown(workplace: Workplace, *names: str) -> None:
    """Each trial has its grid once, which is the one in its folder; the study note."""
    folder = FolderStore(workplace.folder / "runs" / "artifacts")
    for name in names:
        of = ledger(workplace, name)
        for trial in of.study.get_trials(deepcopy=False):
            (meta,) = attached(of.storage, trial)
            grid = workplace.folder / "runs" / name / f"{trial.number:05d}" / "samples.png"
            with folder.open_reader(meta.artifact_id) as stored:
                assert stored.read() == grid.read_bytes()
    record = ledger(workplace, names[0])
    assert "3 of 3 trials complete" in get_note(record.study)


@pytest.mark.slow
def test_a_study_from_launch_to_best(workplace, calm_fids):
    """Launch, look, launch again, extend; the second run repeats every number of the first."""
    study = workplace.write(small_study())
    first = workplace.run("launch", study)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("study small: 3 of 3 trials complete, 0 pruned, 0 failed")
    assert "best of n, not confirmed" in first.stdout
    assert "bdense-search dashboard" in first.stdout
    assert fids(workplace) == calm_fids
    assert_shown(workplace, "small", "small.baselines")

    best = workplace.json("best", "small")
    assert best["study"] == "small"
    assert best["storage"] == f"sqlite:///{workplace.folder.resolve()}/runs/bdense.db"
    assert best["trials"] == {
        "planned": 3,
        "complete": 3,
        "pruned": 0,
        "failed": 0,
        "running": 0,
    }
    assert best["best"].keys() >= BEST_KEYS
    assert best["best"]["fid"] == min(calm_fids.values())
    assert sum(best["best"]["weights"]) == pytest.approx(4.0)
    assert (best["best"]["nfe"], best["best"]["images"]) == (2, 256)
    assert best["best"]["confirmed"] is False
    assert list(best["baselines"]) == ["sfd", "uniform"]
    assert ledger(workplace).study.user_attrs["baselines"] == best["baselines"]
    assert workplace.json("status", study) == {"study": "small", "trials": best["trials"]}

    student = workplace.folder / "runs" / best["best"]["student"]
    assert student.exists()
    trial = ledger(workplace).study.trials[best["best"]["number"]]
    assert {"seeds", "fingerprint", "versions", "timings", "weights", "fid"} <= set(
        trial.user_attrs
    )

    again = workplace.run("launch", study)
    assert again.returncode == 0
    assert "study small is complete; nothing is left to do" in again.stderr
    assert fids(workplace) == calm_fids

    more = workplace.run("launch", study, "--trials", "4")
    assert "4 of 4 trials complete" in more.stdout
    after = fids(workplace)
    assert len(after) == 4
    assert after.items() >= calm_fids.items()
    changes = ledger(workplace).study.user_attrs["changes"]
    assert [(c["key"], c["old"], c["new"]) for c in changes] == [("budget", 3, 4)]

    assert "5.0 MiB of trajectories deleted" in workplace.run("clean", "small").stdout
    assert "0.0 MiB of trajectories deleted" in workplace.run("clean", "small").stdout

    changed = workplace.write(small_study(method={"lr": 1e-3}))
    refused = workplace.run("launch", changed)
    assert refused.returncode == 2
    assert "method.lr: 0.0005 stored, 0.001 given" in refused.stderr
    assert fids(workplace) == after


@pytest.mark.slow
@pytest.mark.faults
def test_killed_workers_and_launchers_lose_nothing(workplace, calm_fids):
    """kill -9 of a worker, Ctrl-C, kill -9 of the launcher: same trials, same FIDs."""
    study = workplace.write(small_study())

    def worker_in_training() -> int | None:
        database = workplace.folder / "runs/bdense.db"
        if not database.exists():
            return None
        for name in ("small.baselines", "small"):
            try:
                rows = ledger(workplace, name).running()
            except ValueError:
                continue
            for row in rows:
                # One that was given back keeps its progress and has no owner.
                if row.owner and row.progress.startswith("training"):
                    return int(row.owner.rsplit(":", 1)[1])
        return None

    launcher = workplace.start("launch", study)
    kill(wait_until(worker_in_training, what="a worker in training"))
    first = wait_until(worker_in_training, what="a worker after the kill")
    assert first
    launcher.send_signal(signal.SIGINT)
    _, err = launcher.communicate(timeout=300)
    assert launcher.returncode == 130, err
    assert "run the same command again to continue" in err

    launcher = workplace.start("launch", study)
    wait_until(lambda: worker_in_training() not in (None, first), what="a new worker")
    kill(launcher.pid)
    launcher.communicate(timeout=60)

    last = workplace.run("launch", study)
    assert last.returncode == 0, last.stderr
    assert fids(workplace) == calm_fids
    for name in ("small", "small.baselines"):
        counts = ledger(workplace, name).counts()
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
    study = workplace.write(tree)
    calm = Workplace(tmp_path_factory.mktemp("calm"), cache)
    done = calm.run("launch", calm.write(tree))
    assert done.returncode == 0, done.stderr

    def in_training() -> list[Running]:
        if not (workplace.folder / "runs/bdense.db").exists():
            return []
        with contextlib.suppress(ValueError):
            rows = ledger(workplace).running()
            return [row for row in rows if row.progress.startswith("training")]
        return []

    launcher = workplace.start("launch", study)
    (*_, row) = wait_until(in_training, what="a trial in training")
    stop = workplace.run("stop", "small", "--wait")
    assert stop.returncode == 0, stop.stderr
    assert "study small is stopped: no trial is worked on" in stop.stdout
    out, err = launcher.communicate(timeout=300)
    assert (launcher.returncode, out) == (130, "")
    assert "study small was stopped by `bdense-search stop`; nothing is lost" in err
    assert "Traceback" not in err

    folder = workplace.folder / f"runs/small/{row.number:05d}"
    saved = load_tensors(folder / "checkpoint.safetensors")[1]["iteration"]
    events, _ = read_log(folder / "log.jsonl")
    assert [e["event"] for e in events if e["event"] != "training"] == [
        "claimed",
        "checkpoint",
        "released",
    ]
    assert saved == events[-2]["iteration"] > 0
    assert ledger(workplace).counts().failed == 0
    assert "asked to stop at" in workplace.run("status", "small").stdout

    workplace.extra["BDENSE_LOG"] = "json"
    ray_sessions = Path("/tmp/ray")
    before = set(ray_sessions.glob("session_2*"))
    again = workplace.run("launch", study)
    del workplace.extra["BDENSE_LOG"]
    assert again.returncode == 0, again.stderr
    assert fids(workplace) == fids(calm)
    said = [json.loads(line)["message"] for line in again.stderr.splitlines()]
    assert any(message.startswith("carrying on with study small") for message in said)
    told = [
        json.loads(line)
        for session in set(ray_sessions.glob("session_2*")) - before
        for path in session.glob("logs/worker-*.err")
        for line in path.read_text().splitlines()
        if line.startswith("{")
    ]
    mine = {(e["study"], e["trial"], e["attempt"], e["message"]) for e in told}
    assert ("small", row.number, 2, "complete") in mine
    assert "asked to stop at" not in workplace.run("status", "small").stdout
    events, _ = read_log(folder / "log.jsonl")
    after = [e for e in events if e["attempt"] == 2]
    assert after[0]["event"] == "adopted"
    trained = [e["iteration"] for e in events if e["event"] == "training"]
    assert trained == list(range(1, 101)), "an iteration twice, or none"
    trial = ledger(workplace).study.trials[row.number]
    assert trial.user_attrs["tries"] == 1, "the stop was held against it"
    shown = workplace.run("logs", "small", str(row.number))
    assert "training  100/100  loss" in shown.stdout
    # With AFS two of three intervals are trained.
    assert (shown.stdout.count("  [2] "), shown.stdout.count("  [3] ")) == (100, 0)
    assert len(workplace.run("logs", "small", "--baseline", "plain").stdout.splitlines()) > 100


def run_slot(workplace: Workplace, monkeypatch, study: dict, points=()) -> Ledger:
    """A study without Ray: its shared parts, then one slot in this process."""
    monkeypatch.setenv("BDENSE_RUNS", str(workplace.folder / "runs"))
    monkeypatch.setenv("BDENSE_CACHE", str(workplace.cache))
    url = resolve_storage_url(None)
    spec = resolved(study)
    record = Study.create(url, spec)
    device = use_device(spec)
    prepare(spec, device, lambda *_: None)
    for point in points:
        record.search.enqueue(point)
    trajectory_store(spec, load_teacher(spec, load_dataset("digits"), device)).record()
    orders = Orders(
        kind="search",
        study=spec.name,
        storage=url,
        runs=str(workplace.folder / "runs"),
        cache=str(workplace.cache),
    )
    assert slot({"orders": orders, "mark": str(workplace.folder / "mark")}) == {"refusal": None}
    return record.trials


def test_a_trial_that_diverges_fails_with_its_reason_and_the_study_goes_on(workplace, monkeypatch):
    """exp(4 a) overflows float32 from a = 22.2 on."""
    study = small_study(weights={"name": "log-linear", "a": {"low": 0.0, "high": 500.0}})
    study["weights"]["b"] = {"low": 0.0, "high": 0.0}
    study["plan"]["trials"] = 3
    study["method"]["kimg"] = 0.128
    points = [{"a": a, "b": 0.0} for a in (1.0, 40.0, 2.0)]
    done = run_slot(workplace, monkeypatch, study, points)
    good, diverged, after = done.study.get_trials(deepcopy=False)
    assert [t.params["a"] for t in (good, diverged, after)] == [1.0, 40.0, 2.0]
    assert diverged.state.name == "FAIL"
    assert diverged.user_attrs["reason"] == "diverged"
    assert "not finite at iteration 0, interval 1" in diverged.user_attrs["error"]
    assert good.value > 0
    assert after.value > 0
    counts = done.counts()
    assert (counts.planned, counts.complete, counts.failed, counts.running) == (3, 2, 1, 0)


def test_weights_beyond_the_bound_are_not_trained(workplace, monkeypatch):
    """K = 4 normalised: the largest weight stays below 2 for |a| up to about 0.7."""
    study = small_study(weights={"largest": 2.0})
    study["plan"]["trials"] = 3
    study["method"]["kimg"] = 0.128
    done = run_slot(workplace, monkeypatch, study)
    trials = done.study.get_trials(deepcopy=False)
    refused = [t for t in trials if t.user_attrs.get("out_of_bounds")]
    assert refused
    assert all(t.params["a"] > 0.5 and "weights" not in t.user_attrs for t in refused)
    complete = [t for t in trials if t.value is not None]
    assert len(complete) == 3
    assert all(max(t.user_attrs["weights"]) <= 2.0 for t in complete)
    counts = done.counts()
    assert (counts.planned, counts.complete, counts.pruned, counts.failed) == (3, 3, 0, 0)


def test_a_study_of_learned_weights(workplace, monkeypatch):
    """Its rows hold where the weights went; a launch with other rules is refused."""
    study = small_study()
    study["weights"] = "learned"
    study["plan"]["trials"] = 2
    study["method"]["kimg"] = 0.128
    done = run_slot(workplace, monkeypatch, study)
    trials = done.study.get_trials(deepcopy=False)
    for trial in trials:
        assert trial.params.keys() == {"rule", "strength"}
        history = trial.user_attrs["weights_over_time"]
        assert history["iterations"] == [0, 1]
        assert history["weights"][-1] == pytest.approx(trial.user_attrs["weights"], abs=1e-6)
        assert sum(trial.user_attrs["weights"]) == pytest.approx(4.0)
        assert (workplace.folder / "runs" / trial.user_attrs["weights_plot"]).exists()
    best = workplace.json("best", "small")["best"]
    assert {"rule": best["rule"], "strength": best["strength"]} == trials[best["number"]].params
    assert "any         0  1 1 1 1" in workplace.run("best", "small").stdout

    study["weights"] = {"parameterisation": "learned", "rules": ["uncertainty"]}
    refused = workplace.run("launch", workplace.write(study), timeout=60)
    assert refused.returncode == 2
    assert "weights.rules: ['uncertainty', 'gradient-norm'] stored, " in refused.stderr


@pytest.mark.postgres
def test_a_study_on_postgres_keeps_its_password_to_itself(workplace, calm_fids, postgres):
    """The password shows in no file, no process list, no output and no row."""
    password = "s3cret-Kx9"
    url = postgres.new_database().replace("postgres@", f"postgres:{password}@", 1)
    assert password in url
    study = workplace.write(small_study())
    ray_sessions = Path("/tmp/ray")
    before = set(ray_sessions.glob("session_*")) if ray_sessions.exists() else set()
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

    workplace.storage = url
    assert fids(workplace) == calm_fids
    best = workplace.json("best", "small")
    assert ":***@" in best["storage"]
    assert password not in json.dumps(best)
    written = [*workplace.folder.rglob("*"), *workplace.cache.rglob("*")]
    for session in set(ray_sessions.glob("session_*")) - before:
        written += session.rglob("*")
    files = [path for path in written if path.is_file() and not path.is_symlink()]
    assert len(files) > 20
    assert not [path for path in files if password.encode() in path.read_bytes()]
    rows = ledger(workplace).study.get_trials(deepcopy=False)
    assert password not in repr([(t.user_attrs, t.system_attrs) for t in rows])


def process_list() -> list[str]:
    """Arguments of every process, as ``ps`` would show them."""
    lines = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines.append(entry.read_bytes().decode(errors="replace"))
    return lines


def test_dry_run_starts_nothing(workplace):
    done = workplace.run("launch", workplace.write(small_study()), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "# rows: 5, each of a student, 40 updates and 256 images" in done.stdout
    assert "# memory: " in done.stdout
    assert "# time: " in done.stdout
    assert "# teacher: trained on 10,000 images first" in done.stdout
    assert "# fingerprint " in done.stdout
    assert not (workplace.folder / "runs").exists()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"student": {"substeps": 0}}, "student.substeps: Input should be greater than or equal"),
        (
            {"student": {"nfe": 0}},
            "student.nfe: Input should be greater than or equal to 1, got 0",
        ),
        ({"budget": {"trails": 3}}, "budget.trails: unknown key"),
        ({"weights": {"a": {"low": 3, "high": -1}}}, "weights.a: low 3.0 is above high -1.0"),
        ({"weights": {"a": {"low": float("nan"), "high": 1}}}, "weights.a.low: "),
        ({"weights": {"largest": 0.5}}, "weights.largest 0.5 rules out the whole space"),
    ],
)
def test_mistakes_in_a_study_file_exit_with_2_and_name_the_key(workplace, sections, message):
    study = small_study(name="wrong", **sections)
    done = workplace.run("launch", workplace.write(study), timeout=60)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (workplace.folder / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("status", "nobody"), "no study 'nobody'"),
        (("best", "absent.yaml"), "the study file absent.yaml cannot be read"),
        (("status", "x", "--storage", "mysql://u@h/d"), "mysql://u@h/d"),
        (
            ("status", "x", "--storage", "postgresql://me:pw-Zq7@127.0.0.1:1/db"),
            "check that the server runs",
        ),
        (("launch", "x.yaml", "--workers", "0"), "must be 1 or more, got 0"),
    ],
)
def test_mistakes_on_the_command_line_exit_with_2(workplace, arguments, message):
    done = workplace.run(*arguments, timeout=60)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "pw-Zq7" not in done.stderr


def test_files_of_another_study_are_moved_aside_never_taken(workplace, monkeypatch):
    """The database was deleted, the folder was not: its results belong to other parameters."""
    study = small_study(plan={"trials": 1}, method={"kimg": 0.128})
    old = run_slot(workplace, monkeypatch, study, [{"a": 1.0}]).study.trials[0]
    (workplace.folder / "runs/bdense.db").unlink()
    new = run_slot(workplace, monkeypatch, study, [{"a": 2.0}]).study.trials[0]
    assert (old.params["a"], new.params["a"]) == (1.0, 2.0)
    assert old.value != new.value
    aside = [p for p in (workplace.folder / "runs/small").glob("00000.*") if p.is_dir()]
    assert [json.loads((p / "result.json").read_text())["value"] for p in aside] == [old.value]
