"""A distillation beside its method: what fits together, where it is kept, when it is looked at."""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bdense.checkpoints import denoiser_sha256, resume_training, save_training
from bdense.denoiser import NetworkDenoiser
from bdense.errors import InputError
from bdense.intervals import VariableGrid
from bdense.parallel import Team
from bdense.trajectories import Trajectories
from bdense.weighting import BranchWeighting

# What a checkpoint is of, and the prefix of the learned weights' tensors in it.
_KIND, _WEIGHTING = "sfd-training", "weighting."


@dataclass(frozen=True, slots=True)
class Looks:
    """When a student is looked at while it learns, and by whom; training takes no notice.

    Attributes:
        after: Numbers of iterations, each from 1 to one less than all.
        look: Called after so many, with that number and branch K as ``export_branch`` makes it, in
            eval mode: a copy. What it raises ends the run. A run that is resumed just there is
            looked at again.
    """

    after: Collection[int]
    look: Callable[[int, NetworkDenoiser], None]

    def on_the_way(self, iterations: int) -> frozenset[int]:
        """``after``, of a run of that many iterations.

        Raises:
            InputError: One is not on its way.
        """
        after = frozenset(self.after)
        if beyond := sorted(number for number in after if not 0 < number < iterations):
            raise InputError(
                f"looks after {beyond} iterations lie outside 1..{iterations - 1}: on the way of "
                f"{iterations} iterations"
            )
        return after


def require_fitting(
    trajectories: Trajectories,
    weighting: BranchWeighting,
    start: NetworkDenoiser,
    *,
    num_branches: int,
    images: int,
    iterations: int,
) -> None:
    """Refuse parts that make no run together.

    Raises:
        InputError: Branches, weights, trajectories and the network do not fit together.
    """
    grid, available = trajectories.grid, len(trajectories)
    if isinstance(grid, VariableGrid) and not start.step_condition:
        raise InputError(
            f"a student for several numbers of intervals {list(grid.num_intervals)} is told "
            "which; start it from with_step_condition(teacher, seed=...)"
        )
    if weighting.needs_gradients and start.execution.compile:
        # A compiled graph hands out no tensor from its middle that gradients can be asked for.
        raise InputError(
            "weights learned by gradient norms need the input of the network's head, which a "
            "compiled network hides; drop compile, or learn them by the rule uncertainty"
        )
    if num_branches not in (1, grid.substeps):
        raise InputError(
            f"num_branches={num_branches} fits neither plain SFD (1) nor the teacher's "
            f"sub-steps (substeps={grid.substeps})"
        )
    if weighting.num_branches != num_branches:
        raise InputError(
            f"there are {weighting.num_branches} branch weights for "
            f"num_branches={num_branches}; give one for each branch"
        )
    if iterations > available:
        raise InputError(
            f"{images} images make {iterations} iterations, and the trajectories hold "
            f"{available}; record more or train on fewer images"
        )


def run_identity(
    config: Mapping[str, Any],
    weighting: BranchWeighting,
    trajectories: Trajectories,
    start: NetworkDenoiser,
    perceptual: Mapping[str, Any] | None,
    team: Team,
) -> dict[str, Any]:
    """What must agree for a checkpoint to be the same run, one level deep."""
    fields = {f"config.{name}": value for name, value in config.items()}
    fields["config.betas"] = list(config["betas"])
    served = {f"trajectories.{name}": value for name, value in trajectories.describe().items()}
    fields["start"] = denoiser_sha256(start)
    if perceptual is not None:
        fields["perceptual"] = dict(perceptual)
    if team.size > 1:
        # Each device draws dropout of its own.
        fields["devices"] = team.size
    return {"weights": weighting.describe(), **fields, **served}


class Keeper:
    """A run's checkpoint.

    Args:
        path: The file; None keeps nothing.
        student, optimizer, weighting: What is kept.
        identity: Of ``run_identity``.
        seconds: A save is due this long after the last.
        writes: Whether this process does; each reads.
        on_save: Called after each save with the iterations done.
    """

    def __init__(
        self,
        path: Path | None,
        student: NetworkDenoiser,
        optimizer: torch.optim.Optimizer,
        weighting: BranchWeighting,
        identity: Mapping[str, Any],
        *,
        seconds: float,
        writes: bool,
        on_save: Callable[[int], None] | None,
    ) -> None:
        self._path = path
        self._student = student
        self._optimizer = optimizer
        self._weighting = weighting
        self._identity = identity
        self._seconds = seconds
        self._writes = writes
        self._on_save = on_save
        self._last = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether the last save, or the start, is long ago."""
        return time.monotonic() - self._last >= self._seconds

    def save(self, done: int) -> None:
        """Keep the run as it is after so many iterations."""
        if self._path is None or not self._writes:
            return
        learned = {_WEIGHTING + name: value for name, value in self._weighting.state().items()}
        save_training(
            self._path, _KIND, self._student, self._optimizer, done, self._identity, learned
        )
        self._last = time.monotonic()
        if self._on_save is not None:
            self._on_save(done)

    def resume(self) -> int:
        """Load a saved run, if there is one, and say at which iteration it goes on.

        Raises:
            CheckpointError: The file is of another run.
        """
        if self._path is None:
            return 0
        iteration, tensors = resume_training(
            self._path, _KIND, self._student, self._optimizer, self._identity
        )
        device = next(self._student.parameters()).device
        if tensors:
            self._weighting.restore(
                {
                    name.removeprefix(_WEIGHTING): value.to(device)
                    for name, value in tensors.items()
                    if name.startswith(_WEIGHTING)
                }
            )
        self._last = time.monotonic()
        return iteration
