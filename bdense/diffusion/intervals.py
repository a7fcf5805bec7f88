"""The student's intervals and the teacher's sub-steps in them; their number may vary by batch.

N student intervals, K sub-steps of the teacher in each.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bdense.diffusion.schedules import Schedule
from bdense.randomness import Stream, generator


@dataclass(frozen=True, slots=True, kw_only=True)
class IntervalGrid:
    """The student's N intervals, each cut into K teacher sub-steps.

    Attributes:
        afs: The first interval is taken without the network and never trained.
    """

    num_intervals: int
    substeps: int
    afs: bool = True
    schedule: Schedule = field(default_factory=Schedule)

    @property
    def nfe(self) -> int:
        """Network evaluations an image costs the student."""
        return self.num_intervals - (1 if self.afs else 0)

    @property
    def num_points(self) -> int:
        """N + 1, the step condition."""
        return self.num_intervals + 1

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
        return self.schedule.grid(self.num_intervals * self.substeps)

    def student(self) -> Tensor:
        """[N + 1] float64: every K-th level of the teacher's grid."""
        return self.fine()[:: self.substeps]

    def interval(self, n: int) -> Tensor:
        """[K + 1] float64: t_{n,0} = t_n, ..., t_{n,K} = t_{n+1}."""
        return self.fine()[n * self.substeps : (n + 1) * self.substeps + 1]

    def at(self, iteration: int, seed: int) -> "IntervalGrid":
        """This grid, in every iteration."""
        return self

    def describe(self) -> dict[str, Any]:
        return {
            "levels": [float(t) for t in self.fine()],
            "substeps": self.substeps,
            "afs": self.afs,
        }


@dataclass(frozen=True, slots=True)
class VariableGrid:
    """SFD-v: one student for several NFE, N drawn for each batch (Zhou et al. 2024).

    Attributes:
        grids: One for each N, of one schedule, each as likely.
    """

    grids: tuple[IntervalGrid, ...]

    @property
    def schedule(self) -> Schedule:
        """Of all grids."""
        return self.grids[0].schedule

    def at(self, iteration: int, seed: int) -> IntervalGrid:
        """The grid of that iteration; it depends on (seed, iteration) alone."""
        draw = generator(seed, Stream.INTERVALS, iteration)
        return self.grids[int(torch.randint(len(self.grids), (), generator=draw))]

    def describe(self) -> dict[str, Any]:
        return {"drawn": [grid.describe() for grid in self.grids]}
