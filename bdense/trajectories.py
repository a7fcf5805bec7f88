"""Teacher trajectories: computed live, or recorded once and shared by every trial.

Teacher evaluations are two thirds of an SFD iteration and do not depend on the branch weights.
A store holds, for each iteration, the states that students are supervised on; the noise they
start from comes back from its seed.

R recorded rows, B batch, C channels, H x W pixels, N student intervals, K sub-steps.
"""

import functools
import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bdense import NUMERICS
from bdense.checkpoints import denoiser_sha256
from bdense.denoiser import NetworkDenoiser
from bdense.errors import CheckpointError, InputError
from bdense.files import atomic_write, file_lock
from bdense.randomness import Stream, generator
from bdense.schedules import Schedule
from bdense.solvers import Solver, trajectory

# A shard is what a worker records at once and loses when it dies.
MAX_SHARD_BYTES = 32 * 2**20
MIN_SHARDS = 16
STORED_DTYPES = ("float32", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class IntervalGrid:
    """The student's N intervals, each cut into K teacher sub-steps.

    Attributes:
        num_intervals: N; network evaluations are N, or N - 1 with ``afs``.
        substeps: K.
        afs: The first interval is taken without the network and never trained.
    """

    num_intervals: int
    substeps: int
    afs: bool = True
    schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self) -> None:
        if self.substeps < 1:
            raise InputError(f"substeps (K) must be at least 1, got {self.substeps}")
        if self.nfe < 1:
            raise InputError(
                f"num_intervals={self.num_intervals} with afs={self.afs} leaves no network "
                "evaluation; NFE must be at least 1"
            )

    @property
    def nfe(self) -> int:
        """Network evaluations an image costs the student."""
        return self.num_intervals - (1 if self.afs else 0)

    @property
    def trained(self) -> range:
        """Intervals n that use the network."""
        return range(1 if self.afs else 0, self.num_intervals)

    @property
    def num_rows(self) -> int:
        """R, the teacher states that supervise: K for each trained interval."""
        return self.substeps * len(self.trained)

    def fine(self) -> Tensor:
        """[N * K + 1] float64: the teacher's grid."""
        return self.schedule.fine_grid(self.num_intervals, self.substeps)

    def student(self) -> Tensor:
        """[N + 1] float64: every K-th level of the teacher's grid."""
        return self.fine()[:: self.substeps]

    def interval(self, n: int) -> Tensor:
        """[K + 1] float64: t_{n,0} = t_n, ..., t_{n,K} = t_{n+1}."""
        return self.fine()[n * self.substeps : (n + 1) * self.substeps + 1]


@dataclass(frozen=True, slots=True)
class Walk:
    """One batch of trajectories.

    Attributes:
        start: [B, C, H, W] x_T = t_0 * noise, where teacher and student begin.
        states: [R, B, C, H, W] the teacher's states at the trained sub-levels, in walking order.
    """

    start: Tensor
    states: Tensor


class Trajectories(Protocol):
    """Batches by iteration, however they come about."""

    @property
    def grid(self) -> IntervalGrid:
        """The student's intervals and the teacher's sub-steps."""
        ...

    @property
    def batch(self) -> int:
        """B, trajectories an iteration."""
        ...

    def __len__(self) -> int:
        """Iterations it can serve."""
        ...

    def __getitem__(self, iteration: int) -> Walk:
        """The batch of that iteration, on the training device."""
        ...

    def describe(self) -> dict[str, Any]:
        """What its numbers depend on, JSON-able; equal descriptions serve equal batches."""
        ...


@dataclass(frozen=True, eq=False)
class LiveTrajectories:
    """The teacher walks its fine grid anew for every batch.

    Attributes:
        count: Iterations to serve.
        seed: Training seed; iteration i starts from noise (seed, i).
    """

    teacher: NetworkDenoiser
    grid: IntervalGrid
    solver: Solver
    batch: int
    count: int
    seed: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, iteration: int) -> Walk:
        if not 0 <= iteration < self.count:
            raise IndexError(iteration)
        return self.walk(self.noise(iteration))

    def noise(self, iteration: int) -> Tensor:
        """[B, C, H, W] unit noise of that iteration, on the CPU."""
        shape = (self.batch, *self.teacher.image_shape)
        return torch.randn(shape, generator=generator(self.seed, Stream.TRAJECTORY, iteration))

    def walk(self, noise: Tensor) -> Walk:
        """The teacher's walk from t_0 times this unit noise [B, C, H, W]."""
        fine = self.grid.fine()
        start = fine[0] * noise.to(next(self.teacher.parameters()))
        states = trajectory(self.solver, self.teacher, start, fine)
        return Walk(start, states[len(states) - self.grid.num_rows :])

    def describe(self) -> dict[str, Any]:
        return {
            "numerics": NUMERICS,
            "teacher": denoiser_sha256(self.teacher),
            "grid": [float(t) for t in self.grid.fine()],
            "substeps": self.grid.substeps,
            "afs": self.grid.afs,
            "solver": {"name": type(self.solver).__name__} | asdict(self.solver),  # type: ignore[call-overload]
            "batch": self.batch,
            "seed": self.seed,
        }


@dataclass(frozen=True, eq=False)
class TrajectoryStore:
    """Recorded trajectories: a folder of memory-mapped shards, each written whole by one rename.

    The folder's name is the fingerprint of all that its numbers depend on.
    """

    live: LiveTrajectories
    root: Path
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in STORED_DTYPES:
            raise InputError(
                f"trajectory dtype {self.dtype!r} is unknown; choose from {list(STORED_DTYPES)}"
            )

    @functools.cached_property
    def folder(self) -> Path:
        """Where the shards lie; its name takes a hash over the whole teacher."""
        key = self.live.describe() | {"count": self.live.count, "dtype": self.dtype}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.root / digest[:16]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """[R, B, C, H, W] of one iteration."""
        return (self.live.grid.num_rows, self.live.batch, *self.live.teacher.image_shape)

    @property
    def nbytes(self) -> int:
        """Size on disk when complete, in bytes."""
        return self.live.count * math.prod(self.row_shape) * np.dtype(self.dtype).itemsize

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

    def missing(self) -> list[int]:
        """Shards still to be recorded."""
        present = self._present()
        return [s for s in range(self.num_shards) if f"shard-{s:05d}.npy" not in present]

    def _present(self) -> set[str]:
        return {path.name for path in self.folder.glob("shard-*.npy")}

    def require_room(self, max_bytes: int | None = None) -> None:
        """Refuse before anything is computed if the rest would not fit.

        Raises:
            InputError: The store is larger than ``max_bytes``, or than the free disk space.
        """
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

    def record_shard(self, shard: int, on_iteration: Callable[[int], None] | None = None) -> None:
        """Compute one shard and write it, unless somebody has meanwhile.

        Args:
            shard: 0-based.
            on_iteration: Called with the number of iterations done in this shard.
        """
        path = self.shard_path(shard)
        with file_lock(path.with_suffix(".lock")):
            if path.exists():
                return
            first = shard * self.shard_length
            length = min(self.shard_length, self.live.count - first)
            rows = np.empty((length, *self.row_shape), self.dtype)
            for i in range(length):
                rows[i] = self.live[first + i].states.cpu().numpy()
                if on_iteration is not None:
                    on_iteration(i + 1)
            with atomic_write(path) as scratch, scratch.open("wb") as file:
                np.save(file, rows)

    def record(self, on_iteration: Callable[[int], None] | None = None) -> "RecordedTrajectories":
        """Record whatever is missing and open the store.

        Args:
            on_iteration: Called with the number of iterations recorded by this call.
        """
        self.require_room()
        done = 0
        for shard in self.missing():
            base = done

            def report(i: int, base: int = base) -> None:
                if on_iteration is not None:
                    on_iteration(base + i)

            self.record_shard(shard, report)
            done += min(self.shard_length, self.live.count - shard * self.shard_length)
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
        return RecordedTrajectories(self.live, shards, self.shard_length)

    def _map(self, shard: int) -> np.ndarray:
        path = self.shard_path(shard)
        length = min(self.shard_length, self.live.count - shard * self.shard_length)
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


@dataclass(frozen=True, eq=False)
class RecordedTrajectories:
    """A complete store, read through memory maps that all processes share."""

    live: LiveTrajectories
    shards: list[np.ndarray]
    shard_length: int

    @property
    def grid(self) -> IntervalGrid:
        """The grid it was recorded on."""
        return self.live.grid

    @property
    def batch(self) -> int:
        """B."""
        return self.live.batch

    def __len__(self) -> int:
        return self.live.count

    def __getitem__(self, iteration: int) -> Walk:
        if not 0 <= iteration < len(self):
            raise IndexError(iteration)
        shard, index = divmod(iteration, self.shard_length)
        # Copied out of the map: torch warns about read-only memory, and .to() would copy anyway.
        states = torch.from_numpy(np.array(self.shards[shard][index], dtype=np.float32))
        like = next(self.live.teacher.parameters())
        start = self.live.grid.fine()[0] * self.live.noise(iteration).to(like)
        return Walk(start, states.to(like))

    def describe(self) -> dict[str, Any]:
        stored = self.shards[0].dtype.name
        return self.live.describe() | ({} if stored == "float32" else {"dtype": stored})
