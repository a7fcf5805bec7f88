"""The parts of a training iteration that depend on K, each measured by itself."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bdense.diffusion.branches import widen_head
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.intervals import IntervalGrid
from bdense.methods.sfd import branch_losses, branch_states
from bdense.methods.trajectories import TrajectoryBatch
from bdense.networks import SongUNet
from benchmarks.timing import Paired, interleave, seconds_per_call

K = 4
GRID = IntervalGrid(num_intervals=3, substeps=K)
PAIRS, CALLS = 15, 10


@dataclass(frozen=True, eq=False)
class SyntheticTrajectories:
    """One made-up batch served again and again, so that the student's cost alone is measured."""

    walk: TrajectoryBatch
    grid: IntervalGrid = GRID

    @property
    def batch(self) -> int:
        return len(self.walk.start)

    def __len__(self) -> int:
        return sys.maxsize

    def part(self, iteration: int, images: slice) -> TrajectoryBatch:
        return self.walk

    def describe(self) -> dict[str, Any]:
        return {}


class FreeNetwork(nn.Module):
    """Stands where a SongUNet does and costs nothing: the same output, whatever comes in."""

    def __init__(self, like: SongUNet) -> None:
        super().__init__()
        self.config = like.config
        self.out_channels = like.out_channels
        self.out: Tensor | None = None

    def forward(self, x: Tensor, *_: Tensor | None) -> Tensor:
        if self.out is None:
            b, _, h, w = x.shape
            size = (b, self.out_channels, h, w)
            self.out = torch.randn(size, device=x.device, requires_grad=True)
        return self.out


Piece = Callable[[NetworkDenoiser, TrajectoryBatch], Callable[[], object]]


def measure_pieces(
    teacher: NetworkDenoiser, trajectories: SyntheticTrajectories
) -> dict[str, Paired]:
    """Seconds an iteration of what differs between K branches (first) and one (second)."""
    walk = trajectories.walk
    makers: dict[str, Piece] = {
        "head convolution, forward and backward": _head,
        "states and loss, forward and backward": _loss,
        "Adam and the check of the gradients": _update,
    }

    def side(make: Piece, num_branches: int) -> Callable[[], float]:
        work = make(widen_head(teacher, num_branches), walk)
        return lambda: len(GRID.trained) * seconds_per_call(work, CALLS, walk.start.device)

    return {name: interleave(side(make, K), side(make, 1), PAIRS) for name, make in makers.items()}


def _head(student: NetworkDenoiser, walk: TrajectoryBatch) -> Callable[[], object]:
    head = student.model.get_submodule(student.model.head_name)
    x = walk.start
    size = (len(x), head.in_channels, *x.shape[2:])
    features = torch.randn(size, device=x.device, requires_grad=True)
    gradient = torch.randn_like(head(features))

    def work() -> None:
        torch.autograd.grad(head(features), [features, *head.parameters()], gradient)

    return work


def _loss(student: NetworkDenoiser, walk: TrajectoryBatch) -> Callable[[], object]:
    network = FreeNetwork(student.model)
    free = NetworkDenoiser(network)  # type: ignore[arg-type]
    levels, targets = GRID.interval(1), walk.states[:K]

    def work() -> None:
        losses = branch_losses(branch_states(free.branches, walk.start, levels), targets)
        assert network.out is not None
        torch.autograd.grad(losses.sum(), network.out)

    return work


def _update(student: NetworkDenoiser, walk: TrajectoryBatch) -> Callable[[], object]:
    parameters = list(student.parameters())
    gradients = [torch.randn_like(p) for p in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer = torch.optim.Adam(parameters, lr=5e-5, fused=True)

    def work() -> None:
        torch.nn.utils.get_total_norm(gradients, foreach=True).cpu()
        optimizer.step()

    return work
