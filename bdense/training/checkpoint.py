"""A training's checkpoint: when one is due, what is in it, how a run resumes from it."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.models.store import resume_training, save_training
from bdense.training.stage import Training
from bdense.weights.weighting import BranchWeighting

# Prefixes of tensors beside the student's and the optimiser's.
_WEIGHTING, _AVERAGE, _STAGE = "weighting.", "ema.", "stage."


class TrainingCheckpoint:
    """The state of one run in a file.

    Args:
        path: The file; None keeps nothing.
        stage, weighting, student, optimizer, average: What is kept; ``average`` is None where the
            student's weights are not averaged.
        identity: What must agree for it to be the same run, JSON-able and flat.
        seconds: A save is due this long after the last.
        writes: Whether this process writes; every process reads.
        on_save: Called after each save with the iterations done.
    """

    def __init__(
        self,
        path: Path | None,
        stage: Training,
        weighting: BranchWeighting,
        student: NetworkDenoiser,
        optimizer: torch.optim.Optimizer,
        average: nn.Module | None,
        identity: Mapping[str, Any],
        *,
        seconds: float,
        writes: bool = True,
        on_save: Callable[[int], None] | None = None,
    ) -> None:
        self._path = path
        self._kind = f"{stage.kind}-training"
        self._stage = stage
        self._weighting = weighting
        self._student = student
        self._optimizer = optimizer
        self._average = average
        # As JSON gives it back, where a tuple is a list.
        self._identity = json.loads(json.dumps(identity))
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
        extra = _prefixed(_WEIGHTING, self._weighting.state())
        extra |= _prefixed(_STAGE, self._stage.state())
        if self._average is not None:
            extra |= _prefixed(_AVERAGE, self._average.state_dict())
        save_training(
            self._path, self._kind, self._student, self._optimizer, done, self._identity, extra
        )
        self._last = time.monotonic()
        if self._on_save is not None:
            self._on_save(done)

    def resume(self) -> int:
        """Load a saved run, if there is one, and return the iteration at which it resumes.

        Raises:
            CheckpointError: The file belongs to another run.
        """
        if self._path is None:
            return 0
        iteration, tensors = resume_training(
            self._path, self._kind, self._student, self._optimizer, self._identity
        )
        if tensors:
            device = next(self._student.parameters()).device
            self._weighting.restore(_of(_WEIGHTING, tensors, device))
            self._stage.restore(_of(_STAGE, tensors, device))
            if self._average is not None:
                self._average.load_state_dict(_of(_AVERAGE, tensors, device))
        self._last = time.monotonic()
        return iteration


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in tensors.items()}


def _of(prefix: str, tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value.to(device)
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
