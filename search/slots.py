"""What runs on Ray's workers: making the shared parts, and slots that claim trials till the end.

A slot takes its orders from the database: the spec is the study's, the trials are the ledger's.
It may be killed at any point; whoever claims next goes on from the trial's last checkpoint.
"""

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdense.errors import BdenseError, InputError
from search.errors import LeaseLostError, StorageError
from search.ledger import Claim, Done, Ledger
from search.report import copy_baselines
from search.space import baseline_space, make_sampler, search_space
from search.spec import StudySpec
from search.storage import redact, resolve_storage_url
from search.study import SPEC, TRAJECTORIES, Study

_log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
MAX_STARTS = 3
PATIENCE_SECONDS = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One message of a preparing task to the launcher: ``done`` of ``total`` of ``what``."""

    what: str
    done: int
    total: int
    remark: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A preparing task's way to say what the user must mend."""

    message: str
    is_input_error: bool


def worker_storage(shown: str) -> str:
    """The storage URL on a worker: the environment's, password and all, if it is the one shown.

    Passwords travel in the environment (or PGPASSFILE) alone, never in what Ray pickles.
    """
    own = os.environ.get("BDENSE_STORAGE")
    if own and redact(resolve_storage_url(own)) == shown:
        return own
    return shown


def prepare_task(spec_json: str, threads: int) -> Iterator[Progress | Refusal]:
    """Make what the trials share and tell about it; the last message may be a refusal."""
    # Imported here: the launcher ships this function and needs no torch for it.
    import queue
    import threading

    import torch

    from search.assets import prepare, use_device

    spec = StudySpec.model_validate_json(spec_json)
    messages: queue.SimpleQueue[Progress | Refusal | None] = queue.SimpleQueue()

    def report(what: str, done: int, total: int, remark: str) -> None:
        messages.put(Progress(what=what, done=done, total=total, remark=remark))

    def work() -> None:
        try:
            device = use_device(spec)
            torch.set_num_threads(threads)
            prepare(spec, device, report)
        except BdenseError as error:
            messages.put(_refusal(error))
        except Exception as error:  # noqa: BLE001  it reaches the user as the launch's error
            _log.exception("preparing %s", spec.name)
            messages.put(_refusal(error))
        finally:
            messages.put(None)

    threading.Thread(target=work, daemon=True).start()
    while (message := messages.get()) is not None:
        # Only the newest matters where the work is faster than its reader.
        while message is not None and isinstance(message, Progress) and not messages.empty():
            newer = messages.get()
            if newer is None:
                yield message
                return
            message = newer
        yield message


def record_task(spec_json: str, part: int, parts: int) -> Iterator[Progress | Refusal]:
    """Record the missing shards whose number leaves the remainder ``part`` by ``parts``."""
    from bdense.data import load_dataset
    from search.assets import load_teacher, trajectory_store, use_device

    spec = StudySpec.model_validate_json(spec_json)
    try:
        device = use_device(spec)
        teacher = load_teacher(spec, load_dataset(spec.data), device)
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
    except BdenseError as error:
        yield _refusal(error)


def slot(config: Mapping[str, Any]) -> dict[str, Any]:
    """A Ray Tune trainable: claim and run trials of the baselines, then of the study.

    Args:
        config: ``study``, ``storage`` (without password), ``mark`` (a file that counts this
            slot's starts), ``runs`` and ``cache`` folders.

    Returns:
        ``trials``: how many it brought to an end; ``error``: why it never reached one, or "".
    """
    os.environ["BDENSE_RUNS"], os.environ["BDENSE_CACHE"] = config["runs"], config["cache"]
    mark = Path(config["mark"])
    starts = _count_start(mark)
    if starts > MAX_STARTS:
        return {
            "trials": 0,
            "error": f"a worker died {MAX_STARTS} times before it reached a trial; its output "
            "is in Ray's session log folder (worker-*.err)",
        }
    try:
        trials = _work(config, mark)
    except InputError as error:
        return {"trials": 0, "error": str(error)}
    return {"trials": trials, "error": ""}


def _work(config: Mapping[str, Any], mark: Path) -> int:
    from search.assets import load, trajectory_store, use_device
    from search.engine import excess_weight
    from search.trial import work_on

    study = _open_patiently(worker_storage(config["storage"]), config["study"])
    trials, baselines = study.trials, study.baselines
    assert baselines is not None  # a launch plans them
    spec = StudySpec.model_validate(json.loads(trials.study.user_attrs[SPEC]))
    assets = load(spec, use_device(spec))
    if spec.trajectories.mode == "recorded":
        folder = trajectory_store(spec, assets.teacher).folder.resolve()
        trials.study.set_user_attr(TRAJECTORIES, str(folder))

    def claim_next() -> tuple[Ledger, Claim, float] | None:
        """The next claim and when it was asked for; baselines first, as something to beat."""
        while True:
            asked = time.perf_counter()
            first = baselines.claim(baseline_space(), lambda offset: make_sampler(spec, offset))
            if isinstance(first, Claim):
                return baselines, first, asked
            then = trials.claim(
                search_space(spec),
                lambda offset: make_sampler(spec, offset),
                lambda params: excess_weight(spec, params),
            )
            if isinstance(then, Claim):
                return trials, then, asked
            if isinstance(first, Done) and isinstance(then, Done):
                return None
            time.sleep(POLL_SECONDS)

    ended = 0
    while (claimed := claim_next()) is not None:
        mark.unlink(missing_ok=True)
        ledger, claim, asked = claimed
        try:
            work_on(ledger, claim, assets, asked)
        except LeaseLostError as error:
            _log.warning("%s", error)
            continue
        ended += 1
        if ledger is baselines:
            copy_baselines(study)
    return ended


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


def _refusal(error: Exception) -> Refusal:
    is_input_error = isinstance(error, InputError)
    message = str(error) if isinstance(error, BdenseError) else f"{type(error).__name__}: {error}"
    return Refusal(message=redact(message), is_input_error=is_input_error)
