"""Golden files of latent teachers: their networks, conditions and settings."""

from pathlib import Path

import pytest
import torch

from bdense.diffusion.conditions import Condition, TensorCondition, Unconditional
from bdense.diffusion.ddpm import DDPMSchedule, DiscreteSchedule
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.schedules import Schedule
from bdense.diffusion.vp import Levels
from bdense.models.store import load_model
from tests.goldens import GOLDENS, discover

LATENT = GOLDENS / "latent"

in_both_types = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def latent_files(pattern: str) -> pytest.MarkDecorator:
    """A test for each file of that pattern."""
    return pytest.mark.parametrize("path", discover(pattern, LATENT))


def network_of(info: dict, dtype: torch.dtype = torch.float32) -> NetworkDenoiser:
    """The denoiser of a file's ``folder``, as users load it."""
    pytest.importorskip("diffusers", reason="needs the diffusers extra")
    return load_model(LATENT / info["folder"])[0].to(dtype)


def condition_of(denoiser: NetworkDenoiser, rows: torch.Tensor | None) -> Condition:
    """Texts [B, L, E], classes [B] with the null class, or nothing."""
    if rows is None:
        return Unconditional()
    like = next(denoiser.parameters())
    if rows.is_floating_point():
        return TensorCondition("text", rows.to(like))
    # The class after the last is none: a row of zeros.
    one_hot = torch.nn.functional.one_hot(rows, denoiser.label_dim + 1)[:, :-1]
    return TensorCondition("class_labels", one_hot.to(like))


def process_of(info: dict) -> DDPMSchedule:
    return DDPMSchedule(
        num_train_timesteps=info["T"],
        beta_schedule=info["beta_schedule"],
        beta_start=info["beta_start"],
        beta_end=info["beta_end"],
    )


def schedule_of(info: dict, name: str, *, sigma_min: float, sigma_max: float) -> Levels:
    """``polynomial7`` or ``discrete1``: a kind and its exponent."""
    kind = name.rstrip("0123456789")
    bounds = {"sigma_min": sigma_min, "sigma_max": sigma_max}
    if kind == "discrete":
        return DiscreteSchedule(process=process_of(info), **bounds)
    return Schedule(kind=kind, rho=float(name.removeprefix(kind)), **bounds)


def folder_of(path: Path) -> str:
    """The network of a file of the reference, from its name."""
    stem = path.stem.removeprefix("refrun-").removeprefix("guided-").removeprefix("trace-")
    return stem.split("-k")[0]
