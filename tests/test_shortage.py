"""No room on a disk, no access, no memory: named, mended by the user, and nothing is lost."""

import errno
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
import yaml
from optuna.samplers import RandomSampler
from search.spec.study_spec import StudySpec

from bdense.data.datasets import load_dataset
from search.cli import main
from search.errors import StorageFullError
from search.storage.disk import disk_error, is_full_disk
from search.storage.engine import open_storage, resolve_storage_url
from search.storage.ledger import Claim, Ledger
from search.study.study import Study
from search.worker import assets
from search.worker.ray_tasks import Orders, Progress, Refusal, prepare_task, record_task, slot
from tests.contracts.ledger_worker import SPACE
from tests.disks import small_disk
from tests.e2e.study import small_study

STUDY = small_study(budget={"trials": 1, "kimg": 0.256, "batch": 64})


@pytest.fixture
def folders(tmp_path, monkeypatch, shared_cache) -> Path:
    """Runs and database under ``tmp_path``; the classifier is trained once for all tests."""
    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("BDENSE_CACHE", str(shared_cache))
    monkeypatch.setenv("BDENSE_STORAGE", f"sqlite:///{tmp_path}/study.db")
    return tmp_path


def orders(study: StudySpec) -> Orders:
    return Orders(
        kind="search",
        study=study.name,
        storage=resolve_storage_url(None),
        runs=os.environ["BDENSE_RUNS"],
        cache=os.environ["BDENSE_CACHE"],
    )


def prepared() -> StudySpec:
    """The study, with teacher and features in the cache."""
    study = StudySpec.model_validate(STUDY)
    assets.prepare(study, assets.use_device(study), lambda *_: None)
    return study


def record(study: StudySpec) -> list[Progress | Refusal]:
    """Record all trajectories, as a task of Ray does."""
    return list(record_task(orders(study), study.model_dump_json(), 0, 1))


# A full disk.


def test_what_a_full_disk_says(tmp_path, monkeypatch):
    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path / "runs"))
    with small_disk(tmp_path / "disk", 256) as disk:
        disk.fill()
        with pytest.raises(OSError, match="No space") as found:
            (disk.place / "more").write_bytes(b"0" * 4096)
    assert is_full_disk(found.value)
    said = str(disk_error(found.value))
    assert said.startswith(f"no space is left where runs are kept ({tmp_path}/runs or ")
    assert "give the same command again: it carries on" in said


@pytest.mark.slow
def test_trajectories_that_do_not_fit_are_refused_and_recorded_once_they_do(
    folders, monkeypatch, shared_cache
):
    cache = folders / "cache"
    with small_disk(cache, 8192) as disk:
        prepared()  # into the shared one
        shutil.copytree(shared_cache, cache, dirs_exist_ok=True)
        shutil.rmtree(cache / "trajectories", ignore_errors=True)
        monkeypatch.setenv("BDENSE_CACHE", str(cache))
        study = StudySpec.model_validate(STUDY)
        filler = disk.fill()
        told = record(study)
        assert isinstance(told[-1], Refusal)
        assert told[-1].is_input_error
        assert told[-1].message.startswith("no space is left where runs are kept (")
        filler.unlink()
        assert not [each for each in record(study) if isinstance(each, Refusal)]
        teacher = assets.load_teacher(study, load_dataset("digits"), assets.use_device(study))
        assert assets.trajectory_store(study, teacher).missing() == []


def test_a_checkpoint_that_does_not_fit_ends_the_slot_and_not_the_trial(folders, monkeypatch):
    study = prepared()
    assert not [each for each in record(study) if isinstance(each, Refusal)]
    record_of_study = Study.create(resolve_storage_url(None), study)
    with small_disk(folders / "runs", 4096) as disk:
        filler = disk.fill()
        config = {"orders": orders(study), "mark": str(folders / "mark")}
        refusal = slot(config)["refusal"]
        assert refusal.is_input_error
        assert "no space is left where runs are kept" in refusal.message
        counts = record_of_study.baselines.counts()
        assert (counts.running, counts.failed, counts.complete) == (1, 0, 0)
        # Nor is it started for ever where not even its mark can be written.
        refusal = slot({**config, "mark": str(disk.place / "small/slots/0")})["refusal"]
        assert "no space is left" in refusal.message
        filler.unlink()
        assert slot(config) == {"refusal": None}
        rows = [*record_of_study.baselines.study.trials, *record_of_study.trials.study.trials]
        assert [trial.state.name for trial in rows] == ["COMPLETE"] * 3
        # What the disk cut short was not the trial's doing.
        assert rows[0].user_attrs["tries"] == 1


# No access.


def test_what_no_access_says(tmp_path, monkeypatch):
    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path / "runs"))
    for number in (errno.EROFS, errno.EACCES, errno.EPERM):
        error = OSError(number, os.strerror(number), "/srv/x.json")
        assert str(disk_error(error)).startswith(
            f"on {platform.node()} a worker may not use /srv/x.json ({os.strerror(number)}): let "
        )
        assert f"where runs are kept ({tmp_path}/runs or " in str(disk_error(error))
        assert Refusal.of(error) == Refusal(message=str(disk_error(error)), is_input_error=True)
    assert disk_error(OSError(errno.EIO, "Input/output error")) is None
    assert disk_error(ValueError("Read-only file system")) is None


def test_runs_that_cannot_be_written_end_the_slot_and_not_the_trial(folders, monkeypatch):
    study = prepared()
    assert not [each for each in record(study) if isinstance(each, Refusal)]
    record_of_study = Study.create(resolve_storage_url(None), study)
    told = orders(study)
    # A worker of another machine has an environment of its own.
    monkeypatch.setenv("BDENSE_RUNS", "/srv/elsewhere")
    with small_disk(folders / "runs", 8192) as disk:
        disk.make_read_only()
        for mark in (disk.place / "small/slots/0", folders / "mark"):
            refusal = slot({"orders": told, "mark": str(mark)})["refusal"]
            assert refusal.is_input_error
            assert f"on {platform.node()} a worker may not use {disk.place}/" in refusal.message
            assert "(Read-only file system)" in refusal.message
            assert str(disk.place) in refusal.message.partition("where runs are kept (")[2]
            assert "elsewhere" not in refusal.message
        counts = record_of_study.baselines.counts()
        assert (counts.running, counts.failed, counts.complete) == (1, 0, 0)
        disk.make_writable()
        assert slot({"orders": told, "mark": str(folders / "mark")}) == {"refusal": None}
        rows = [*record_of_study.baselines.study.trials, *record_of_study.trials.study.trials]
        assert [trial.state.name for trial in rows] == ["COMPLETE"] * 3
        assert rows[0].user_attrs["tries"] == 1


def test_a_cache_that_cannot_be_written_ends_the_preparation(folders, monkeypatch):
    with small_disk(folders / "cache", 1024) as disk:
        disk.make_read_only()
        monkeypatch.setenv("BDENSE_CACHE", str(disk.place))
        study = StudySpec.model_validate(STUDY)
        *_, last = prepare_task(orders(study), study.model_dump_json(), 1)
    assert isinstance(last, Refusal)
    assert last.is_input_error
    assert f"a worker may not use {disk.place}/" in last.message


def test_a_worker_that_dies_without_a_trial_is_not_started_for_ever(folders):
    mark = folders / "mark"
    mark.write_text("...")
    refusal = slot({"orders": orders(StudySpec.model_validate(STUDY)), "mark": str(mark)})[
        "refusal"
    ]
    assert not refusal.is_input_error
    assert refusal.message.startswith("a worker died 3 times in a row without taking a trial, as")


# Databases on a full disk.


def test_a_sqlite_database_on_a_full_disk(folders, capsys, monkeypatch):
    """The result that does not fit is told again once there is room."""
    with small_disk(folders / "disk", 2048) as disk:
        url = resolve_storage_url(f"sqlite:///{disk.place}/study.db")
        ledger = Ledger.open(url, "digits", budget=1)
        claim = ledger.claim(SPACE, RandomSampler)
        assert isinstance(claim, Claim)
        filler = disk.fill()
        with pytest.raises(StorageFullError) as found:
            ledger.complete(claim, 2.0, {"notes": "x" * 500_000})
        assert "the disk of the study database is full: database or disk is full" in str(
            found.value
        )
        assert "give the same command again: it carries on" in str(found.value)
        launched = folders / "small.yaml"
        launched.write_text(yaml.safe_dump(STUDY))
        assert main(["launch", str(launched), "--storage", url]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("bdense-search: ")
        assert "disk is full" in line
        filler.unlink()
        ledger.complete(claim, 2.0, {"notes": "x" * 500_000})
        counts = Ledger.open(url, "digits", budget=None).counts()
        assert (counts.planned, counts.complete, counts.running) == (1, 1, 0)


@pytest.mark.postgres
def test_a_postgres_database_on_a_full_disk(folders, postgres):
    """The tables lie on a disk of their own; what the server writes ahead does not."""
    with small_disk(postgres.data.parent / "disk", 24 * 1024) as disk:
        if postgres.system_user:
            shutil.chown(disk.place, postgres.system_user)
        server = sa.create_engine(postgres.url("postgres"), isolation_level="AUTOCOMMIT")
        with server.connect() as connection:
            connection.execute(sa.text(f"CREATE TABLESPACE small LOCATION '{disk.place}'"))
            connection.execute(sa.text("CREATE DATABASE small TABLESPACE small"))
        url = resolve_storage_url(postgres.url("small"))
        ledger = Ledger.open(url, "digits", budget=1)
        claim = ledger.claim(SPACE, RandomSampler)
        assert isinstance(claim, Claim)
        filler = disk.fill()
        # What does not compress needs pages of its own.
        notes = {f"notes {number}": os.urandom(100_000).hex() for number in range(100)}
        with pytest.raises(StorageFullError) as found:
            ledger.complete(claim, 2.0, notes)
        assert "the disk of the study database is full: could not extend file" in str(found.value)
        filler.unlink()
        ledger.complete(claim, 2.0, {"notes": notes["notes 0"]})
        counts = Ledger.open(url, "digits", budget=None).counts()
        assert (counts.planned, counts.complete, counts.running) == (1, 1, 0)
        open_storage(url).engine.dispose()
        ledger._storage.engine.dispose()
        with server.connect() as connection:
            connection.execute(sa.text("DROP DATABASE small WITH (FORCE)"))
            connection.execute(sa.text("DROP TABLESPACE small"))
        server.dispose()


# No memory.

HUNGRY = """
import resource, sys
from pathlib import Path

from search.storage.engine import resolve_storage_url
from search.study.study import Study
from search.worker.workers import SearchWorker

study = Study.open(resolve_storage_url(None), "small")
worker = SearchWorker(study)
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
limit = held + 400 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
while (claimed := worker.claim()) is not None:
    worker.work(claimed)
"""


@pytest.mark.slow
def test_a_trial_that_the_memory_does_not_suffice_for_fails_at_once_with_its_reason(folders):
    """A real refusal of the kernel's: batches of 16384 images and 400 MB more than at rest."""
    tree = STUDY | {
        "budget": {"trials": 1, "kimg": 16.384, "batch": 16384, "lr": 5e-4},
        "trajectories": {"mode": "live"},
    }
    study = StudySpec.model_validate(tree)
    assets.prepare(study, assets.use_device(study), lambda *_: None)
    record_of_study = Study.create(resolve_storage_url(None), study)
    done = subprocess.run(
        [sys.executable, "-c", HUNGRY], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    for trial in [*record_of_study.baselines.study.trials, *record_of_study.trials.study.trials]:
        assert trial.state.name == "FAIL"
        assert trial.user_attrs["reason"] == "out of memory"
        assert "use a smaller batch or give trials more memory" in trial.user_attrs["error"]
    assert record_of_study.left() == 0
