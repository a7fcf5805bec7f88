"""Small teachers, and denoisers in closed form."""

from dataclasses import dataclass, field
from typing import Any

import torch

from bdense.data.datasets import Dataset
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.intervals import IntervalGrid
from bdense.diffusion.schedules import Schedule
from bdense.diffusion.solvers import DPMSolverPP
from bdense.methods.sfd import SFDConfig, SFDStage
from bdense.methods.trajectories import Trajectories
from bdense.networks.song_unet import SongUNet, SongUNetConfig
from bdense.training.loop import train
from bdense.weights.weighting import BranchWeighting, FixedWeights


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


def noise_images(
    count: int = 12, *, channels: int = 1, classes: int = 0, name: str = "its-sha256"
) -> Dataset:
    """8 x 8 bytes at random, known by ``name``; in so many classes, if any."""
    draw = torch.Generator().manual_seed(3)
    pixels = torch.randint(256, (count, channels, 8, 8), generator=draw, dtype=torch.uint8)
    return Dataset("noise", pixels, name, torch.arange(count) % classes if classes else None)


def small_trajectories(
    teacher: NetworkDenoiser,
    *,
    count: int = 4,
    batch: int = 4,
    substeps: int = 4,
    afs: bool = True,
    schedule: Schedule | None = None,
) -> Trajectories:
    """Live trajectories at NFE 2."""
    grid = IntervalGrid(
        num_intervals=3 if afs else 2, substeps=substeps, afs=afs, schedule=schedule or Schedule()
    )
    return Trajectories(
        teacher=teacher,
        grid=grid,
        solver=DPMSolverPP(),
        batch=batch,
        count=count,
        seed=7,
        conditions=teacher.conditions,
    )


def sfd_stage(
    trajectories: Trajectories,
    *,
    images: int = 16,
    seed: int = 0,
    start: NetworkDenoiser | None = None,
    perceptual: Any = None,
    **knobs: Any,
) -> SFDStage:
    """SFD on these trajectories, of a student that starts as their teacher."""
    return SFDStage(
        config=SFDConfig(
            kimg=images / 1000,
            batch=trajectories.batch,
            substeps=trajectories.grid_at(0).substeps,
            **{"lr": 1e-3} | knobs,
        ),
        trajectories=trajectories,
        start=start or trajectories.teacher,
        seed=seed,
        perceptual=perceptual,
    )


OF_TRAIN = (
    "devices",
    "checkpoint",
    "checkpoint_seconds",
    "on_iteration",
    "on_save",
    "evaluations",
)


def sfd(
    trajectories: Trajectories, weights: torch.Tensor | BranchWeighting, **options: Any
) -> NetworkDenoiser:
    """The branched student of ``sfd_stage``; options as of that and of ``train``."""
    weighting = FixedWeights(weights) if isinstance(weights, torch.Tensor) else weights
    own = {name: options.pop(name) for name in OF_TRAIN if name in options}
    return train(sfd_stage(trajectories, **options), weighting, **own)


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
        # Of several states of each image, each at its own level: what an image is asked.
        self.asked += sigma.unique().tolist()
        level = sigma.view(-1, 1, 1, 1) if sigma.dim() else sigma
        return x * self.std**2 / (self.std**2 + level**2)

    def solution(self, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        """[n + 1, B, C, H, W] exact states at ``sigmas``, from x at the first of them."""
        variance = self.std**2 + sigmas**2
        return (variance / variance[0]).sqrt().view(-1, 1, 1, 1, 1) * x
