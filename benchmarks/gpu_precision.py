"""A training iteration on EDM's CIFAR-10 network in each number format, eager and compiled."""

import argparse
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import get_args

import torch
from torch import Tensor

from bdense.diffusion.denoiser import NetworkDenoiser, build_denoiser
from bdense.diffusion.intervals import IntervalGrid
from bdense.diffusion.solvers import DPMSolverPP, trajectory
from bdense.errors import InputError
from bdense.execution import CompileMode, Execution, Precision, exact_products
from bdense.methods.trajectories import Trajectories
from bdense.models.zoo import CHECKPOINTS
from benchmarks.common import parser, publish, table
from benchmarks.timing import pick_device, seconds_per_iteration

K = 4
GRID = IntervalGrid(num_intervals=3, substeps=K)
NETWORK = "edm-cifar10-32x32-uncond-vp"
# For a look at whether it runs, where there is no GPU.
TINY = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1}
MODES: dict[str, tuple[bool, CompileMode]] = {
    "eager": (False, "default"),
    "compile": (True, "default"),
    "reduce-overhead": (True, "reduce-overhead"),
}
LAYOUTS = {"contiguous": False, "channels_last": True}
REFERENCE = Execution()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One way to compute, with its own copy of the teacher, and what was measured of it.

    Attributes:
        error: max |dD| / max |D|, the largest over the teacher's levels.
        seconds: Of an iteration, by number of branches, a value for each round.
        peaks: Likewise, the most bytes on the GPU; none on a CPU.
    """

    execution: Execution
    trajectories: Trajectories
    error: float
    seconds: dict[int, list[float]] = field(default_factory=lambda: {1: [], K: []})
    peaks: dict[int, list[int]] = field(default_factory=lambda: {1: [], K: []})

    def measure(self, num_branches: int, iterations: int) -> None:
        """Train for ``iterations`` that count, after one that does not."""
        teacher, device = self.trajectories.teacher, _device(self.trajectories.teacher)
        self.execution.set_products()
        gc.collect()
        before = _allocated(device)
        seconds = seconds_per_iteration(teacher, self.trajectories, num_branches, iterations)
        self.seconds[num_branches].append(seconds)
        if device.type == "cuda":
            # Without the other cells' teachers; this one's own was there before.
            added = torch.cuda.max_memory_allocated(device) - before
            own = sum(p.nbytes for p in teacher.parameters())
            self.peaks[num_branches].append(added + own)

    def median(self, num_branches: int) -> float:
        """Seconds of an iteration."""
        return statistics.median(self.seconds[num_branches])

    @property
    def branched_over_plain(self) -> float:
        """The median over rounds."""
        pairs = zip(self.seconds[K], self.seconds[1], strict=True)
        return statistics.median(branched / plain for branched, plain in pairs)

    @property
    def label(self) -> list[str]:
        """Precision, mode, layout."""
        own = self.execution
        mode = next(
            name for name, value in MODES.items() if value == (own.is_compiled, own.compile_mode)
        )
        layout = next(name for name, value in LAYOUTS.items() if value == own.is_channels_last)
        return [own.precision, mode, layout]


@dataclass(frozen=True, slots=True)
class Probe:
    """What errors are measured on: the float32 teacher's walk and its outputs along it."""

    states: Tensor
    denoised: Tensor

    @classmethod
    def of(cls, trajectories: Trajectories) -> "Probe":
        """Walk from the first batch."""
        _, start, _ = trajectories.beginning(0, slice(None))
        teacher = trajectories.teacher
        states = trajectory(trajectories.solver, teacher.given(), start, GRID.fine())
        return cls(states, _outputs(teacher, states))

    def error(self, teacher: NetworkDenoiser) -> float:
        """Of its outputs, relative to float32."""
        pairs = zip(_outputs(teacher, self.states), self.denoised, strict=True)
        return max(float((mine - d).abs().max() / d.abs().max()) for mine, d in pairs)


def main() -> None:
    """Measure and print."""
    given = _options()
    device = pick_device(given.threads)
    body = measured(_executions(given, device), given, device)
    publish("gpu_precision", body, write=given.write)


def measured(
    executions: Sequence[Execution], given: argparse.Namespace, device: torch.device
) -> str:
    """The table of these ways to compute, of which the first is the reference.

    ``given`` has network, batch, rounds and iterations.
    """
    # Every cell compiles the same lines of code anew; torch would stop doing so, silently.
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    with exact_products():
        probe = Probe.of(live_trajectories(given, device, 1))
        cells = [_cell(execution, probe, given, device) for execution in executions]
        del probe
        _run(cells, given)
        return _body(cells, given, device)


def _options() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument(
        "--network",
        choices=[NETWORK, "tiny"],
        default=NETWORK,
        help="tiny: the same kind at 32x32 with few channels (default: %(default)s)",
    )
    options.add_argument("--batch", type=int, default=128, help="default: 128")
    options.add_argument(
        "--precisions",
        nargs="+",
        choices=get_args(Precision),
        help="default: all that the device computes",
    )
    options.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="both")
    options.add_argument(
        "--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="both"
    )
    options.add_argument("--rounds", type=int, default=5, help="rounds that count (default: 5)")
    options.add_argument(
        "--iterations", type=int, default=3, help="iterations of a side in a round (default: 3)"
    )
    options.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    return options.parse_args()


def _executions(given: argparse.Namespace, device: torch.device) -> list[Execution]:
    """What was asked for, float32 eager contiguous first: all others are compared with it."""
    asked = given.precisions or [p for p in get_args(Precision) if _computes(device, p)]
    found = [
        Execution(
            precision=precision,
            compile=MODES[mode][0],
            compile_mode=MODES[mode][1],
            channels_last=LAYOUTS[layout],
        )
        for precision, mode, layout in itertools.product(asked, given.modes, given.layouts)
    ]
    for execution in found:
        execution.require(device)
    return [REFERENCE, *(execution for execution in found if execution != REFERENCE)]


def _computes(device: torch.device, precision: Precision) -> bool:
    try:
        Execution(precision=precision).require(device)
    except InputError:
        return False
    return True


def live_trajectories(given: argparse.Namespace, device: torch.device, count: int) -> Trajectories:
    """Live ones of a new teacher, always of the same weights."""
    architecture = dict(CHECKPOINTS[NETWORK].architecture)
    # Dropout draws other masks compiled than eager: with it gradients could not be compared.
    architecture["config"] = architecture["config"] | {"dropout": 0.0}
    if given.network == "tiny":
        architecture["config"] |= TINY
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = _awake(build_denoiser(architecture)).to(device).eval()
    return Trajectories(teacher, GRID, DPMSolverPP(), given.batch, count, 0, teacher.conditions)


@torch.no_grad()
def _awake(denoiser: NetworkDenoiser) -> NetworkDenoiser:
    """With blocks that matter: EDM's begin near the identity, where no error would show."""
    for parameter in denoiser.parameters():
        if parameter.dim() > 1 and parameter.abs().max() < 1e-3:
            parameter.mul_(1e5)
    return denoiser


def _cell(
    execution: Execution, probe: Probe, given: argparse.Namespace, device: torch.device
) -> Cell:
    trajectories = live_trajectories(given, device, given.iterations + 1)
    started = time.perf_counter()
    trajectories.teacher.execute(execution)
    error = probe.error(trajectories.teacher)
    cell = Cell(execution=execution, trajectories=trajectories, error=error)
    _say(f"{' '.join(cell.label)}: ready after {time.perf_counter() - started:.0f} s")
    return cell


def _outputs(teacher: NetworkDenoiser, states: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.stack([teacher(x, t) for x, t in zip(states, GRID.fine()[:-1], strict=False)])


def _run(cells: Sequence[Cell], given: argparse.Namespace) -> None:
    """All cells in turns, plain and branched, each round in another order."""
    started, cells = time.monotonic(), list(cells)
    for done in range(given.rounds + 1):
        for cell in cells[done % len(cells) :] + cells[: done % len(cells)]:
            for num_branches in (1, K) if done % 2 else (K, 1):
                cell.measure(num_branches, given.iterations)
        if done == 0:  # kernels are chosen and compiled
            for cell in cells:
                for of in (1, K):
                    cell.seconds[of].clear()
                    cell.peaks[of].clear()
        _say(f"round {done} of {given.rounds}: {time.monotonic() - started:.0f} s")


def _body(cells: Sequence[Cell], given: argparse.Namespace, device: torch.device) -> str:
    teacher = cells[0].trajectories.teacher
    parameters = sum(p.numel() for p in teacher.parameters())
    header = [
        "precision",
        "mode",
        "layout",
        "iterations/s",
        "to float32",
        "peak GiB",
        "B-DENSE / SFD, time",
        "B-DENSE / SFD, peak",
        "error of D",
    ]
    rows = [_row(cell, cells[0]) for cell in cells]
    evaluations = DPMSolverPP().nfe(GRID.num_intervals * K)
    peak = (
        "the most memory that torch had allocated on the GPU, with one teacher and one student"
        if device.type == "cuda"
        else "measured on a GPU only"
    )
    return f"""\
SFD at NFE {GRID.nfe}, K = {K}, batch {given.batch}, images of {list(teacher.image_shape)}, \
{parameters / 1e6:.1f} M parameters ({given.network}, random weights, no
dropout). An iteration is {evaluations} teacher evaluations by DPM-Solver++ and an update of the \
student in each of {len(GRID.trained)} intervals.

{table(header, rows)}

- Iterations and peak are of plain SFD; B-DENSE has K branches and uniform weights. \
Medians of {given.rounds} rounds of {given.iterations} iterations;
  in each round every row and both methods had their turn, and a ratio is the median over rounds.
- Peak: {peak}.
- Errors are those against float32, eager, contiguous: max |dD| / max |D|, the largest of the \
teacher's {evaluations} levels."""


def _row(cell: Cell, reference: Cell) -> list[str]:
    seconds = cell.median(1)
    rounds = zip(reference.seconds[1], cell.seconds[1], strict=True)
    peaks = [f"{max(cell.peaks[1]) / 2**30:.2f}"] if cell.peaks[1] else ["-"]
    ratio = [f"{max(cell.peaks[K]) / max(cell.peaks[1]):.3f}"] if cell.peaks[1] else ["-"]
    return [
        *cell.label,
        f"{1 / seconds:.3g}",
        f"{statistics.median(base / own for base, own in rounds):.2f}",
        *peaks,
        f"{cell.branched_over_plain:.3f}",
        *ratio,
        f"{cell.error:.1e}",
    ]


def _device(teacher: NetworkDenoiser) -> torch.device:
    return next(teacher.parameters()).device


def _allocated(device: torch.device) -> int:
    """Bytes now; the peak is counted from here."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    main()
