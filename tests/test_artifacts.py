"""Trials' pictures as artifacts of a real storage, in a folder and behind a real S3 client."""

import io
import threading
from pathlib import Path

import optuna
import pytest
import sqlalchemy as sa
from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.exceptions import UpdateFinishedTrialError

from bdense.errors import InputError
from search.errors import ArtifactError
from search.spec.space import search_space
from search.storage.engine import DATABASE_ERRORS, exclusive
from search.storage.ledger import Claim, Ledger
from search.study import artifacts
from search.study.artifacts import (
    FolderStore,
    artifact_store,
    artifacts_place,
    attach,
    attached,
    is_stored,
)
from tests.studies import spec


@pytest.fixture
def ledger(url) -> Ledger:
    return Ledger.open(url, "digits", budget=3)


@pytest.fixture
def grid(tmp_path) -> Path:
    path = tmp_path / "samples.png"
    path.write_bytes(b"a grid")
    return path


def claim(ledger: Ledger) -> Claim:
    found = ledger.claim(search_space(spec()), lambda offset: optuna.samplers.RandomSampler(0))
    assert isinstance(found, Claim)
    return found


def metas(ledger: Ledger, trial_id: int) -> list[tuple[str, str]]:
    """(id, file name), from the database."""
    trial = ledger.storage.get_trial(trial_id)
    found = get_all_artifact_meta(trial, storage=ledger.storage)
    return [(meta.artifact_id, meta.filename) for meta in found]


def test_a_picture_becomes_an_artifact_that_optuna_reads(ledger, grid, tmp_path):
    trial_id = claim(ledger).trial_id
    ids = attach(ledger.storage, trial_id, [grid], FolderStore(tmp_path / "artifacts"))
    assert metas(ledger, trial_id) == [(ids["samples.png"], "samples.png")]
    (meta,) = attached(ledger.storage, ledger.storage.get_trial(trial_id))
    assert meta.mimetype == "image/png"
    theirs = FileSystemArtifactStore(tmp_path / "artifacts")
    assert theirs.open_reader(ids["samples.png"]).read() == b"a grid"
    # Attached again, by a worker that took the trial over, it is still one.
    assert attach(ledger.storage, trial_id, [grid], FolderStore(tmp_path / "artifacts")) == ids
    assert len(metas(ledger, trial_id)) == 1
    assert [path.name for path in (tmp_path / "artifacts").iterdir()] == [ids["samples.png"]]


def test_two_workers_at_once_attach_it_once(either_url, grid, tmp_path):
    """One was frozen and thaws while its adopter is at the same place."""
    ledger = Ledger.open(either_url, "digits", budget=3)
    trial_id, store = claim(ledger).trial_id, FolderStore(tmp_path / "artifacts")
    together, found = threading.Barrier(4), []

    def work() -> None:
        storage = Ledger.open(either_url, "digits", budget=None).storage
        together.wait()
        found.append(attach(storage, trial_id, [grid], store)["samples.png"])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert metas(ledger, trial_id) == [(found[0], "samples.png")]


class DyingStore(FolderStore):
    """Its worker dies between the metadata and the file, or with half of the file written."""

    def __init__(self, folder: Path, half: bytes) -> None:
        super().__init__(folder)
        self.half, self.folder = half, folder

    def write(self, artifact_id, content_body):
        if self.half:
            self.folder.mkdir(exist_ok=True)
            (self.folder / artifact_id).write_bytes(self.half)
        raise OSError("the worker is gone")


@pytest.mark.parametrize("half", [b"", b"a g"])
def test_an_artifact_that_was_begun_is_mended_under_its_id(ledger, grid, tmp_path, half):
    trial_id, folder = claim(ledger).trial_id, tmp_path / "artifacts"
    with pytest.raises(ArtifactError, match="the worker is gone; check BDENSE_ARTIFACTS"):
        attach(ledger.storage, trial_id, [grid], DyingStore(folder, half))
    ((begun, _),) = metas(ledger, trial_id)
    store = FolderStore(folder)
    assert is_stored(store, begun) == bool(half)
    assert attach(ledger.storage, trial_id, [grid], store) == {"samples.png": begun}
    assert metas(ledger, trial_id) == [(begun, "samples.png")]
    assert store.open_reader(begun).read() == b"a grid"


class HangingStore(FolderStore):
    """Its server is gone; what is written waits until it is back."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.begun, self.back = threading.Event(), threading.Event()

    def write(self, artifact_id, content_body):
        self.begun.set()
        self.back.wait(20)
        super().write(artifact_id, content_body)


def test_a_store_that_hangs_blocks_no_other_and_is_given_up(
    either_url, grid, tmp_path, monkeypatch
):
    ledger = Ledger.open(either_url, "digits", budget=3)
    trial_id, store = claim(ledger).trial_id, HangingStore(tmp_path / "artifacts")
    monkeypatch.setattr(artifacts, "PATIENCE_SECONDS", 2.0)
    engine, errors = Ledger.open(either_url, "digits", budget=None).storage.engine, []

    def work() -> None:
        try:
            attach(ledger.storage, trial_id, [grid], store)
        except ArtifactError as error:
            errors.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    assert store.begun.wait(20)
    # Its adopter, and on SQLite every claim, would wait for the lock.
    with exclusive(engine, f"artifacts of trial {trial_id}"):
        assert thread.is_alive()
    thread.join()
    store.back.set()
    (said,) = errors
    assert "has not answered for 2 seconds; check BDENSE_ARTIFACTS" in said
    assert len(metas(ledger, trial_id)) == 1


def test_a_store_with_a_database_of_its_own_is_not_taken_for_the_studys(ledger, grid, tmp_path):
    """Which would be waited for, for minutes, and then cost the trial."""

    class Refusing(FolderStore):
        def write(self, artifact_id, content_body):
            raise sa.exc.OperationalError("PUT", {}, Exception("cannot connect"))

    trial_id = claim(ledger).trial_id
    with pytest.raises(ArtifactError, match="cannot connect") as caught:
        attach(ledger.storage, trial_id, [grid], Refusing(tmp_path / "artifacts"))
    assert not isinstance(caught.value, DATABASE_ERRORS)


def test_a_finished_trial_takes_none(ledger, grid, tmp_path):
    held = claim(ledger)
    ledger.complete(held, 1.0, {})
    with pytest.raises(UpdateFinishedTrialError):
        attach(ledger.storage, held.trial_id, [grid], FolderStore(tmp_path / "artifacts"))
    assert metas(ledger, held.trial_id) == []


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", "a/b", ".."])
def test_an_id_leads_out_of_no_folder(tmp_path, name):
    with pytest.raises((ValueError, OSError)):
        FolderStore(tmp_path / "artifacts").write(name, io.BytesIO(b"x"))
    assert {path.name for path in tmp_path.iterdir()} <= {"artifacts"}


def test_the_place_is_a_folder_under_the_runs(tmp_path, monkeypatch):
    monkeypatch.delenv("BDENSE_ARTIFACTS", raising=False)
    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path / "runs"))
    assert artifacts_place() == str(tmp_path / "runs" / "artifacts")
    monkeypatch.setenv("BDENSE_ARTIFACTS", str(tmp_path / "a" / ".." / "shared"))
    assert artifacts_place() == str(tmp_path / "shared")


@pytest.mark.parametrize("place", ["gs://bucket", "s3:///"])
def test_a_place_of_no_known_form_is_refused(monkeypatch, place):
    monkeypatch.setenv("BDENSE_ARTIFACTS", place)
    with pytest.raises(InputError, match=f"BDENSE_ARTIFACTS={place} .*s3://bucket"):
        artifacts_place()


def test_a_bucket_with_a_prefix(ledger, grid, bucket, monkeypatch):
    """Through boto3, over the wire."""
    monkeypatch.setenv("BDENSE_ARTIFACTS", f"s3://{bucket.name}/team/digits/")
    trial_id, store = claim(ledger).trial_id, artifact_store()
    artifact = attach(ledger.storage, trial_id, [grid], store)["samples.png"]
    assert bucket.objects() == {f"team/digits/{artifact}": b"a grid"}
    assert attach(ledger.storage, trial_id, [grid], store) == {"samples.png": artifact}
    assert is_stored(store, artifact)
    with pytest.raises(ArtifactNotFound):
        store.open_reader("0" * 36)


def test_without_boto3_a_bucket_is_refused_and_says_what_to_install(monkeypatch):
    import importlib.util

    known = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "boto3" else known(name)
    )
    monkeypatch.setenv("BDENSE_ARTIFACTS", "s3://pictures")
    with pytest.raises(InputError, match=r"pip install 'bdense\[s3\]'"):
        artifacts_place()
