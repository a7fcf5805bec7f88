"""A training's checkpoint: when one is due, what is in it, how a run resumes from it."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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


@dataclass(eq=False, kw_only=True)
class TrainingCheckpoint:
    """The state of one run in a file.

    Attributes:
        path: The file; None keeps nothing.
        average: The average of the student's weights; None without one.
        identity: What must agree for it to be the same run; JSON-able, flat.
        seconds: A save is due this long after the last.
        writes: Whether this process writes; every process reads.
        on_save: Called after each save with the iterations done.
    """

    path: Path | None
    stage: Training
    weighting: BranchWeighting
    student: NetworkDenoiser
    optimizer: torch.optim.Optimizer
    average: nn.Module | None
    identity: Mapping[str, Any]
    seconds: float
    writes: bool
    on_save: Callable[[int], None] | None

    def __post_init__(self) -> None:
        # As JSON returns it, where a tuple is a list.
        self.identity = json.loads(json.dumps(self.identity))
        self._kind = f"{self.stage.kind}-training"
        self._last = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether it is time for a save."""
        return time.monotonic() - self._last >= self.seconds

    def save(self, done: int) -> None:
        """Save the run after so many iterations."""
        if self.path is None or not self.writes:
            return
        extra = _prefixed(_WEIGHTING, self.weighting.state())
        extra |= _prefixed(_STAGE, self.stage.state())
        if self.average is not None:
            extra |= _prefixed(_AVERAGE, self.average.state_dict())
        save_training(
            self.path, self._kind, self.student, self.optimizer, done, self.identity, extra
        )
        self._last = time.monotonic()
        if self.on_save is not None:
            self.on_save(done)

    def resume(self) -> int:
        """Load a saved run, if there is one, and return the iteration at which it resumes.

        Raises:
            CheckpointError: The file belongs to another run.
        """
        if self.path is None:
            return 0
        iteration, tensors = resume_training(
            self.path, self._kind, self.student, self.optimizer, self.identity
        )
        if tensors:
            device = next(self.student.parameters()).device
            self.weighting.restore(_of(_WEIGHTING, tensors, device))
            self.stage.restore(_of(_STAGE, tensors, device))
            if self.average is not None:
                self.average.load_state_dict(_of(_AVERAGE, tensors, device))
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
