"""A training's checkpoint: when one is due, what is in it, and how one goes on from it."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.models.store import resume_training, save_training
from bdense.weights.weighting import BranchWeighting

# The prefix of the learned weights' tensors.
_WEIGHTING = "weighting."


class Keeper:
    """A run's checkpoint.

    Args:
        path: The file; None keeps nothing.
        kind: Which training it is of.
        student, optimizer: What is kept.
        identity: What must agree for it to be the same run, JSON-able and flat.
        seconds: A save is due this long after the last.
        weighting: Kept too, where weights learn.
        writes: Whether this process does; each reads.
        on_save: Called after each save with the iterations done.
    """

    def __init__(
        self,
        path: Path | None,
        kind: str,
        student: NetworkDenoiser,
        optimizer: torch.optim.Optimizer,
        identity: Mapping[str, Any],
        *,
        seconds: float,
        weighting: BranchWeighting | None = None,
        writes: bool = True,
        on_save: Callable[[int], None] | None = None,
    ) -> None:
        self._path = path
        self._kind = kind
        self._student = student
        self._optimizer = optimizer
        self._identity = identity
        self._seconds = seconds
        self._weighting = weighting
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
        state = self._weighting.state() if self._weighting is not None else {}
        learned = {_WEIGHTING + name: value for name, value in state.items()}
        save_training(
            self._path, self._kind, self._student, self._optimizer, done, self._identity, learned
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
            self._path, self._kind, self._student, self._optimizer, self._identity
        )
        device = next(self._student.parameters()).device
        if tensors and self._weighting is not None:
            self._weighting.restore(
                {
                    name.removeprefix(_WEIGHTING): value.to(device)
                    for name, value in tensors.items()
                    if name.startswith(_WEIGHTING)
                }
            )
        self._last = time.monotonic()
        return iteration
