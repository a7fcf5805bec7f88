"""One training over several devices of a machine: each process takes its share of every batch.

torch's DistributedDataParallel averages the gradients: NCCL between GPUs, gloo between CPUs.
"""

import contextlib
import ctypes
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bdense.errors import InputError

# After this long without the others in a sum a process gives up. One that ends is missed at once.
PATIENCE = timedelta(minutes=10)
# How often those who wait for another ask whether it is done.
_ASK_SECONDS = 0.05
# Longest from the end of a process to what the leader hears of it; longest to end by itself.
_TELL_SECONDS, _END_SECONDS = 5.0, 30.0
_HOST = "127.0.0.1"
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
# What a follower does: its team, its device, and what the leader gave it.
Follow = Callable[["Team", torch.device, Any], object]


def _nobody_to_miss() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Team:
    """The processes of one training, seen from one of them.

    Attributes:
        rank: This one, counted from 0.
        size: How many.
        store: Of torch, in the leader's process; None where there is no other.
        miss: Raises what ended another process, in the leader's: sums without it hold nothing.
    """

    rank: int
    size: int
    store: Any = field(default=None, repr=False, compare=False)
    miss: Callable[[], None] = field(default=_nobody_to_miss, repr=False, compare=False)

    @classmethod
    def alone(cls) -> "Team":
        """A training in this process only."""
        return cls(0, 1)

    @property
    def leads(self) -> bool:
        """Whether this one saves and reports."""
        return self.rank == 0

    @property
    def own_index(self) -> tuple[int, ...]:
        """What sets this process' dropout apart; nothing where there is one process."""
        return () if self.size == 1 else (self.rank,)

    def share_of(self, batch: int) -> slice:
        """This process' images of a batch.

        Raises:
            InputError: The batch cannot be shared equally.
        """
        if batch % self.size:
            raise InputError(
                f"batch={batch} cannot be shared by {self.size} devices; choose a multiple"
            )
        share = batch // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with its gradients averaged over the team."""
        if self.size == 1:
            return module
        # EDM's augmentation layer has no part in distillation.
        unused = any("map_augment" in name for name, _ in module.named_parameters())
        return DistributedDataParallel(module, find_unused_parameters=unused)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the team; the same on all."""
        if self.size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total / self.size

    def while_others_wait(self, name: str, work: Callable[[], object]) -> None:
        """The leader's work, however long it takes; the others do none of it.

        They wait in no sum, which ``PATIENCE`` would end. One that dies meanwhile is missed after
        the work.

        Args:
            name: Of the work; another one each time.
            work: Called by the leader; what it raises, it raises.
        """
        if self.leads:
            work()
            if self.size > 1:
                self.store.set(name, "done")
            return
        while not self.store.check([name]):
            time.sleep(_ASK_SECONDS)


@contextlib.contextmanager
def team_of(devices: Sequence[torch.device], follow: Follow, job: object) -> Iterator[Team]:
    """Lead a team of one process for each device: this one on the first, new ones on the others.

    None of them outlives the block, however this process ends, on Linux at least. What one of
    them raises ends the block here too, with that error; one that dies, with a ``RuntimeError``.

    Args:
        devices: All of one kind.
        follow: A function of a module, run in each new process.
        job: What it is given; it travels by pickle.

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
    # Blame is laid before the group is left, which ends the sums that the others wait in.
    with followers, contextlib.ExitStack() as group, followers.blamed():
        followers.start(follow, job)
        yield group.enter_context(_joined(store, 0, devices, followers.miss))
        followers.wait()


class _Followers:
    """The processes of a team beside the leader's, and what the first that fails raised.

    A thread watches them: NCCL's sums wait for a process that has ended as for any other, and the
    leader in them.
    """

    def __init__(
        self,
        devices: Sequence[torch.device],
        store: Any,  # noqa: ANN401  a dist.Store, which torch's stubs lack
    ) -> None:
        self._devices = tuple(devices)
        self._store = store
        self._processes: list[Any] = []
        # By the end of a pipe at which each tells how it ended, its rank.
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
        """Start them, and return once each is about to enter the group.

        torch would wait for ``PATIENCE`` there for one that never comes.
        """
        context = torch.multiprocessing.get_context("spawn")
        settings = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
        for rank in range(1, len(self._devices)):
            end, outcome = context.Pipe(duplex=False)
            given = (os.getpid(), outcome, self._store.port, rank, self._devices, *settings)
            # A daemon: the interpreter does not wait for it where it ends inside the block.
            process = context.Process(target=_follow, args=(*given, follow, job), daemon=True)
            try:
                process.start()
            except BrokenPipeError as error:  # it was still being told what to do
                raise self._died(rank, "ended while it started") from error
            finally:
                outcome.close()
            self._processes.append(process)
            self._ends[end] = rank
        self._watcher.start()
        names = [_about_to_join(rank) for rank in range(1, len(self._devices))]
        last = time.monotonic() + PATIENCE.total_seconds()
        while not self._store.check(names):
            self.miss()
            if time.monotonic() > last:
                raise RuntimeError(f"the processes of a training did not start in {PATIENCE}")
            time.sleep(_ASK_SECONDS)

    def miss(self) -> None:
        """Raise what the first raised that failed."""
        if self._failure is not None:
            raise self._failure

    def wait(self) -> None:
        """Until each has done its part; raises as ``miss``."""
        self._watcher.join()
        self.miss()

    @contextlib.contextmanager
    def blamed(self) -> Iterator[None]:
        """A block that ends by what a follower raised, not by what came of that here.

        A sum without it raises another error, or ends with numbers that make one.
        """
        try:
            yield
        except Exception as error:
            # Its connection ends after it told, and is a RuntimeError here.
            self._failed.wait(_TELL_SECONDS if isinstance(error, RuntimeError) else 0)
            if self._failure is not None and self._failure is not error:
                raise self._failure from error
            raise
        finally:
            with self._lock:
                self._over = True

    def _watch(self) -> None:
        """Until one has failed, or all have told that they are done."""
        while self._ends:
            ready = multiprocessing.connection.wait(list(self._ends))
            # One that misses another in a sum tells of that later than the other.
            failures = sorted(filter(None, map(self._told, ready)), key=lambda told: told[0])
            if failures:
                self._fail(failures[0][1])
                return

    def _told(self, end: Any) -> tuple[float, Exception] | None:  # noqa: ANN401
        """When a follower failed, and by what."""
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
            process.join(_TELL_SECONDS)
            code = process.exitcode
            how = f"ended with exit code {code}"
            if code is not None and code < 0:
                how = f"was ended by signal {-code} ({signal.strsignal(-code)})"
        return RuntimeError(
            f"the process that shared a training on {self._devices[rank]} {how}; if it said why, "
            "its error output has it"
        )

    def _fail(self, error: Exception) -> None:
        with self._lock:
            if self._over:  # it was ended, or has nobody to share with any more
                return
            self._failure = error
            self._failed.set()
            _end_sums()


def _end_sums() -> None:
    """Have the sums that this process waits in end, without a result.

    Of NCCL alone: gloo's end by themselves with the connection.
    """
    if dist.is_initialized() and dist.get_backend() == "nccl":
        dist.group.WORLD.abort()  # type: ignore[union-attr]


def _about_to_join(rank: int) -> str:
    return f"about to join {rank}"


@contextlib.contextmanager
def _joined(
    store: Any,  # noqa: ANN401  a dist.Store, which torch's stubs lack
    rank: int,
    devices: Sequence[torch.device],
    miss: Callable[[], None] = _nobody_to_miss,
) -> Iterator[Team]:
    on_gpus = devices[rank].type == "cuda"
    if on_gpus:
        torch.cuda.set_device(devices[rank])
    else:
        # Gloo looks this machine's name up otherwise, which not every machine can.
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
        # NCCL connects in its first sum, which cannot be ended: before anything that may fail.
        dist.all_reduce(first)
        yield Team(rank, len(devices), store, miss)
    except BaseException:
        # NCCL would wait for the others, who wait in a sum.
        with contextlib.suppress(RuntimeError):
            _end_sums()
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
    # Ctrl-C reaches the whole group; the leader ends its followers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.ExitStack() as group, _telling(outcome, devices[rank]):
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        store = dist.TCPStore(_HOST, port, len(devices), is_master=False)  # type: ignore[attr-defined]
        follow(group.enter_context(_joined(store, rank, devices)), devices[rank], job)


def _end_with(leader: int) -> None:
    """Have this process end with the leader's, by whatever that is ended.

    The kernel means the thread that started this one, which stays in ``team_of`` for longer.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != leader:  # it ended before
        os._exit(1)


@contextlib.contextmanager
def _telling(
    outcome: Any,  # noqa: ANN401  a Connection
    device: torch.device,
) -> Iterator[None]:
    """Tell the leader how the block ends, before anybody can miss this process in a sum."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  it is raised in the leader
        outcome.send((time.monotonic(), _portable(error, device)))
        if device.type == "cuda":
            # The leader ends this process. Where NCCL sees it end first, it ends the leader.
            time.sleep(_END_SECONDS)
        os._exit(1)  # to leave the group would be to wait for the others
    outcome.send((time.monotonic(), None))


def _portable(error: Exception, device: torch.device) -> Exception:
    """It, or the same words in the nearest of its base classes that travels by pickle."""
    where = f"on {device}:\n{''.join(traceback.format_exception(error))}"
    for kind in type(error).__mro__:
        with contextlib.suppress(Exception):
            found: Exception = error if kind is type(error) else kind(str(error))
            found.add_note(where)
            pickle.loads(pickle.dumps(found))  # noqa: S301  bytes of its own
            return found
    raise AssertionError("an Exception travels")
