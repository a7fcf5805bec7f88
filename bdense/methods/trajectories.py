"""Teacher trajectories: the states that students are supervised on, computed live.

R supervising rows, B batch, C channels, H x W pixels.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from bdense import NUMERICS
from bdense.diffusion.conditions import Condition, Conditions
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.guidance import null_for
from bdense.diffusion.intervals import IntervalGrid, VariableGrid
from bdense.diffusion.solvers import Solver, analytical_first_step, trajectory
from bdense.execution import moved
from bdense.models.store import denoiser_sha256
from bdense.randomness import Stream, generator


@dataclass(frozen=True, slots=True)
class TrajectoryBatch:
    """One batch of trajectories.

    Attributes:
        grid: The intervals that were walked.
        start: [B, C, H, W] x_T = t_0 * noise, where teacher and student begin.
        states: [R, B, C, H, W] the teacher's states at the trained sub-levels, in walking order.
    """

    grid: IntervalGrid
    start: Tensor
    states: Tensor
    condition: Condition


@dataclass(frozen=True, eq=False)
class Trajectories:
    """The teacher walks its fine grid anew for every batch.

    Attributes:
        count: Iterations to serve.
        seed: Training seed; noise and classes of iteration i follow from (seed, i).
        teacher_afs: The teacher's first sub-step is analytical too: for a teacher that is itself
            a student distilled with AFS (SFD's second stage).
        guidance: Of the teacher's walk.
    """

    teacher: NetworkDenoiser
    grid: IntervalGrid | VariableGrid
    solver: Solver
    batch: int
    count: int
    seed: int
    conditions: Conditions
    teacher_afs: bool = False
    guidance: float = 1.0

    def __post_init__(self) -> None:
        self.teacher.require_levels(self.grid.schedule)
        null_for(self.guidance, self.conditions)  # refuses what cannot be guided

    def __len__(self) -> int:
        """Iterations it can serve."""
        return self.count

    def __getitem__(self, iteration: int) -> TrajectoryBatch:
        """The batch of that iteration, on the training device."""
        return self.part(iteration, slice(None))

    def part(self, iteration: int, images: slice) -> TrajectoryBatch:
        """Some images of that batch, as a process of several takes its share."""
        grid, start, condition = self.beginning(iteration, images)
        return TrajectoryBatch(grid, start, self._states(grid, start, condition), condition)

    def beginning(self, iteration: int, images: slice) -> tuple[IntervalGrid, Tensor, Condition]:
        """Start of an iteration: grid, x_T [B, C, H, W] and condition."""
        if not 0 <= iteration < self.count:
            raise IndexError(iteration)
        grid, like = self.grid_at(iteration), next(self.teacher.parameters())
        start = grid.fine()[0] * moved(self.noise(iteration)[images], like)
        return grid, start, self.condition(iteration).part(images).to(like)

    def grid_at(self, iteration: int) -> IntervalGrid:
        """The intervals of that iteration."""
        return self.grid.at(iteration, self.seed)

    def noise(self, iteration: int) -> Tensor:
        """[B, C, H, W] unit noise of that iteration, on the CPU."""
        shape = (self.batch, *self.teacher.image_shape)
        return torch.randn(shape, generator=generator(self.seed, Stream.TRAJECTORY, iteration))

    def condition(self, iteration: int) -> Condition:
        """Of the batch of that iteration, on the CPU."""
        return self.conditions.drawn(self.seed, iteration, self.batch)

    def on(self, device: torch.device) -> Self:
        """The same, with the teacher and the batches on another device."""
        return replace(self, teacher=self.teacher.on(device))

    def _states(self, grid: IntervalGrid, start: Tensor, condition: Condition) -> Tensor:
        """The teacher's walk from ``start``: [R, B, C, H, W]."""
        fine = grid.fine()
        null = null_for(self.guidance, self.conditions, like=start)
        denoise = self.teacher.given(
            condition, num_points=len(fine), guidance=self.guidance, null=null
        )
        if self.teacher_afs:
            denoise = analytical_first_step(denoise, fine[0])
        states = trajectory(self.solver, denoise, start, fine)
        return states[len(states) - grid.num_rows :]

    def describe(self) -> dict[str, Any]:
        """What its numbers depend on, as JSON values; equal descriptions serve equal batches."""
        return {
            "numerics": NUMERICS,
            "teacher": denoiser_sha256(self.teacher),
            "teacher_afs": self.teacher_afs,
            "precision": self.teacher.execution.precision,
            "grid": self.grid.describe(),
            "solver": {"name": type(self.solver).__name__} | asdict(self.solver),  # type: ignore[call-overload]
            "batch": self.batch,
            "seed": self.seed,
            **self.conditions.describe(),
            **({} if self.guidance == 1 else {"guidance": self.guidance}),
        }
