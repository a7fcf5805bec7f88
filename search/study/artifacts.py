"""A trial's pictures as Optuna's artifacts, where the dashboard shows them.

Their metadata are in the database, and frozen once the trial is finished; the files are in a
folder or bucket that workers and dashboard share.
"""

import contextlib
import importlib.util
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from optuna.artifacts import (
    ArtifactMeta,
    Boto3ArtifactStore,
    FileSystemArtifactStore,
    get_all_artifact_meta,
    upload_artifact,
)
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial

from bdense.errors import InputError
from bdense.files import atomic_write
from search.errors import ArtifactError
from search.places import runs_folder
from search.storage.engine import exclusive, one_line, retrying

PLACE = "BDENSE_ARTIFACTS"
FOLDER = "artifacts"
_BUCKET = "s3://"
# After so long a write to a store counts as hanging.
PATIENCE_SECONDS = 120.0


class Store(Protocol):
    """Optuna's protocol of artifact stores."""

    def open_reader(self, artifact_id: str) -> BinaryIO: ...  # raises ArtifactNotFound

    def write(self, artifact_id: str, content_body: BinaryIO) -> None: ...

    def remove(self, artifact_id: str) -> None: ...


class FolderStore(FileSystemArtifactStore):  # type: ignore[misc]  # Optuna exports it untyped
    """Files of a folder, written atomically."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        if Path(artifact_id).name != artifact_id:
            raise ValueError(f"{artifact_id!r} is not an artifact's id")
        with atomic_write(self._folder / artifact_id) as scratch, scratch.open("wb") as file:
            shutil.copyfileobj(content_body, file)


@dataclass(frozen=True, slots=True)
class PrefixedStore:
    """Part of another store: artifacts with a prefix before their ids."""

    store: Store
    prefix: str

    def open_reader(self, artifact_id: str) -> BinaryIO:
        return self.store.open_reader(self.prefix + artifact_id)

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        self.store.write(self.prefix + artifact_id, content_body)

    def remove(self, artifact_id: str) -> None:
        self.store.remove(self.prefix + artifact_id)


def artifacts_place() -> str:
    """``$BDENSE_ARTIFACTS``, else a folder under the runs, as an absolute path or a bucket's URL.

    Raises:
        InputError: It is neither a folder nor ``s3://bucket[/prefix]``, or boto3 is missing.
    """
    given = os.environ.get(PLACE) or str(runs_folder() / FOLDER)
    if given.startswith(_BUCKET):
        if not given.removeprefix(_BUCKET).strip("/"):
            raise InputError(f"{PLACE}={given} names no bucket; give s3://bucket[/prefix]")
        if importlib.util.find_spec("boto3") is None:
            raise InputError(
                f"{PLACE}={given} needs boto3: pip install 'bdense[s3]', or name a folder"
            )
        return given
    if "://" in given:
        raise InputError(f"{PLACE}={given} is unknown; give a folder, or s3://bucket[/prefix]")
    return str(Path(os.path.expanduser(given)).resolve())


def artifact_store(place: str | None = None) -> Store:
    """The store of a place; None means ``artifacts_place()``."""
    place = place or artifacts_place()
    if not place.startswith(_BUCKET):
        return FolderStore(Path(place))
    bucket, _, prefix = place.removeprefix(_BUCKET).partition("/")
    store: Store = Boto3ArtifactStore(bucket)
    prefix = prefix.strip("/")
    return PrefixedStore(store, f"{prefix}/") if prefix else store


def attach(
    storage: RDBStorage, trial_id: int, files: Sequence[Path], store: Store
) -> dict[str, str]:
    """Make files artifacts of an unfinished trial, each once, even after an interrupted attempt.

    Ids are reserved in the database first, under a lock; the store is written to without one, for
    a limited time.

    Returns:
        File name -> id of the artifact.

    Raises:
        UpdateFinishedTrialError: Another worker has finished it.
        StorageError: The database cannot be reached.
        ArtifactError: The store cannot be written to, or hangs.
    """

    def reserve() -> dict[str, str]:
        # The lock keeps a worker that was frozen here and its adopter from both reserving.
        with exclusive(storage.engine, f"artifacts of trial {trial_id}"):
            trial = storage.get_trial(trial_id)
            known = {meta.filename: meta.artifact_id for meta in attached(storage, trial)}
            for path in files:
                if path.name not in known:
                    known[path.name] = upload_artifact(
                        artifact_store=_Nowhere(),
                        file_path=str(path),
                        study_or_trial=trial,
                        storage=storage,
                    )
            return {path.name: known[path.name] for path in files}

    ids = retrying(reserve)
    _write_in_time(store, {ids[path.name]: path for path in files})
    return ids


def attached(storage: RDBStorage, trial: FrozenTrial) -> list[ArtifactMeta]:
    """Metadata of a trial's artifacts; their files may be gone."""
    return retrying(lambda: get_all_artifact_meta(trial, storage=storage))


def remove_attached(storage: RDBStorage, trials: Sequence[FrozenTrial], store: Store) -> None:
    """Delete the files of trials' artifacts, as far as they are there."""
    for trial in trials:
        for meta in attached(storage, trial):
            with contextlib.suppress(ArtifactNotFound, FileNotFoundError):
                store.remove(meta.artifact_id)


def is_stored(store: Store, artifact_id: str) -> bool:
    """Whether the file of an artifact is there."""
    try:
        store.open_reader(artifact_id).close()
    except ArtifactNotFound:
        return False
    return True


class _Nowhere:
    """Lets Optuna name an artifact and write its metadata; the file is written by ``attach``."""

    def open_reader(self, artifact_id: str) -> BinaryIO:
        raise ArtifactNotFound(artifact_id)

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        pass

    def remove(self, artifact_id: str) -> None:
        pass


def _write_in_time(store: Store, files: Mapping[str, Path]) -> None:
    """Write files by their ids; any error, or no end in time, is an ArtifactError."""
    errors: list[Exception] = []

    def work() -> None:
        try:
            for artifact_id, path in files.items():
                _write_if_other(store, artifact_id, path)
        except Exception as error:  # noqa: BLE001  raised below
            errors.append(error)

    # A thread, as writing to a mount whose server is gone blocks for ever.
    thread = threading.Thread(target=work, name="artifacts", daemon=True)
    thread.start()
    thread.join(PATIENCE_SECONDS)
    if thread.is_alive():
        raise ArtifactError(
            f"the store of artifacts has not answered for {PATIENCE_SECONDS:g} seconds; "
            f"check {PLACE}"
        )
    if errors:
        raise ArtifactError(
            f"the store of artifacts: {one_line(errors[0])}; check {PLACE}"
        ) from errors[0]


def _write_if_other(store: Store, artifact_id: str, path: Path) -> None:
    content = path.read_bytes()
    with contextlib.suppress(ArtifactNotFound), store.open_reader(artifact_id) as stored:
        if stored.read() == content:
            return
    with path.open("rb") as file:
        store.write(artifact_id, file)
