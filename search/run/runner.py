"""The launcher: Ray as the executor of a study in the database.

Killed at any point, it continues when the same command is run again.
"""

import contextlib
import contextvars
import functools
import logging
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import tune

from bdense.errors import InputError
from bdense.knobs import KnobError
from search.errors import INTERRUPTED, ClusterLostError, WorkersFailedError
from search.log import LOG, say
from search.places import cache_folder, runs_folder
from search.run.ending import EarlyEnd, silencing_descriptor_2
from search.run.head import Head, leave_ray
from search.run.machine import ray_scratch
from search.spec.sections import ResourcesSpec
from search.spec.study import StudySpec
from search.storage.engine import one_line, without_password
from search.storage.stop_flags import Launch, is_asked, stopped_error
from search.study.artifacts import artifacts_place
from search.study.study import Study
from search.worker.ray_tasks import WorkerConfig, WorkerError, prepare_task, record_task, slot
from search.worker.trainer import Preparation, Step

OBJECT_STORE_BYTES = 80 * 2**20  # Ray's minimum; no large object passes through it
POLL_SECONDS = 1.0
JOIN_SECONDS = 60.0  # for a cluster's first worker
TOKEN = "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH (a file) or RAY_AUTH_TOKEN"

_log = logging.getLogger(__name__)


def run(
    study: Study,
    launch: Launch,
    *,
    workers: int | None,
    on_preparing: Callable[[Preparation], None],
    on_running: Callable[[], None],
) -> None:
    """Run the study's rows on Ray's workers until all have ended.

    Args:
        launch: This launch; requests to stop that came since it began end it.
        workers: Rows at once; None for one on each GPU, or for each ``resources.cpus``.
        on_preparing: Called with the progress of the preparations.
        on_running: Called every second while rows run, from another thread.

    Raises:
        InputError: Workers cannot use something that the user gave, or this is not the main
            thread.
        WorkersFailedError: Workers die before they reach a row.
        ClusterLostError: Ray's head is gone.
        StoppedError: The study was asked to stop.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the workers have saved their state.
    """
    if threading.current_thread() is not threading.main_thread():
        raise InputError(
            f"study {study.name} can run in the main thread alone, which Ctrl-C and requests to "
            "stop interrupt; call from there, or from a process of its own"
        )
    spec = study.spec
    worker = WorkerConfig(
        launch=launch,
        log=os.environ.get(LOG, ""),
        study=study.name,
        storage=without_password(study.url),
        runs=str(runs_folder().resolve()),
        cache=str(cache_folder().resolve()),
        artifacts=artifacts_place(),
    )
    head: Head | None = None
    early_end = EarlyEnd(study.ledgers, launch, at_once=lambda: head is not None and head.lost)
    all_ended = False

    def is_lost() -> bool:
        """Whether the head died by itself: a signal to the process group ends our own, too."""
        ours = not os.environ.get("RAY_ADDRESS") and early_end.interrupted
        return head is not None and head.lost and not ours

    try:
        with (
            quiet(),
            silencing_descriptor_2() as early_end.on_signal,
            ray_session(study.url) as head,
            early_end,
        ):
            head.last_words = functools.partial(_last_words, study, head, is_lost)
            _await_machines()
            slots = _slots(spec.resources, workers)
            _prepare(spec, worker, slots, on_preparing)
            early_end.rows_run()
            with _every_second(on_running):
                # No more slots than rows are left: others would find nothing to do.
                needed = min(slots, max(study.left(), 1))
                errors = _run_slots(spec.resources, worker, needed)
                all_ended = True
        if early_end.interrupted:
            raise KeyboardInterrupt  # as if there had been no workers to wait for
    except KeyboardInterrupt:
        if not all_ended:  # else they gave their rows back; those that run are another launch's
            study.forgive_running()
        if is_asked(study.ledgers, launch):
            raise stopped_error(study.name) from None
        if head is not None and is_lost():
            raise _head_lost(head) from None
        raise
    except ray.exceptions.RayError as error:
        if head is not None and is_lost():
            raise _head_lost(head) from error
        if early_end.interrupted:
            study.forgive_running()
            raise KeyboardInterrupt from None
        raise WorkersFailedError(f"a worker of Ray failed: {error}") from error
    if study.left():
        _raise_first(errors)
        if is_asked(study.ledgers, launch):
            raise stopped_error(study.name)
    for message in dict.fromkeys(error.message for error in errors):
        say(f"all rows have ended, but one worker did no work: {message}")


def _last_words(study: Study, head: Head, is_lost: Callable[[], bool]) -> None:
    """Print the error and forgive the rows, as Ray lets no exception through."""
    if is_lost():
        said = f"bdense-search: {_head_lost(head)}"
    else:
        said, head.exit_status = f"\n{INTERRUPTED}", 130
    sys.stderr.write(f"{said}\n")
    sys.stderr.flush()
    study.forgive_running()


def _head_lost(head: Head) -> ClusterLostError:
    return ClusterLostError(
        f"the head of Ray at {head.address} is gone, or this machine's part of it; nothing is "
        "lost: when it is back, run the same command again to continue"
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the remarks of Ray and Tune out of standard output, which is for the result."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


@contextlib.contextmanager
def ray_session(url: str) -> Iterator[Head]:
    """Use the Ray cluster of ``RAY_ADDRESS``, else start one on this machine for the launch.

    Once its head is gone, the block is left as by Ctrl-C.
    """
    # Local workers inherit the environment: the password is in no pickle and no argument.
    os.environ["BDENSE_STORAGE"] = url
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    logging.getLogger("ray").setLevel(logging.ERROR)
    # Each worker that dies is a traceback to Tune, and a trial taken over to us.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    local: dict[str, Any] = {}
    if address := os.environ.get("RAY_ADDRESS"):
        _require_listener(address)
    else:
        # Named, or Ray would join whatever cluster it finds running on this machine.
        local = {
            "address": "local",
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": False,
        }
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **local)
    except Exception as error:  # Ray raises a bare one where a node of its own does not start
        raise cannot_use(error) from error
    head = Head(client=os.environ.get("RAY_ADDRESS", "").startswith("ray://"))
    try:
        with head:
            yield head
    finally:
        leave_ray(head)


def _require_listener(address: str) -> None:
    """Refuse an address that nothing answers at, which Ray would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return  # "auto" or "local"
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise InputError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({error}); start it, correct the "
            "address, or unset RAY_ADDRESS to use this machine alone"
        ) from error


def _slots(resources: ResourcesSpec, workers: int | None) -> int:
    """Trials at once: ``workers``, else as many as fit."""
    gpus, fit = gpus_per_trial(resources), sum(_fit_by_machine(resources))
    if 1 <= (workers or 1) <= fit:
        return workers or fit
    machines = " or ".join(f"{cpus:g} CPUs and {own:g} GPUs" for cpus, own in _machines())
    if fit < 1:
        raise InputError(
            f"a trial asks for resources.cpus={resources.cpus:g} and gpus={gpus:g} of one "
            f"machine, and the cluster's have {machines}; lower them"
        )
    share = "; with resources.gpus below 1 trials share a GPU" if gpus else ""
    raise KnobError(
        "workers",
        f"{workers} do not fit: a trial takes {resources.cpus:g} CPUs and {gpus:g} GPUs, and the "
        f"cluster's machines, with {machines}, have room for {fit} trials; lower `workers` or "
        f"resources{share}",
    )


def _await_machines() -> None:
    """Wait for a machine with CPUs: a cluster's head may be there before any worker."""
    deadline = time.monotonic() + JOIN_SECONDS
    while not any(cpus for cpus, _ in _machines()):
        if time.monotonic() > deadline:
            raise InputError(
                f"no worker joined the Ray cluster within {JOIN_SECONDS:g} seconds, and its head "
                "has no CPUs; start one: ray start --address=HEAD:PORT, with the head's token"
            )
        time.sleep(POLL_SECONDS)


def _machines() -> list[tuple[float, float]]:
    """CPUs and GPUs of each machine of the cluster."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [(each.get("CPU", 0.0), each.get("GPU", 0.0)) for each in alive]


def _fit_by_machine(resources: ResourcesSpec) -> list[int]:
    """Trials at once on each machine; a trial's CPUs and GPUs lie on one machine."""
    cpus, gpus = resources.cpus, gpus_per_trial(resources)
    return [
        min(int(own_cpus / cpus), _fit_on_gpus(own_gpus, gpus) if gpus else int(own_cpus / cpus))
        for own_cpus, own_gpus in _machines()
    ]


def _fit_on_gpus(own: float, each: float) -> int:
    """Trials at once on a machine's GPUs; a trial's share lies on one GPU."""
    if each >= 1:
        return int(own / each)
    return int(own) * int(1 / each + 1e-9)  # 1 / (1 / 49) is less than 49


def gpus_per_trial(resources: ResourcesSpec) -> float:
    """GPUs of a trial: the spec's number; for ``auto`` one if the cluster has any."""
    if resources.gpus == "auto":
        return 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0
    return float(resources.gpus)


def _prepare(
    spec: StudySpec, worker: WorkerConfig, slots: int, tell: Callable[[Preparation], None]
) -> None:
    """Prepare in one task; what trajectories it leaves are recorded on each slot's GPU."""
    # The GPUs of a trial share its batches; these tasks take one.
    team = spec.resources.team
    gpus = gpus_per_trial(spec.resources) / team
    # A machine may leave the cluster at any time; Ray then waits for the next.
    most_cpus = max(
        (cpus for cpus, own in _machines() if own >= gpus), default=spec.resources.cpus
    )
    together = min(slots, max(_fit_by_machine(spec.resources)))
    threads = spec.teacher.train.threads if spec.teacher.train else 1
    cpus = max(spec.resources.cpus, min(threads, most_cpus))
    tell(Preparation(Step.WAITING, 0, 1))
    last = _follow([_task(prepare_task, cpus, gpus).remote(worker, together)], tell)
    if last is not None and last.step is Step.TRAJECTORIES and last.done < last.total:
        record, parts = _task(record_task, spec.resources.cpus / team, gpus), slots * team
        _follow([record.remote(worker, part, parts) for part in range(parts)], tell)


def _task(function: Callable[..., Any], cpus: float, gpus: float) -> Any:  # noqa: ANN401  Ray's
    # max_calls: the process ends with the task and frees torch's memory for the slots.
    return ray.remote(num_cpus=cpus, num_gpus=gpus, max_calls=1, max_retries=2)(function)


def _follow(streams: Sequence[Any], tell: Callable[[Preparation], None]) -> Preparation | None:
    """Pass on the messages of tasks until all have ended; the first error ends the launch.

    Returns:
        The last message.
    """
    waiting: list[Any] = list(streams)
    last: Preparation | None = None
    while waiting:
        ready: list[Any] = ray.wait(waiting, num_returns=1, fetch_local=False)[0]
        for stream in ready:
            try:
                message: Any = ray.get(next(stream))
            except StopIteration:
                waiting.remove(stream)
                continue
            if isinstance(message, WorkerError):
                _raise_first([message])
            last = message
            tell(last)
    return last


def _raise_first(errors: Sequence[WorkerError]) -> None:
    """Raise the first error of the workers; the user's mistakes first."""
    for error in sorted(errors, key=lambda each: not each.is_input_error):
        kind = InputError if error.is_input_error else WorkersFailedError
        raise kind(error.message)


def _run_slots(resources: ResourcesSpec, worker: WorkerConfig, slots: int) -> list[WorkerError]:
    """Run that many slots until all have ended; returns the errors of those that failed."""
    lot = uuid.uuid4().hex[:8]
    scratch = Path(tempfile.mkdtemp(prefix="bdense-tune-"))
    marks = Path(worker.runs) / worker.study / "slots"
    config = {
        "worker": worker,
        "mark": tune.grid_search([str(marks / f"{lot}-{i}") for i in range(slots)]),
    }
    needed = {"cpu": resources.cpus, "gpu": gpus_per_trial(resources)}
    tuner = tune.Tuner(
        tune.with_resources(slot, needed),
        param_space=config,
        tune_config=tune.TuneConfig(max_concurrent_trials=slots),
        run_config=tune.RunConfig(
            name=lot,
            storage_path=str(scratch),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=-1),
        ),
    )
    try:
        results = tuner.fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(marks, ignore_errors=True)
    ended = [results[i].metrics or {} for i in range(len(results))]
    return [metrics["error"] for metrics in ended if metrics.get("error")]


@contextlib.contextmanager
def _every_second(call: Callable[[], None]) -> Iterator[None]:
    """Call from a thread of its own until the block is left."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(POLL_SECONDS):
            try:
                call()
            except Exception as error:  # noqa: BLE001  showing progress must not end a launch
                _log.warning("progress cannot be shown: %s", one_line(error))

    # A copy of the context, as the thread's log records are about the same study.
    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(run,), name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=5)


def cannot_use(error: Exception) -> InputError:
    """The error for the user, made from what ``ray.init`` raised."""
    address = os.environ.get("RAY_ADDRESS")
    where = f"at {address}" if address else "on this machine"
    said = " ".join(str(error).split())
    # Ray names a refused token only in a cause of its error.
    text = "".join(traceback.format_exception(error))
    if "AuthenticationError" in text or "InvalidAuthToken" in text:
        return InputError(
            f"Ray {where} asks for a token, and the one here is missing or wrong; set {TOKEN}, "
            "to the same as on its head"
        )
    logs = f"see Ray's own logs in {ray_scratch()}/session_latest/logs"
    advice = "check RAY_ADDRESS, or unset it" if address else logs
    if "version mismatch" in said.lower():
        advice = "install the cluster's versions of Ray and Python here"
    return InputError(f"Ray cannot be used {where}: {said}; {advice}")
