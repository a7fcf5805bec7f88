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
from torch.utils.flop_counter import FlopCounterMode

from bdense.diffusion.branches import widen_head
from bdense.diffusion.denoiser import NetworkDenoiser, build_denoiser
from bdense.diffusion.intervals import IntervalGrid
from bdense.diffusion.solvers import DPMSolverPP, trajectory
from bdense.errors import InputError
from bdense.execution import Execution, Precision, exact_products
from bdense.methods.sfd import (
    SFDConfig,
    SFDStage,
    branch_losses,
    branch_states,
    first_interval_without_network,
)
from bdense.methods.trajectories import LiveTrajectories
from bdense.models.zoo import CHECKPOINTS
from bdense.training.loop import train
from bdense.weights.spaces import uniform_weights
from bdense.weights.weighting import FixedWeights
from benchmarks.common import parser, publish, table
from benchmarks.timing import pick_device, seconds_per_iteration

K = 4
GRID = IntervalGrid(num_intervals=3, substeps=K)
NETWORK = "edm-cifar10-32x32-uncond-vp"
# For a look at whether it runs, where there is no GPU.
TINY = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1}
MODES = {"eager": False, "compile": True}
LAYOUTS = {"contiguous": False, "channels_last": True}
REFERENCE = Execution()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One way to compute, with its own copy of the teacher, and what was measured of it.

    Attributes:
        output_error: max |dD| / max |D|, the largest over the teacher's levels.
        gradient_error: |dg| / |g| of a new student's first gradient.
        seconds: Of an iteration, by number of branches, a value for each round.
        peaks: Likewise, the most bytes on the GPU; none on a CPU.
    """

    execution: Execution
    trajectories: LiveTrajectories
    output_error: float
    gradient_error: float
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
        mode = next(name for name, value in MODES.items() if value == own.compile)
        layout = next(name for name, value in LAYOUTS.items() if value == own.channels_last)
        return [own.precision, mode, layout]


@dataclass(frozen=True, slots=True)
class Probe:
    """What errors are measured on: the float32 teacher's walk, and float32's own answers.

    Attributes:
        states: [N * K + 1, B, C, H, W] the walk.
        denoised: [N * K, B, C, H, W] the teacher's outputs along it.
        gradient: Of a new student on its first trained interval, by parameter.
    """

    states: Tensor
    denoised: Tensor
    gradient: list[Tensor]

    @classmethod
    def of(cls, trajectories: LiveTrajectories) -> "Probe":
        """Walk from the first batch."""
        _, start, _ = trajectories.beginning(0, slice(None))
        teacher = trajectories.teacher
        states = trajectory(trajectories.solver, teacher.given(), start, GRID.fine())
        return cls(states, _outputs(teacher, states), _first_gradient(teacher, states))

    def errors(self, teacher: NetworkDenoiser) -> tuple[float, float]:
        """Of outputs and of the first gradient, relative to float32."""
        pairs = zip(_outputs(teacher, self.states), self.denoised, strict=True)
        outputs = max(float((mine - d).abs().max() / d.abs().max()) for mine, d in pairs)
        mine = _first_gradient(teacher, self.states)
        off = [a - b for a, b in zip(mine, self.gradient, strict=True)]
        return outputs, _norm(off) / _norm(self.gradient)


def main() -> None:
    """Measure and print."""
    given = _options()
    # Every cell compiles the same lines of code anew; torch would stop doing so, silently.
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    device = pick_device(given.threads)
    executions = _executions(given, device)
    with exact_products():
        flops = {k: _flops(_trajectories(given, device, 1), k) for k in (1, K)}
        probe = Probe.of(_trajectories(given, device, 1))
        cells = [_cell(execution, probe, given, device) for execution in executions]
        del probe
        rounds = _run(cells, given)
    publish("gpu_precision", _body(cells, flops, rounds, given, device), write=given.write)


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
    options.add_argument(
        "--minutes", type=float, default=60, help="begin no round after so long (default: 60)"
    )
    options.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    return options.parse_args()


def _executions(given: argparse.Namespace, device: torch.device) -> list[Execution]:
    """What was asked for, float32 eager contiguous first: all others are compared with it."""
    asked = given.precisions or [p for p in get_args(Precision) if _computes(device, p)]
    found = [
        Execution(precision=precision, compile=MODES[mode], channels_last=LAYOUTS[layout])
        for precision, mode, layout in itertools.product(asked, given.modes, given.layouts)
    ]
    for execution in found:
        execution.require(device)
    return [REFERENCE, *(execution for execution in found if execution != REFERENCE)]


def _computes(device: torch.device, precision: str) -> bool:
    try:
        Execution(precision=precision).require(device)
    except InputError:
        return False
    return True


def _trajectories(given: argparse.Namespace, device: torch.device, count: int) -> LiveTrajectories:
    """Live ones of a new teacher, always of the same weights."""
    architecture = dict(CHECKPOINTS[NETWORK].architecture)
    # Dropout draws other masks compiled than eager: with it gradients could not be compared.
    architecture["config"] = architecture["config"] | {"dropout": 0.0}
    if given.network == "tiny":
        architecture["config"] |= TINY
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = _awake(build_denoiser(architecture)).to(device).eval()
    return LiveTrajectories(teacher, GRID, DPMSolverPP(), given.batch, count, seed=0)


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
    trajectories = _trajectories(given, device, given.iterations + 1)
    started = time.perf_counter()
    trajectories.teacher.execute(execution)
    outputs, gradient = probe.errors(trajectories.teacher)
    cell = Cell(
        execution=execution,
        trajectories=trajectories,
        output_error=outputs,
        gradient_error=gradient,
    )
    _say(f"{' '.join(cell.label)}: ready after {time.perf_counter() - started:.0f} s")
    return cell


def _outputs(teacher: NetworkDenoiser, states: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.stack([teacher(x, t) for x, t in zip(states, GRID.fine()[:-1], strict=False)])


def _first_gradient(teacher: NetworkDenoiser, states: Tensor) -> list[Tensor]:
    student = widen_head(teacher, K).train()
    n = GRID.trained[0]
    x = first_interval_without_network(states[0], GRID.interval(0))
    targets = states[n * K + 1 : (n + 1) * K + 1]
    losses = branch_losses(branch_states(student.branches, x, GRID.interval(n)), targets)
    losses.sum().backward()
    return [p.grad for p in student.parameters() if p.grad is not None]


def _norm(gradient: Sequence[Tensor]) -> float:
    return float(torch.stack([g.double().square().sum() for g in gradient]).sum().sqrt())


def _flops(trajectories: LiveTrajectories, num_branches: int) -> int:
    """Of one training iteration, which is run."""
    config = SFDConfig(kimg=trajectories.batch / 1000)
    start = trajectories.teacher
    stage = SFDStage(config=config, trajectories=trajectories, start=start)
    counter = FlopCounterMode(display=False)
    with counter:
        train(stage, FixedWeights(uniform_weights()(num_branches)))
    return int(counter.get_total_flops())


def _run(cells: Sequence[Cell], given: argparse.Namespace) -> int:
    """All cells in turns, plain and branched, each round in another order: rounds that count."""
    started = time.monotonic()
    for done in range(given.rounds + 1):
        late = time.monotonic() - started > 60 * given.minutes
        if late and done > 1:
            return done - 1
        for cell in cells[done % len(cells) :] + cells[: done % len(cells)]:
            for num_branches in (1, K) if done % 2 else (K, 1):
                cell.measure(num_branches, given.iterations)
        if done == 0:  # kernels are chosen and compiled
            for cell in cells:
                for values in (*cell.seconds.values(), *cell.peaks.values()):
                    values.clear()
        _say(f"round {done} of {given.rounds}: {time.monotonic() - started:.0f} s")
    return given.rounds


def _body(
    cells: Sequence[Cell],
    flops: dict[int, int],
    rounds: int,
    given: argparse.Namespace,
    device: torch.device,
) -> str:
    teacher = cells[0].trajectories.teacher
    parameters = sum(p.numel() for p in teacher.parameters())
    header = [
        "precision",
        "mode",
        "layout",
        "iterations/s",
        "TFLOP/s",
        "to float32",
        "peak GiB",
        "B-DENSE / SFD, time",
        "B-DENSE / SFD, peak",
        "error of D",
        "error of gradient",
    ]
    rows = [_row(cell, cells[0], flops[1]) for cell in cells]
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

- Iterations, TFLOP/s and peak are of plain SFD; B-DENSE has K branches and uniform weights. \
Medians of {rounds} rounds of {given.iterations} iterations;
  in each round every row and both methods had their turn, and a ratio is the median over rounds.
- An iteration is {flops[1] / 1e12:.4g} TFLOP, {flops[K] / 1e12:.4g} with branches: \
FlopCounterMode's convolutions and matrix products, forward and backward,
  2 for each multiply-add, products with padding's zeros among them; normalisation, activations, \
solver and Adam are not counted.
- Peak: {peak}.
- Errors are those against float32, eager, contiguous: max |dD| / max |D|, the largest of the \
teacher's {evaluations} levels;
  |dg| / |g| of a new student's gradient on its first interval, K branches, where single signs of \
the L1 loss flip on rounding."""


def _row(cell: Cell, reference: Cell, flops: int) -> list[str]:
    seconds = cell.median(1)
    rounds = zip(reference.seconds[1], cell.seconds[1], strict=True)
    peaks = [f"{max(cell.peaks[1]) / 2**30:.2f}"] if cell.peaks[1] else ["-"]
    ratio = [f"{max(cell.peaks[K]) / max(cell.peaks[1]):.3f}"] if cell.peaks[1] else ["-"]
    return [
        *cell.label,
        f"{1 / seconds:.3g}",
        f"{flops / seconds / 1e12:.3g}",
        f"{statistics.median(base / own for base, own in rounds):.2f}",
        *peaks,
        f"{cell.branched_over_plain:.3f}",
        *ratio,
        f"{cell.output_error:.1e}",
        f"{cell.gradient_error:.1e}",
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
