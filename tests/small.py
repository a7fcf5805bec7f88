"""Small teachers, and denoisers in closed form."""

from dataclasses import dataclass, field

import torch

from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.intervals import IntervalGrid
from bdense.diffusion.schedules import Schedule
from bdense.diffusion.solvers import DPMSolverPP
from bdense.methods.trajectories import LiveTrajectories
from bdense.networks import SongUNet, SongUNetConfig


def small_teacher(*, dropout: float = 0.0, seed: int = 0, channels: int = 1) -> NetworkDenoiser:
    """An untrained 8 x 8 network whose blocks, near the identity at first, are made to matter."""
    config = SongUNetConfig(
        img_resolution=8,
        img_channels=channels,
        model_channels=8,
        channel_mult=(1, 2),
        num_blocks=1,
        attn_resolutions=(),
        dropout=dropout,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        teacher = NetworkDenoiser(SongUNet(config)).eval()
        with torch.no_grad():
            for parameter in teacher.parameters():
                if parameter.dim() == 4 and parameter.abs().max() < 1e-3:
                    parameter.mul_(1e5)
    return teacher


def small_trajectories(
    teacher: NetworkDenoiser,
    *,
    count: int = 4,
    batch: int = 4,
    substeps: int = 4,
    afs: bool = True,
    schedule: Schedule | None = None,
) -> LiveTrajectories:
    """Live trajectories at NFE 2."""
    grid = IntervalGrid(
        num_intervals=3 if afs else 2, substeps=substeps, afs=afs, schedule=schedule or Schedule()
    )
    return LiveTrajectories(
        teacher=teacher, grid=grid, solver=DPMSolverPP(), batch=batch, count=count, seed=7
    )


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Equal bit for bit."""
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@dataclass
class GaussianDenoiser:
    """The exact D(x; sigma) where every pixel is N(0, std^2): std^2 x / (std^2 + sigma^2).

    The ODE then has the solution x(t) = x(T) sqrt((std^2 + t^2) / (std^2 + T^2)).
    """

    std: float = 1.0
    asked: list[float] = field(default_factory=list)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        self.asked.append(float(sigma))
        return x * self.std**2 / (self.std**2 + sigma**2)

    def solution(self, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        """[n + 1, B, C, H, W] exact states at ``sigmas``, from x at the first of them."""
        variance = self.std**2 + sigmas**2
        return (variance / variance[0]).sqrt().view(-1, 1, 1, 1, 1) * x
