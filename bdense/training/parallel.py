"""One training over several devices of a machine: each process takes its share of every batch.

torch's DistributedDataParallel averages the gradients: NCCL between GPUs, gloo between CPUs.
"""

import contextlib
import ctypes
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bdense.errors import InputError, portable

# Timeout of an all-reduce. A process that has ended is noticed at once.
PATIENCE = timedelta(minutes=10)
# Polling interval while waiting for another process.
_POLL_SECONDS = 0.05
# Timeouts: of the leader for a follower's error, and of a follower for its own end.
_REPORT_SECONDS, _END_SECONDS = 5.0, 30.0
_HOST = "127.0.0.1"
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
# A follower's work, given its team, its device and the leader's job.
Follow = Callable[["Team", torch.device, Any], object]


def _no_followers() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Team:
    """The processes of one training, seen from one of them; by default, this one alone.

    Attributes:
        rank: Of this process, from 0; rank 0 leads.
        store: torch's key-value store, in the leader's process; None for a team of one.
        raise_peer_error: Re-raises a follower's error in the leader; an all-reduce without it is
            invalid.
    """

    rank: int = 0
    size: int = 1
    store: Any = field(default=None, repr=False, compare=False)
    raise_peer_error: Callable[[], None] = field(default=_no_followers, repr=False, compare=False)

    @property
    def leads(self) -> bool:
        """Whether this process saves and reports."""
        return self.rank == 0

    def parts_of(self, batch: int, count: int = 1) -> list[slice]:
        """This process' images of a batch, in so many parts.

        Raises:
            InputError: The batch cannot be shared equally.
        """
        if batch % (self.size * count):
            each = f", each in accumulate={count} parts" if count > 1 else ""
            raise InputError(
                f"batch={batch} cannot be shared by {self.size} devices{each}; choose a multiple"
            )
        size = batch // (self.size * count)
        first = self.rank * count
        return [slice(size * i, size * (i + 1)) for i in range(first, first + count)]

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module, with gradients averaged over a team of several."""
        # EDM's augmentation layer has no part in distillation: to look for unused parameters in
        # each update would cost a walk over its graph.
        unused = [name for name, _ in module.named_parameters() if "map_augment" in name]
        ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        ignore(module, unused)  # type: ignore[no-untyped-call]
        return DistributedDataParallel(module)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the team, equal on all processes."""
        if self.size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total / self.size

    def while_others_wait(self, name: str, work: Callable[[], object]) -> None:
        """Work of the leader; the others poll, as ``PATIENCE`` would end an all-reduce."""
        if self.leads:
            work()
            if self.size > 1:
                self.store.set(name, "done")
            return
        while not self.store.check([name]):
            time.sleep(_POLL_SECONDS)


@contextlib.contextmanager
def team_of(devices: Sequence[torch.device], follow: Follow, job: object) -> Iterator[Team]:
    """Lead a team with a process for each device: this one for the first, new ones for the others.

    No follower outlives the block; on Linux, not even if this process is killed. A follower's
    error is raised here; if a follower dies, a ``RuntimeError``.

    Args:
        devices: All of one kind.
        follow: A module-level function, run in each new process.
        job: Its argument; pickled.

    Raises:
        InputError: The devices are of different kinds.
    """
    if len({device.type for device in devices}) != 1:
        raise InputError(
            f"one training runs on devices of one kind, got {list(map(str, devices))}"
        )
    # Port 0: any that is free.
    store = dist.TCPStore(  # type: ignore[attr-defined]
        _HOST, 0, len(devices), is_master=True, wait_for_workers=False
    )
    followers = _Followers(devices, store)
    # The failed process is found before the group is left, which breaks the others' all-reduce.
    with followers, contextlib.ExitStack() as group, followers.prefer_peer_error():
        followers.start(follow, job)
        yield group.enter_context(_joined(store, 0, devices, followers.raise_peer_error))
        followers.wait()


class _Followers:
    """The processes of a team beside the leader, and the error of the first that fails.

    A thread watches them: NCCL waits for a process that has ended, and the leader with it.
    """

    def __init__(
        self,
        devices: Sequence[torch.device],
        store: Any,  # noqa: ANN401  a dist.Store, which torch's stubs lack
    ) -> None:
        self._devices = tuple(devices)
        self._store = store
        self._processes: list[Any] = []
        # Ranks by the pipe on which each reports how it ended.
        self._ends: dict[Any, int] = {}
        self._watcher = threading.Thread(target=self._watch, name="followers", daemon=True)
        self._lock = threading.Lock()
        self._over = False
        self._failed = threading.Event()
        self._failure: Exception | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for process in self._processes:
            if kind is None:
                process.join(_END_SECONDS)
            process.kill()
            process.join()
        if self._watcher.is_alive():
            self._watcher.join()

    def start(self, follow: Follow, job: object) -> None:
        """Start them; return once all are about to join, as torch would wait for a missing one."""
        context = torch.multiprocessing.get_context("spawn")
        settings = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
        for rank in range(1, len(self._devices)):
            end, outcome = context.Pipe(duplex=False)
            given = (os.getpid(), outcome, self._store.port, rank, self._devices, *settings)
            # A daemon: the interpreter does not wait for it at exit.
            process = context.Process(target=_follow, args=(*given, follow, job), daemon=True)
            try:
                process.start()
            except BrokenPipeError as error:  # it ended while it received its arguments
                raise self._died(rank, "ended while it started") from error
            finally:
                outcome.close()
            self._processes.append(process)
            self._ends[end] = rank
        self._watcher.start()
        names = [_about_to_join(rank) for rank in range(1, len(self._devices))]
        last = time.monotonic() + PATIENCE.total_seconds()
        while not self._store.check(names):
            self.raise_peer_error()
            if time.monotonic() > last:
                raise RuntimeError(f"the processes of a training did not start in {PATIENCE}")
            time.sleep(_POLL_SECONDS)

    def raise_peer_error(self) -> None:
        """Raise the error of the first that failed."""
        if self._failure is not None:
            raise self._failure

    def wait(self) -> None:
        """Wait until all are done; raises like ``raise_peer_error``."""
        self._watcher.join()
        self.raise_peer_error()

    @contextlib.contextmanager
    def prefer_peer_error(self) -> Iterator[None]:
        """Raise a follower's error instead of the error it caused in this process."""
        try:
            yield
        except Exception as error:
            # A closed connection is a RuntimeError here; the follower's report comes before.
            self._failed.wait(_REPORT_SECONDS if isinstance(error, RuntimeError) else 0)
            if self._failure is not None and self._failure is not error:
                raise self._failure from error
            raise
        finally:
            with self._lock:
                self._over = True

    def _watch(self) -> None:
        """Until one has failed or all are done."""
        while self._ends:
            ready = multiprocessing.connection.wait(list(self._ends))
            # The first to fail is the cause; others fail later in an all-reduce without it.
            outcomes = filter(None, map(self._read_outcome, ready))
            if failures := sorted(outcomes, key=lambda outcome: outcome[0]):
                self._set_failure(failures[0][1])
                return

    def _read_outcome(self, end: Any) -> tuple[float, Exception] | None:  # noqa: ANN401
        """When and how a follower failed."""
        rank = self._ends.pop(end)
        try:
            when, error = end.recv()
        except EOFError:
            return 0.0, self._died(rank)
        except Exception as unreadable:  # noqa: BLE001  whatever it is, the follower has failed
            return 0.0, unreadable
        return None if error is None else (when, error)

    def _died(self, rank: int, how: str = "") -> RuntimeError:
        if not how:
            process = self._processes[rank - 1]
            process.join(_REPORT_SECONDS)
            code = process.exitcode
            how = f"ended with exit code {code}"
            if code is not None and code < 0:
                how = f"was ended by signal {-code} ({signal.strsignal(-code)})"
        return RuntimeError(
            f"the process that shared a training on {self._devices[rank]} {how}; if it said why, "
            "its error output has it"
        )

    def _set_failure(self, error: Exception) -> None:
        with self._lock:
            if self._over:  # ended on purpose
                return
            self._failure = error
            self._failed.set()
            _abort_all_reduce()


def _abort_all_reduce() -> None:
    """Abort this process' NCCL operations; gloo's end by themselves with the connection."""
    if dist.is_initialized() and dist.get_backend() == "nccl":
        dist.group.WORLD.abort()  # type: ignore[union-attr]


def _about_to_join(rank: int) -> str:
    return f"about to join {rank}"


@contextlib.contextmanager
def _joined(
    store: Any,  # noqa: ANN401  a dist.Store, which torch's stubs lack
    rank: int,
    devices: Sequence[torch.device],
    raise_peer_error: Callable[[], None] = _no_followers,
) -> Iterator[Team]:
    on_gpus = devices[rank].type == "cuda"
    if on_gpus:
        torch.cuda.set_device(devices[rank])
    else:
        # Otherwise gloo resolves this machine's host name, which may fail.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    first = torch.zeros(1, device=devices[rank])
    store.set(_about_to_join(rank), "")
    dist.init_process_group(
        "nccl" if on_gpus else "gloo",
        store=store,
        rank=rank,
        world_size=len(devices),
        timeout=PATIENCE,
    )
    try:
        # NCCL connects in its first operation, which cannot be aborted: do it before all else.
        dist.all_reduce(first)
        yield Team(rank, len(devices), store, raise_peer_error)
    except BaseException:
        # NCCL would wait for the others, which wait in an all-reduce.
        with contextlib.suppress(RuntimeError):
            _abort_all_reduce()
        raise
    finally:
        dist.destroy_process_group()


def _follow(
    leader: int,
    outcome: Any,  # noqa: ANN401  a Connection
    port: int,
    rank: int,
    devices: Sequence[torch.device],
    threads: int,
    deterministic: bool,
    follow: Follow,
    job: object,
) -> None:
    _end_with(leader)
    # Ctrl-C reaches the whole process group; the leader ends its followers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.ExitStack() as group, _report_outcome(outcome, devices[rank]):
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        store = dist.TCPStore(_HOST, port, len(devices), is_master=False)  # type: ignore[attr-defined]
        follow(group.enter_context(_joined(store, rank, devices)), devices[rank], job)


def _end_with(leader: int) -> None:
    """End this process when the leader's ends, even if killed.

    The kernel watches the thread that started this process; it stays in ``team_of`` for longer.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != leader:  # it ended before
        os._exit(1)


@contextlib.contextmanager
def _report_outcome(
    outcome: Any,  # noqa: ANN401  a Connection
    device: torch.device,
) -> Iterator[None]:
    """Report to the leader how the block ends, before an all-reduce fails without this process."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  it is raised in the leader
        outcome.send((time.monotonic(), portable(error, f"on {device}")))
        if device.type == "cuda":
            # Let the leader end this process: if NCCL sees it end first, it kills the leader.
            time.sleep(_END_SECONDS)
        os._exit(1)  # leaving the group would wait for the others
    outcome.send((time.monotonic(), None))
