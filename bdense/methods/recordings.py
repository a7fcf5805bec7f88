"""Trajectories recorded once and shared by every trial.

Teacher evaluations are two thirds of an SFD iteration and do not depend on the branch weights.
A store holds, for each iteration, the states that students are supervised on; the noise and the
classes they start from come back from their seed.

R supervising rows of an iteration, B batch, C channels, H x W pixels.
"""

import functools
import hashlib
import itertools
import json
import math
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from bdense.diffusion.intervals import IntervalGrid
from bdense.errors import CheckpointError, InputError
from bdense.execution import moved
from bdense.files import atomic_write, file_lock
from bdense.methods.trajectories import Trajectories, TrajectoryBatch

# A shard is what a worker records at once and loses when it dies.
MAX_SHARD_BYTES = 32 * 2**20
MIN_SHARDS = 16


@dataclass(frozen=True, eq=False)
class TrajectoryStore:
    """Recorded trajectories: a folder of memory-mapped shards, each written whole by one rename.

    The folder's name is the fingerprint of all that its numbers depend on.
    """

    live: Trajectories
    root: Path
    dtype: Literal["float32", "float16"] = "float32"

    @functools.cached_property
    def folder(self) -> Path:
        """Where the shards lie; its name takes a hash over the whole teacher."""
        key = self.live.describe() | {"count": self.live.count, "dtype": self.dtype}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.root / digest[:16]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """[B, C, H, W] of one row."""
        return (self.live.batch, *self.live.teacher.image_shape)

    def rows_before(self, iteration: int) -> int:
        """Rows of all iterations before that one; before ``count``: of all."""
        grid = self.live.grid
        if isinstance(grid, IntervalGrid):
            return iteration * grid.num_rows
        return self._drawn_rows[iteration]

    @functools.cached_property
    def _drawn_rows(self) -> list[int]:
        each = (self.live.grid_at(i).num_rows for i in range(self.live.count))
        return list(itertools.accumulate(each, initial=0))

    @property
    def nbytes(self) -> int:
        """Size on disk when complete, in bytes."""
        return (
            self.rows_before(self.live.count)
            * math.prod(self.row_shape)
            * np.dtype(self.dtype).itemsize
        )

    @property
    def shard_length(self) -> int:
        """Iterations in a shard (the last may hold fewer)."""
        fit = MAX_SHARD_BYTES * self.live.count // self.nbytes
        return max(1, min(fit, -(-self.live.count // MIN_SHARDS)))

    @property
    def num_shards(self) -> int:
        """Shards of the complete store."""
        return -(-self.live.count // self.shard_length)

    def shard_path(self, shard: int) -> Path:
        """The file of that shard."""
        return self.folder / f"shard-{shard:05d}.npy"

    def iterations(self, shard: int) -> range:
        """The iterations whose rows are in that shard."""
        first = shard * self.shard_length
        return range(first, min(first + self.shard_length, self.live.count))

    def missing(self) -> list[int]:
        """Shards still to be recorded."""
        present = self._present()
        return [s for s in range(self.num_shards) if f"shard-{s:05d}.npy" not in present]

    def _present(self) -> set[str]:
        return {path.name for path in self.folder.glob("shard-*.npy")}

    def require_room(self, max_bytes: int | None = None) -> None:
        """Refuse before anything is computed if the rest would not fit."""
        gib = self.nbytes / 2**30
        if max_bytes is not None and self.nbytes > max_bytes:
            raise InputError(
                f"the trajectories need {gib:.3g} GiB and the bound is "
                f"{max_bytes / 2**30:.3g} GiB; raise trajectories.max_gib, record float16, "
                "or set trajectories.mode to live"
            )
        self.root.mkdir(parents=True, exist_ok=True)
        left = self.nbytes * (self.num_shards - len(self._present())) // self.num_shards
        free = shutil.disk_usage(self.root).free
        if left > free:
            raise InputError(
                f"the trajectories need {left / 2**30:.2f} GiB more and {self.root} has "
                f"{free / 2**30:.2f} GiB free; make room or set trajectories.mode to live"
            )

    def record_shards(self, shards: Iterable[int]) -> Iterator[int]:
        """Compute and write shards, each unless it exists by then; yields each once it does.

        One is written while the next is computed. Where no next one is asked for, the last is
        still written.
        """
        with ThreadPoolExecutor(1, "trajectory-shards") as writer:
            before: tuple[int, Future[None]] | None = None
            for shard in shards:
                path = self.shard_path(shard)
                with ExitStack() as until_computed:
                    until_computed.enter_context(file_lock(path.with_suffix(".lock")))
                    rows = None if path.exists() else self._computed(shard)
                    until_written = until_computed.pop_all()
                writing = writer.submit(_write, path, rows, until_written)
                if before is not None:
                    before[1].result()
                    yield before[0]
                before = shard, writing
            if before is not None:
                before[1].result()
                yield before[0]

    def _computed(self, shard: int) -> np.ndarray:
        iterations = self.iterations(shard)
        first = self.rows_before(iterations.start)
        shape = (self.rows_before(iterations.stop) - first, *self.row_shape)
        rows = np.empty(shape, self.dtype)
        for i in iterations:
            own = slice(self.rows_before(i) - first, self.rows_before(i + 1) - first)
            rows[own] = self.live[i].states.cpu().numpy()
        return rows

    def record(self) -> "RecordedTrajectories":
        """Record whatever is missing and open the store."""
        self.require_room()
        for _ in self.record_shards(self.missing()):
            pass
        return self.open()

    def open(self) -> "RecordedTrajectories":
        """Map the complete store.

        Raises:
            CheckpointError: A shard is missing, or its shape is not the one expected.
        """
        if missing := self.missing():
            raise CheckpointError(
                f"{len(missing)} of {self.num_shards} trajectory shards are missing in "
                f"{self.folder}; record them first"
            )
        shards = [self._map(shard) for shard in range(self.num_shards)]
        return RecordedTrajectories(**vars(self.live), store=self, shards=shards)

    def _map(self, shard: int) -> np.ndarray:
        path = self.shard_path(shard)
        iterations = self.iterations(shard)
        length = self.rows_before(iterations.stop) - self.rows_before(iterations.start)
        try:
            rows: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise CheckpointError(
                f"{path} is not a trajectory shard ({error}); delete it to record it again"
            ) from error
        expected = (length, *self.row_shape)
        if rows.shape != expected or rows.dtype != self.dtype:
            raise CheckpointError(
                f"{path} holds {rows.dtype} {rows.shape}, expected {self.dtype} {expected}; "
                "delete it to record it again"
            )
        return rows


def _write(path: Path, rows: np.ndarray | None, locked: ExitStack) -> None:
    """Write a shard, if it was computed, and give its lock back."""
    with locked:
        if rows is not None:
            with atomic_write(path) as scratch, scratch.open("wb") as file:
                np.save(file, rows)


@dataclass(frozen=True, eq=False, kw_only=True)
class RecordedTrajectories(Trajectories):
    """A complete store, read through memory maps that all processes share.

    On a GPU a thread reads the rows of the next iteration while this one trains: this process
    only launches kernels in the meantime.
    """

    store: TrajectoryStore
    shards: list[np.ndarray]
    # What is being read, by the images that are asked for.
    _next: dict[tuple[int, int], tuple[int, Future[Tensor]]] = field(
        default_factory=dict, init=False
    )

    def on(self, device: torch.device) -> Self:
        live = self.store.live.on(device)
        return replace(self, teacher=live.teacher, store=replace(self.store, live=live))

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickled, a memory map would be copied whole.
        return TrajectoryStore.open, (self.store,)

    def part(self, iteration: int, images: slice) -> TrajectoryBatch:
        grid, start, condition = self.beginning(iteration, images)
        rows = self._rows_ahead if start.is_cuda else self._rows
        states = moved(rows(iteration, images, start.device), start)
        return TrajectoryBatch(grid, start, states, condition)

    def _rows_ahead(self, iteration: int, images: slice, device: torch.device) -> Tensor:
        """As ``_rows``; the next iteration's are read while this one trains."""
        share = images.indices(self.batch)[:2]
        found = self._next.pop(share, None)
        if found is not None and found[0] == iteration:
            rows = found[1].result()
        else:  # the first, or that of a run that goes on elsewhere
            rows = self._rows(iteration, images, device)
        if iteration + 1 < len(self):
            reading = self._reader.submit(self._rows, iteration + 1, images, device)
            self._next[share] = iteration + 1, reading
        return rows

    @functools.cached_property
    def _reader(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "recorded-rows")

    def _rows(self, iteration: int, images: slice, device: torch.device) -> Tensor:
        """[R, B, C, H, W] float32 on the CPU; for a GPU, in memory that it reads by itself."""
        store = self.store
        shard = iteration // store.shard_length
        before = store.rows_before(store.iterations(shard).start)
        own = slice(
            store.rows_before(iteration) - before, store.rows_before(iteration + 1) - before
        )
        # Copied out of the map: torch warns about read-only memory, and .to() would copy anyway.
        rows = torch.from_numpy(np.array(self.shards[shard][own, images], dtype=np.float32))
        if device.type != "cuda":
            return rows
        with torch.cuda.device(device):  # which each thread has its own of
            return rows.pin_memory()

    def describe(self) -> dict[str, Any]:
        stored = {} if self.store.dtype == "float32" else {"dtype": self.store.dtype}
        return super().describe() | stored
