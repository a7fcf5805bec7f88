"""Time two sides of a comparison in turns, by calls or by training iterations."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from bdense.data.datasets import load_dataset
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.methods.sfd import SFDConfig, SFDStage
from bdense.methods.trajectories import Trajectories
from bdense.training.loop import IterationReport, train
from bdense.training.teacher import new_denoiser
from bdense.weights.log_linear import uniform_weights
from bdense.weights.weighting import FixedWeights

if TYPE_CHECKING:
    from search.spec.study import StudySpec


@dataclass(frozen=True, slots=True)
class Paired:
    """Seconds of two sides measured in turns, so that drift of the machine affects both."""

    first: list[float]
    second: list[float]

    @property
    def seconds(self) -> tuple[float, float]:
        """The median of each side."""
        return statistics.median(self.first), statistics.median(self.second)

    @property
    def ratio(self) -> float:
        """The median over pairs of first / second."""
        return statistics.median(self._ratios)

    @property
    def difference(self) -> float:
        """The median over pairs of first - second, in seconds."""
        return statistics.median(a - b for a, b in zip(self.first, self.second, strict=True))

    @property
    def spread(self) -> str:
        """The lowest and the highest ratio of a pair."""
        return f"{min(self._ratios):.3f} to {max(self._ratios):.3f}"

    @property
    def _ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.first, self.second, strict=True)]


def interleave(first: Callable[[], float], second: Callable[[], float], pairs: int) -> Paired:
    """Measure the two in turns; who begins changes from pair to pair, and pair 0 is thrown away.

    Args:
        first, second: Do one block of work and return its seconds.
        pairs: Pairs that count.
    """
    measured = Paired([], [])
    for pair in range(pairs + 1):
        order = ((first, measured.first), (second, measured.second))
        for measure, seconds in order if pair % 2 else order[::-1]:
            seconds.append(measure())
    return Paired(measured.first[1:], measured.second[1:])


def seconds_per_call(call: Callable[[], object], calls: int, device: torch.device) -> float:
    """Mean over a block of calls."""
    synchronise(device)
    started = time.perf_counter()
    for _ in range(calls):
        call()
    synchronise(device)
    return (time.perf_counter() - started) / calls


def seconds_per_iteration(
    teacher: NetworkDenoiser, trajectories: Trajectories, num_branches: int, iterations: int
) -> float:
    """Mean over a block of SFD's training iterations, after one that does not count.

    Args:
        teacher: The student starts from it.
        trajectories: ``iterations`` + 1 of them or more.
        num_branches: K for B-DENSE (uniform weights), 1 for plain SFD.
        iterations: Those that count.
    """
    device = next(teacher.parameters()).device
    stamps: list[float] = []

    def on_iteration(done: IterationReport) -> None:
        synchronise(device)
        stamps.append(time.perf_counter())

    kimg = (iterations + 1) * trajectories.batch / 1000
    grid = trajectories.grid_at(0)
    config = SFDConfig(kimg=kimg, batch=trajectories.batch, substeps=grid.substeps)
    stage = SFDStage(config=config, trajectories=trajectories, start=teacher)
    train(stage, FixedWeights(uniform_weights()(num_branches)), on_iteration=on_iteration)
    return (stamps[-1] - stamps[0]) / iterations


def untrained_teacher(spec: "StudySpec", device: torch.device) -> NetworkDenoiser:
    """The study's network with its initial weights, which cost what trained ones do."""
    # Here: the engine is timed on machines that have nothing of the service.
    from search.spec.resolve import teacher_config

    if spec.teacher.train is None:
        raise SystemExit(f"study {spec.name} has no teacher.train; choose one that trains its own")
    assert spec.data is not None  # it trains its teacher on them
    shape = load_dataset(spec.data).images.shape[1:]
    return new_denoiser(teacher_config(spec.teacher.train), shape).to(device).eval()


def pick_device(threads: int) -> torch.device:
    """The GPU if there is one; the CPU is used with that many threads."""
    torch.set_num_threads(threads)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronise(device: torch.device) -> None:
    """Wait for the GPU; a CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
