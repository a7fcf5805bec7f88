"""One training over several devices of a machine: each process takes its share of every batch.

torch's DistributedDataParallel averages the gradients: NCCL between GPUs, gloo between CPUs.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bdense.errors import InputError

# After this long without the others in a sum a process gives up: one of them died.
PATIENCE = timedelta(minutes=10)
# How often those who wait for the leader ask whether it is done.
_ASK_SECONDS = 0.05
_HOST = "127.0.0.1"
# What a follower does: its team, its device, and what the leader gave it.
Follow = Callable[["Team", torch.device, Any], object]


@dataclass(frozen=True, slots=True)
class Team:
    """The processes of one training, seen from one of them.

    Attributes:
        rank: This one, counted from 0.
        size: How many.
        store: Of torch, in the leader's process; None where there is no other.
    """

    rank: int
    size: int
    store: Any = field(default=None, repr=False, compare=False)

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

        They wait in no sum, which ``PATIENCE`` would end. Where the leader dies its store is gone,
        and so are they.

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
    context = torch.multiprocessing.get_context("spawn")
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    followers = [
        context.Process(
            target=_follow,
            args=(store.port, rank, tuple(devices), threads, deterministic, follow, job),
            daemon=True,  # never outlives the leader
        )
        for rank in range(1, len(devices))
    ]
    for process in followers:
        process.start()
    try:
        with _joined(store, 0, devices) as team:
            yield team
        for process in followers:
            process.join()
    finally:
        for process in followers:
            process.terminate()


@contextlib.contextmanager
def _joined(
    store: Any,  # noqa: ANN401  a dist.Store, which torch's stubs lack
    rank: int,
    devices: Sequence[torch.device],
) -> Iterator[Team]:
    on_gpus = devices[rank].type == "cuda"
    if on_gpus:
        torch.cuda.set_device(devices[rank])
    else:
        # Gloo looks this machine's name up otherwise, which not every machine can.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "nccl" if on_gpus else "gloo",
        store=store,
        rank=rank,
        world_size=len(devices),
        timeout=PATIENCE,
    )
    try:
        yield Team(rank, len(devices), store)
    finally:
        dist.destroy_process_group()


def _follow(
    port: int,
    rank: int,
    devices: Sequence[torch.device],
    threads: int,
    deterministic: bool,
    follow: Follow,
    job: object,
) -> None:
    # Ctrl-C reaches the whole group; the leader ends its followers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    store = dist.TCPStore(_HOST, port, len(devices), is_master=False)  # type: ignore[attr-defined]
    with _joined(store, rank, devices) as team:
        follow(team, devices[rank], job)
