"""What runs on Ray's workers: making the shared parts, and slots that claim trials till the end.

A slot takes its orders from the database: the spec is the study's, the trials are the ledger's.
It may be killed at any point; whoever claims next goes on from the trial's last checkpoint.
"""

import logging
import os
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdense.errors import BdenseError, InputError
from search.errors import LeaseLostError, SpecChangedError, StorageError
from search.ledger import Claim, Done, Ledger
from search.report import copy_baselines
from search.space import baseline_space, make_sampler, search_space
from search.spec import StudySpec
from search.storage import redact, resolve_storage_url, retrying, without_password
from search.study import FINGERPRINT, SPEC, TRAJECTORIES, Study

_log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
MAX_STARTS = 3
PATIENCE_SECONDS = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What a worker is told, whatever folder and environment it starts in; holds no password.

    Attributes:
        study: Name of the study, which holds the spec.
        spec: The spec as JSON, for what is made before the study is read.
        storage: URL without password.
        runs, cache: The launcher's folders.
    """

    study: str
    spec: str
    storage: str
    runs: str
    cache: str

    def settle(self) -> StudySpec:
        """Make this process use the launcher's folders; the spec."""
        os.environ["BDENSE_RUNS"], os.environ["BDENSE_CACHE"] = self.runs, self.cache
        return StudySpec.model_validate_json(self.spec)


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


def prepare_task(orders: Orders, together: int) -> Iterator[Progress | Refusal]:
    """Make what the trials share and tell about it; the last message may be a refusal.

    Args:
        orders: The study's.
        together: Trials at once on one machine.
    """
    # Imported here: the launcher ships this function and needs no torch for it.
    from search.assets import prepare, use_device

    messages: queue.SimpleQueue[Progress | Refusal | None] = queue.SimpleQueue()
    told = [0.0]

    def report(what: str, done: int, total: int, remark: str) -> None:
        if done in (0, 1, total) or time.monotonic() - told[0] > POLL_SECONDS:
            told[0] = time.monotonic()
            messages.put(Progress(what=what, done=done, total=total, remark=remark))

    def work() -> None:
        try:
            spec = orders.settle()
            prepare(spec, use_device(spec), report, together=together)
        except Exception as error:  # noqa: BLE001  it reaches the user as the launch's error
            messages.put(Refusal.of(error))
        finally:
            messages.put(None)

    threading.Thread(target=work, daemon=True).start()
    while (message := messages.get()) is not None:
        yield message


def record_task(orders: Orders, part: int, parts: int) -> Iterator[Progress | Refusal]:
    """Record the missing shards whose number leaves the remainder ``part`` by ``parts``."""
    from search.assets import load_data, load_teacher, trajectory_store, use_device

    try:
        spec = orders.settle()
        teacher = load_teacher(spec, load_data(spec), use_device(spec))
        store = trajectory_store(spec, teacher)
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
    """A Ray Tune trainable: claim and run trials of the baselines, then of the study.

    Args:
        config: ``orders``, and ``mark``: a file that counts this slot's starts.

    Returns:
        ``refusal``: why it could not go on, or None.
    """
    mark = Path(config["mark"])
    if _count_start(mark) > MAX_STARTS:
        message = (
            f"a worker died {MAX_STARTS} times before it reached a trial; its output is in "
            "Ray's session log folder (worker-*.err)"
        )
        return {"refusal": Refusal(message=message, is_input_error=False)}
    try:
        _work(config["orders"], mark)
    except BdenseError as error:
        return {"refusal": Refusal.of(error)}
    return {"refusal": None}


def _work(orders: Orders, mark: Path) -> None:
    from search.assets import load, use_device
    from search.trial import keep_best_students, work_on

    orders.settle()
    study = _open_patiently(worker_storage(orders.storage), orders.study)
    # The study's spec, not the orders': another launcher may have extended it meanwhile.
    spec = StudySpec.model_validate_json(study.trials.study.user_attrs[SPEC])
    assets = load(spec, use_device(spec))
    if assets.store is not None:
        folder = str(assets.store.folder.resolve())
        retrying(lambda: study.trials.study.set_user_attr(TRAJECTORIES, folder))
    while (claimed := _claim_next(study, spec)) is not None:
        ledger, claim, asked = claimed
        mark.unlink(missing_ok=True)
        _require_same_conditions(study, ledger, claim, assets.fingerprint)
        try:
            work_on(ledger, claim, assets, asked)
        except LeaseLostError as error:
            _log.warning("%s", error)
            continue
        if ledger is study.trials:
            keep_best_students(ledger, spec.keep_students)
        else:
            copy_baselines(study)


def _claim_next(study: Study, spec: StudySpec) -> tuple[Ledger, Claim, float] | None:
    """The next claim and when it was asked for; baselines first, as something to beat."""
    from search.engine import excess_weight

    assert study.baselines is not None  # a launch plans them
    while True:
        asked = time.perf_counter()
        first = study.baselines.claim(baseline_space(), lambda offset: make_sampler(spec, offset))
        if isinstance(first, Claim):
            return study.baselines, first, asked
        then = study.trials.claim(
            search_space(spec),
            lambda offset: make_sampler(spec, offset),
            lambda params: excess_weight(spec, params),
        )
        if isinstance(then, Claim):
            return study.trials, then, asked
        if isinstance(first, Done) and isinstance(then, Done):
            return None
        time.sleep(POLL_SECONDS)


def _require_same_conditions(study: Study, ledger: Ledger, claim: Claim, mine: str) -> None:
    """A worker of other numerics, or of a spec replaced meanwhile, must not measure here."""
    stored = retrying(lambda: study.trials.study.user_attrs)[FINGERPRINT]
    if stored != mine:
        ledger.release(claim, interrupted=True)
        raise SpecChangedError(
            f"a worker measures under other conditions (fingerprint {mine}) than study "
            f"{study.name} has ({stored}): another launch changed the study before its first "
            "trial, or the worker runs another version of bdense; launch again"
        )


def _open_patiently(url: str, name: str) -> Study:
    """Open a study on a database that may just be restarting."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return Study.open(url, name)
        except StorageError:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_SECONDS)


def _count_start(mark: Path) -> int:
    mark.parent.mkdir(parents=True, exist_ok=True)
    with mark.open("a") as file:
        file.write(".")
    return mark.stat().st_size
