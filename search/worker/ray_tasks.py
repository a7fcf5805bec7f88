"""Tasks on Ray's workers: preparing shared parts, and slots that work on rows until none is left.

A slot may be killed at any point; the next claim continues from the row's last checkpoint.
"""

import logging
import os
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdense.errors import BdenseError, InputError, StoppedError
from search.errors import (
    LeaseLostError,
    StorageError,
    StorageFullError,
    StorageRefusedError,
    WorkersFailedError,
)
from search.log import LOG, set_context, start_logging
from search.redaction import redact
from search.storage.engine import resolve_storage_url, without_password
from search.storage.stop_flags import NO_LAUNCH, Launch
from search.study.artifacts import PLACE as ARTIFACTS
from search.study.study import Study
from search.worker.disk import disk_error
from search.worker.trainer import Preparation, Step, trainer_of

if TYPE_CHECKING:
    from search.worker.worker import Worker

_log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
MAX_STARTS = 3
PATIENCE_SECONDS = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """A worker's settings, whatever folder and environment it starts in; without a password.

    Attributes:
        study: Name of the study, which holds the spec.
        storage: URL without password.
        runs, cache: The launcher's folders.
        artifacts: Where the pictures of its rows go.
        launch: The launch that it works for.
        log: The launcher's ``BDENSE_LOG``.
    """

    study: str
    storage: str
    runs: str
    cache: str
    artifacts: str = ""
    launch: Launch = NO_LAUNCH
    log: str = ""

    def apply(self) -> None:
        """Make this process use the launcher's folders, and log as it does."""
        os.environ["BDENSE_RUNS"], os.environ["BDENSE_CACHE"] = self.runs, self.cache
        os.environ[ARTIFACTS] = self.artifacts
        os.environ[LOG] = self.log
        start_logging()
        set_context(study=self.study)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerError:
    """Why a worker cannot go on, and whether that is a mistake of the user's."""

    message: str
    is_input_error: bool

    @classmethod
    def of(cls, error: Exception) -> "WorkerError":
        """The error in words, without a password."""
        error = disk_error(error) or error
        own = isinstance(error, BdenseError)
        message = str(error) if own else f"{type(error).__name__}: {error}"
        return cls(message=redact(message), is_input_error=isinstance(error, InputError))


def worker_storage(asked: str) -> str:
    """The storage URL on a worker: the environment's, password and all, if it is the one asked.

    Passwords travel in the environment (or PGPASSFILE) alone, never in what Ray pickles.
    """
    own = os.environ.get("BDENSE_STORAGE")
    if own and without_password(resolve_storage_url(own)) == asked:
        return resolve_storage_url(own)
    return asked


def prepare_task(worker: WorkerConfig, together: int) -> Iterator[Preparation | WorkerError]:
    """Make what the rows share, of which ``together`` run at once on one machine.

    Reports the progress; the last message may be an error.
    """
    messages: queue.SimpleQueue[Preparation | WorkerError | None] = queue.SimpleQueue()
    last = 0.0

    def report(step: Step, done: int, total: int, remark: str) -> None:
        nonlocal last
        if done in (0, 1, total) or time.monotonic() - last > POLL_SECONDS:
            last = time.monotonic()
            messages.put(Preparation(step, done, total, remark))

    def work() -> None:
        try:
            worker.apply()
            study = Study.open(worker_storage(worker.storage), worker.study)
            for message in trainer_of(study.spec).prepare(study, together, report):
                messages.put(message)
        except Exception as error:  # noqa: BLE001  it reaches the user as the launch's error
            messages.put(WorkerError.of(error))
        finally:
            messages.put(None)

    threading.Thread(target=work, daemon=True).start()
    while (message := messages.get()) is not None:
        yield message


def record_task(
    worker: WorkerConfig, part: int, parts: int
) -> Iterator[Preparation | WorkerError]:
    """Record the missing trajectory shards whose number is ``part`` modulo ``parts``."""
    from search.worker.assets import load, use_device
    from search.worker.distillation import record

    try:
        worker.apply()
        study = Study.open(worker_storage(worker.storage), worker.study)
        spec = study.spec
        yield from record(study, load(spec, use_device(spec)), part, parts)
    except Exception as error:  # noqa: BLE001  it reaches the user as the launch's error
        yield WorkerError.of(error)


def slot(config: Mapping[str, Any]) -> dict[str, Any]:
    """A Ray Tune trainable: claim and work on rows until all have ended.

    Args:
        config: ``worker`` (a ``WorkerConfig``), and ``mark``, a file that counts this slot's
            starts.

    Returns:
        ``error``: a ``WorkerError``, or None.
    """
    worker, mark = config["worker"], Path(config["mark"])
    try:
        worker.apply()
        if _count_start(mark) > MAX_STARTS:
            raise WorkersFailedError(
                f"a worker died {MAX_STARTS} times in a row without taking a trial, as it started "
                "or as it waited for one; its output is in Ray's session log folder "
                "(worker-*.err)"
            )
        _work(worker, mark)
    except StoppedError:
        pass  # the launch knows why
    except (BdenseError, OSError) as error:
        # Started again, it would meet the same full or closed disk.
        if isinstance(error, OSError) and disk_error(error) is None:
            raise
        return {"error": WorkerError.of(error)}
    return {"error": None}


def _work(config: WorkerConfig, mark: Path) -> None:
    worker = _open_patiently(config)
    while (claimed := worker.claim()) is not None:
        mark.unlink(missing_ok=True)
        try:
            worker.work(claimed)
        except LeaseLostError as error:
            _log.warning("%s", error)


def _open_patiently(config: WorkerConfig) -> "Worker":
    """The worker of a study; waits for a database that is just restarting."""
    from search.worker.worker import Worker

    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            study = Study.open(worker_storage(config.storage), config.study)
            for ledger in study.ledgers:
                ledger.launch = config.launch
            return Worker(study)
        except (StorageFullError, StorageRefusedError):
            raise
        except StorageError:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_SECONDS)


def _count_start(mark: Path) -> int:
    mark.parent.mkdir(parents=True, exist_ok=True)
    with mark.open("a") as file:
        file.write(".")
    return mark.stat().st_size
