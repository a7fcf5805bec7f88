"""What runs on Ray's workers: making the shared parts, and slots that claim rows till the end.

A slot may be killed at any point; whoever claims next goes on from the row's last checkpoint.
"""

import logging
import os
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bdense.errors import BdenseError, InputError, StoppedError
from search.errors import (
    LeaseLostError,
    StorageError,
    StorageFullError,
    StorageRefusedError,
    WorkersFailedError,
)
from search.log import LOG, about, start_logging
from search.spec.model_spec import ModelSpec
from search.spec.promotion_spec import PromotionSpec
from search.spec.study_file import read_stored
from search.spec.study_spec import StudySpec
from search.storage.disk import disk_error
from search.storage.engine import redact, resolve_storage_url, without_password
from search.storage.stop_flags import NO_LAUNCH, Launch
from search.study.arms import Planned
from search.study.artifacts import PLACE as ARTIFACTS
from search.study.study import Study

if TYPE_CHECKING:
    from search.worker.workers import Worker

_log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
MAX_STARTS = 3
PATIENCE_SECONDS = 300.0


# What rows are: a search's trials, students trained again, chains of progressive distillation.
Kind = Literal["search", "retrain", "progressive"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What a worker is told, whatever folder and environment it starts in; holds no password.

    Attributes:
        kind: What the study's rows are.
        study: Name of the study, which holds the spec.
        storage: URL without password.
        runs, cache: The launcher's folders.
        artifacts: Where its rows' pictures go.
        launch: Which one it works for.
        log: The launcher's ``BDENSE_LOG``.
    """

    kind: Kind
    study: str
    storage: str
    runs: str
    cache: str
    artifacts: str = ""
    launch: Launch = NO_LAUNCH
    log: str = ""

    def settle(self) -> None:
        """Make this process use the launcher's folders, and log as it does."""
        os.environ["BDENSE_RUNS"], os.environ["BDENSE_CACHE"] = self.runs, self.cache
        os.environ[ARTIFACTS] = self.artifacts
        os.environ[LOG] = self.log
        start_logging()
        about(study=self.study)

    def read(self, spec: str) -> ModelSpec:
        """A spec of this kind from JSON.

        Raises:
            InputError: The launcher is one of another version of bdense.
        """
        kind = PromotionSpec if self.kind == "progressive" else StudySpec
        return read_stored(kind, self.study, spec)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One message of a preparing task to the launcher: ``done`` of ``total`` of ``what``."""

    what: str
    done: int
    total: int
    remark: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a worker cannot do its part, and whether the user can mend it."""

    message: str
    is_input_error: bool

    @classmethod
    def of(cls, error: Exception) -> "Refusal":
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


def prepare_task(orders: Orders, spec: str, together: int) -> Iterator[Progress | Refusal]:
    """Make what the rows share and tell about it; the last message may be a refusal.

    Args:
        orders: The study's.
        spec: As JSON: the study's own, or a variant of it.
        together: Rows at once on one machine.
    """
    # Imported here: the launcher ships this function and needs no torch for it.
    from search.worker.assets import prepare, use_device
    from search.worker.chain_trial import prepare_chain
    from search.worker.cost import require_room

    messages: queue.SimpleQueue[Progress | Refusal | None] = queue.SimpleQueue()
    told = [0.0]

    def report(what: str, done: int, total: int, remark: str) -> None:
        if done in (0, 1, total) or time.monotonic() - told[0] > POLL_SECONDS:
            told[0] = time.monotonic()
            messages.put(Progress(what=what, done=done, total=total, remark=remark))

    def work() -> None:
        try:
            orders.settle()
            read = orders.read(spec)
            report("memory", 0, 1, "that a trial takes")
            require_room(read, together)
            if isinstance(read, PromotionSpec):
                prepare_chain(read, use_device(read), report)
            else:
                assert isinstance(read, StudySpec)
                prepare(read, use_device(read), report)
        except Exception as error:  # noqa: BLE001  it reaches the user as the launch's error
            messages.put(Refusal.of(error))
        finally:
            messages.put(None)

    threading.Thread(target=work, daemon=True).start()
    while (message := messages.get()) is not None:
        yield message


def record_task(orders: Orders, spec: str, part: int, parts: int) -> Iterator[Progress | Refusal]:
    """Record the missing shards whose number leaves the remainder ``part`` by ``parts``."""
    from search.worker.assets import load_data, load_teacher, trajectory_store, use_device

    try:
        orders.settle()
        read = orders.read(spec)
        assert isinstance(read, StudySpec)
        teacher = load_teacher(read, load_data(read), use_device(read))
        store = trajectory_store(read, teacher)
        size = f"{store.nbytes / 2**20:.0f} MiB on disk"
        # By number, not by place in the list: other tasks record while this one starts.
        missing = [shard for shard in store.missing() if shard % parts == part]
        if missing:
            yield Progress(what="trajectories", done=0, total=store.num_shards, remark=size)
        for shard in missing:
            store.record_shard(shard)
            done = store.num_shards - len(store.missing())
            yield Progress(what="trajectories", done=done, total=store.num_shards, remark=size)
    except Exception as error:  # noqa: BLE001  it reaches the user as the launch's error
        yield Refusal.of(error)


def slot(config: Mapping[str, Any]) -> dict[str, Any]:
    """A Ray Tune trainable: claim and work on rows until all have ended.

    Args:
        config: ``orders``, and ``mark``: a file that counts this slot's starts.

    Returns:
        ``refusal``: why it could not go on, or None.
    """
    orders, mark = config["orders"], Path(config["mark"])
    try:
        orders.settle()
        if _count_start(mark) > MAX_STARTS:
            raise WorkersFailedError(
                f"a worker died {MAX_STARTS} times in a row without taking a trial, as it started "
                "or as it waited for one; its output is in Ray's session log folder "
                "(worker-*.err)"
            )
        _work(orders, mark)
    except StoppedError:
        pass  # the launch knows why
    except BdenseError as error:
        return {"refusal": Refusal.of(error)}
    except OSError as error:
        # Started again it would meet the same disk, for ever.
        if disk_error(error) is None:
            raise
        return {"refusal": Refusal.of(error)}
    return {"refusal": None}


def _work(orders: Orders, mark: Path) -> None:
    worker = _open_patiently(orders)
    while (claimed := worker.claim()) is not None:
        mark.unlink(missing_ok=True)
        try:
            worker.work(claimed)
        except LeaseLostError as error:
            _log.warning("%s", error)


def _open_patiently(orders: Orders) -> "Worker":
    """The worker of a study on a database that may just be restarting.

    Raises:
        StorageError: It does not open in time; at once where waiting would mend nothing.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return _worker_of(orders)
        except (StorageFullError, StorageRefusedError):
            raise
        except StorageError:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_SECONDS)


def _worker_of(orders: Orders) -> "Worker":
    from search.worker.workers import ChainWorker, RetrainWorker, SearchWorker

    url = worker_storage(orders.storage)
    if orders.kind == "search":
        study = Study.open(url, orders.study)
        for ledger in study.ledgers:
            ledger.launch = orders.launch
        return SearchWorker(study)
    planned = Planned.open(url, orders.study)
    planned.ledger.launch = orders.launch
    return ChainWorker(planned) if orders.kind == "progressive" else RetrainWorker(planned)


def _count_start(mark: Path) -> int:
    mark.parent.mkdir(parents=True, exist_ok=True)
    with mark.open("a") as file:
        file.write(".")
    return mark.stat().st_size
