"""A training's checkpoint: when one is due, what is in it, how a run resumes from it."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.errors import CheckpointError
from bdense.files import plain_json
from bdense.models.store import load_tensors, save_tensors
from bdense.training.stage import Training
from bdense.weights.weighting import BranchWeighting

# Prefixes of tensors beside the student's and the optimiser's.
_WEIGHTING, _AVERAGE, _STAGE = "weighting.", "ema.", "stage."
_ADAM = ("step", "exp_avg", "exp_avg_sq")


@dataclass(eq=False, kw_only=True)
class TrainingCheckpoint:
    """The state of one run in a file.

    Attributes:
        path: The file; None keeps nothing.
        identity: What must agree for it to be the same run, as JSON values, flat.
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
        self.identity = plain_json(self.identity)
        self._kind = f"{self.stage.kind}-training"
        self._saves = self.writes and self.path is not None
        self._last = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether it is time for a save by this process."""
        return self._saves and time.monotonic() - self._last >= self.seconds

    def save(self, done: int) -> None:
        """Save the run after so many iterations."""
        if not self._saves:
            return
        assert self.path is not None
        tensors = self._trained(self.student) | self._adam()
        tensors |= _prefixed(_WEIGHTING, self.weighting.state())
        tensors |= _prefixed(_STAGE, self.stage.state())
        if self.average is not None:
            tensors |= _prefixed(_AVERAGE, self._trained(self.average))
        metadata = {"kind": self._kind, "iteration": done, "identity": self.identity}
        save_tensors(self.path, tensors, metadata)
        self._last = time.monotonic()
        if self.on_save is not None:
            self.on_save(done)

    def resume(self) -> int:
        """Load a saved run, if there is one, and return the iteration at which it resumes.

        Raises:
            CheckpointError: The file belongs to another run.
        """
        if self.path is None or not Path(self.path).exists():
            return 0
        tensors, metadata = load_tensors(self.path)
        stored, own = metadata.get("identity", {}), self.identity
        differing = sorted(k for k in stored.keys() | own.keys() if stored.get(k) != own.get(k))
        if metadata.get("kind") != self._kind or differing:
            raise CheckpointError(
                f"{self.path} belongs to another run (differs in: "
                f"{', '.join(differing) or 'kind'}); give this run a folder of its own or delete "
                "the file"
            )
        self._load(self.student, tensors)
        self._restore_adam(tensors)
        device = next(self.student.parameters()).device
        self.weighting.restore(_of(_WEIGHTING, tensors, device))
        self.stage.restore(_of(_STAGE, tensors, device))
        if self.average is not None:
            self._load(self.average, _of(_AVERAGE, tensors, device))
        self._last = time.monotonic()
        return int(metadata["iteration"])

    def _trained(self, network: nn.Module) -> dict[str, Tensor]:
        """The state without the weights that are frozen, which the stage starts with."""
        frozen = {
            name
            for name, parameter in self.student.named_parameters()
            if not parameter.requires_grad
        }
        return {name: each for name, each in network.state_dict().items() if name not in frozen}

    def _load(self, network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        kept = {name: tensors[name] for name in self._trained(network)}
        network.load_state_dict(network.state_dict() | kept)

    def _adam(self) -> dict[str, Tensor]:
        """Adam's moments and step counts by parameter name."""
        state = self.optimizer.state
        return {
            f"adam.{kind}.{name}": state[parameter][kind]
            for name, parameter in self.student.named_parameters()
            if parameter in state
            for kind in _ADAM
        }

    def _restore_adam(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self.student.named_parameters():
            if f"adam.step.{name}" not in tensors:
                continue
            step, *moments = (tensors[f"adam.{kind}.{name}"] for kind in _ADAM)
            # The moments need the parameter's memory layout, which a file does not keep: fused
            # Adam pairs them by their place in memory.
            like = torch.empty_like(parameter, dtype=torch.float32, requires_grad=False)
            first, second = (like.clone().copy_(moment) for moment in moments)
            self.optimizer.state[parameter] = {
                "step": step.to(device=parameter.device, dtype=torch.float32),
                "exp_avg": first,
                "exp_avg_sq": second,
            }


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in tensors.items()}


def _of(prefix: str, tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value.to(device)
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
