"""No room on a disk, no access, no memory: named, mended by the user, and nothing is lost."""

import errno
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import yaml

from search.cli import main
from search.errors import DiskFullError, StorageFullError
from search.storage.engine import open_storage, resolve_storage_url
from search.storage.ledger import Ledger
from search.study.study import Study
from search.worker import distillation
from search.worker.disk import disk_error
from search.worker.ray_tasks import WorkerConfig, WorkerError, prepare_task, record_task, slot
from search.worker.trainer import Step
from tests.contracts.scene import take
from tests.disks import small_disk
from tests.rows import SFD, loaded
from tests.studies import REMOVED, changed, spec

STUDY = changed(SFD, plan={"trials": 1, "replicates": 1}, trajectories=REMOVED)


@pytest.fixture
def folders(tmp_path, monkeypatch, shared_cache) -> Path:
    """Runs and database under ``tmp_path``; the classifier is trained once for all tests."""
    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("BDENSE_CACHE", str(shared_cache))
    monkeypatch.setenv("BDENSE_STORAGE", f"sqlite:///{tmp_path}/study.db")
    return tmp_path


def made() -> Study:
    """The study, with teacher and features in the cache."""
    loaded(STUDY)
    return Study.create(resolve_storage_url(None), spec(STUDY))


def worker_config(study: Study) -> WorkerConfig:
    return WorkerConfig(
        study=study.name,
        storage=study.url,
        runs=os.environ["BDENSE_RUNS"],
        cache=os.environ["BDENSE_CACHE"],
    )


def error_of(messages: Sequence[Any]) -> WorkerError | None:
    """What a task of Ray's ended with."""
    return messages[-1] if messages and isinstance(messages[-1], WorkerError) else None


def slots_error(worker: WorkerConfig, mark: Path) -> WorkerError | None:
    """What a slot could not go on for."""
    return slot({"worker": worker, "mark": str(mark)})["error"]


def assert_the_first_row_goes_on(study: Study) -> None:
    counts = study.given.counts()
    assert (counts.running, counts.failed, counts.complete) == (1, 0, 0)


def assert_complete_at_the_first_try(study: Study) -> None:
    """What the disk cut short was not the trial's doing."""
    rows = [*study.given.study.trials, *study.trials.study.trials]
    assert [trial.state.name for trial in rows] == ["COMPLETE"] * 3
    assert rows[0].user_attrs["tries"] == 1


# A full disk.


def test_what_a_full_disk_says(tmp_path, monkeypatch):
    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path / "runs"))
    with small_disk(tmp_path / "disk", 256) as disk:
        disk.fill()
        with pytest.raises(OSError, match="No space") as found:
            (disk.place / "more").write_bytes(b"0" * 4096)
    assert isinstance(disk_error(found.value), DiskFullError)
    said = str(disk_error(found.value))
    assert f"{tmp_path}/runs" in said
    assert "run the same command again" in said


def test_trajectories_that_do_not_fit_are_refused_and_recorded_once_they_do(
    folders, monkeypatch, shared_cache
):
    cache = folders / "cache"
    with small_disk(cache, 8192) as disk:
        study = made()  # into the shared one
        shutil.copytree(shared_cache, cache, dirs_exist_ok=True)
        shutil.rmtree(cache / "trajectories", ignore_errors=True)
        monkeypatch.setenv("BDENSE_CACHE", str(cache))
        worker = worker_config(study)
        filler = disk.fill()
        error = error_of(list(record_task(worker, 0, 1)))
        assert error.is_input_error
        assert f"{cache}/trajectories" in error.message
        assert "make room" in error.message
        filler.unlink()
        assert error_of(list(record_task(worker, 0, 1))) is None
        assert loaded(STUDY).store(study.spec.seeds.training).missing() == []


def test_the_preparation_records_for_a_while_and_leaves_the_rest(folders, monkeypatch):
    """The launcher starts further tasks where its last message is of unfinished trajectories."""
    monkeypatch.setenv("BDENSE_CACHE", str(folders / "cache"))
    study = made()
    shutil.rmtree(folders / "cache/trajectories", ignore_errors=True)
    store = loaded(STUDY).store(study.spec.seeds.training)
    for seconds, left in ((-1.0, store.num_shards), (60.0, 0)):
        monkeypatch.setattr(distillation, "RECORDING_SECONDS", seconds)
        *_, last = prepare_task(worker_config(study), 1)
        assert (last.step, last.total - last.done) == (Step.TRAJECTORIES, left)
        assert len(store.missing()) == left


def test_a_checkpoint_that_does_not_fit_ends_the_slot_and_not_the_trial(folders):
    study = made()
    worker, mark = worker_config(study), folders / "mark"
    with small_disk(folders / "runs", 4096) as disk:
        filler = disk.fill()
        # Nor is it started for ever where not even its mark can be written.
        for place in (mark, disk.place / "digits/slots/0"):
            error = slots_error(worker, place)
            assert error.is_input_error
            assert "no space is left where runs are kept" in error.message
        assert_the_first_row_goes_on(study)
        filler.unlink()
        assert slots_error(worker, mark) is None
        assert_complete_at_the_first_try(study)


# No access.


def test_what_no_access_says(tmp_path, monkeypatch):
    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path / "runs"))
    for number in (errno.EROFS, errno.EACCES, errno.EPERM):
        error = OSError(number, os.strerror(number), "/srv/x.json")
        said = str(disk_error(error))
        for part in (platform.node(), "/srv/x.json", os.strerror(number), f"{tmp_path}/runs"):
            assert part in said
        assert WorkerError.of(error) == WorkerError(message=said, is_input_error=True)
    assert disk_error(OSError(errno.EIO, "Input/output error")) is None
    assert disk_error(ValueError("Read-only file system")) is None


def test_runs_that_cannot_be_written_end_the_slot_and_not_the_trial(folders, monkeypatch):
    study = made()
    worker, mark = worker_config(study), folders / "mark"
    # A worker of another machine has an environment of its own.
    monkeypatch.setenv("BDENSE_RUNS", "/srv/elsewhere")
    with small_disk(folders / "runs", 8192) as disk:
        disk.make_read_only()
        for place in (disk.place / "digits/slots/0", mark):
            error = slots_error(worker, place)
            assert error.is_input_error
            for part in (platform.node(), f"{disk.place}/", "Read-only file system"):
                assert part in error.message
            assert str(disk.place) in error.message.partition("where runs are kept (")[2]
            assert "elsewhere" not in error.message
        assert_the_first_row_goes_on(study)
        disk.make_writable()
        assert slots_error(worker, mark) is None
        assert_complete_at_the_first_try(study)


def test_a_cache_that_cannot_be_written_ends_the_preparation(folders, monkeypatch):
    study = Study.create(resolve_storage_url(None), spec(STUDY))
    with small_disk(folders / "cache", 1024) as disk:
        disk.make_read_only()
        monkeypatch.setenv("BDENSE_CACHE", str(disk.place))
        error = error_of(list(prepare_task(worker_config(study), 1)))
    assert error.is_input_error
    assert f"{disk.place}/" in error.message


def test_a_worker_that_dies_without_a_trial_is_not_started_for_ever(folders):
    mark = folders / "mark"
    mark.write_text("...")
    error = slots_error(WorkerConfig(study="digits", storage="", runs="", cache=""), mark)
    assert not error.is_input_error
    assert "died 3 times in a row" in error.message


# Databases on a full disk.


def test_a_sqlite_database_on_a_full_disk(folders, capsys):
    """The result that does not fit is told again once there is room."""
    with small_disk(folders / "disk", 2048) as disk:
        url = resolve_storage_url(f"sqlite:///{disk.place}/study.db")
        ledger = Ledger.open(url, "digits", budget=1)
        claim = take(ledger)
        filler = disk.fill()
        with pytest.raises(StorageFullError, match=r"disk is full.* run the same command again"):
            ledger.complete(claim, 2.0, {"notes": "x" * 500_000})
        launched = folders / "other.yaml"
        launched.write_text(yaml.safe_dump(changed(STUDY, name="other")))
        assert main(["launch", str(launched), "--storage", url]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("bdense-search: ")
        assert "disk is full" in line
        filler.unlink()
        ledger.complete(claim, 2.0, {"notes": "x" * 500_000})
        counts = Ledger.open(url, "digits", budget=None).counts()
        assert (counts.planned, counts.complete, counts.running) == (1, 1, 0)


@pytest.mark.postgres
def test_a_postgres_database_on_a_full_disk(postgres):
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
        claim = take(ledger)
        filler = disk.fill()
        # What does not compress needs pages of its own.
        notes = {f"notes {number}": os.urandom(100_000).hex() for number in range(100)}
        with pytest.raises(StorageFullError, match="could not extend file"):
            ledger.complete(claim, 2.0, notes)
        filler.unlink()
        ledger.complete(claim, 2.0, {"notes": notes["notes 0"]})
        counts = Ledger.open(url, "digits", budget=None).counts()
        assert (counts.planned, counts.complete, counts.running) == (1, 1, 0)
        open_storage(url).engine.dispose()
        ledger.storage.engine.dispose()
        with server.connect() as connection:
            connection.execute(sa.text("DROP DATABASE small WITH (FORCE)"))
            connection.execute(sa.text("DROP TABLESPACE small"))
        server.dispose()


# No memory.

HUNGRY = """
import resource
from pathlib import Path

from search.storage.engine import resolve_storage_url
from search.study.study import Study
from search.worker.worker import Worker

worker = Worker(Study.open(resolve_storage_url(None), "digits"))
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
limit = held + 150 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
while (claimed := worker.claim()) is not None:
    worker.work(claimed)
"""


@pytest.mark.slow
def test_a_trial_that_the_memory_does_not_suffice_for_fails_at_once_with_its_reason(folders):
    """A real refusal of the kernel's: batches of 4096 images and 150 MB more than at rest."""
    tree = changed(
        STUDY,
        method__kimg=4.096,
        method__batch=4096,
        trajectories={"mode": "live"},
    )
    loaded(tree)
    study = Study.create(resolve_storage_url(None), spec(tree))
    done = subprocess.run(
        [sys.executable, "-c", HUNGRY], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    for trial in [*study.given.study.trials, *study.trials.study.trials]:
        assert trial.state.name == "FAIL"
        assert trial.user_attrs["reason"] == "out of memory"
        assert "use a smaller batch or give trials more memory" in trial.user_attrs["error"]
    assert study.left() == 0
