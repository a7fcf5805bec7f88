"""Denoisers, guidance and walks of latent teachers; settings come from each file's own JSON."""

import json
from pathlib import Path

import pytest
import torch

from bdense.diffusion.guidance import guided
from bdense.diffusion.preconditioning import DDPM
from bdense.diffusion.solvers import DPMSolverPP, Euler, analytical_first_step, trajectory
from tests.goldens import close, discover, settings, tensors
from tests.latent_goldens import (
    LATENT,
    condition_of,
    in_both_types,
    latent_files,
    network_of,
    process_of,
    schedule_of,
)

pytestmark = pytest.mark.golden

SOLVERS = {
    "euler": (Euler(), False),
    "euler_afs": (Euler(), True),
    "dpmpp2": (DPMSolverPP(max_order=2), False),
    "dpmpp3": (DPMSolverPP(max_order=3), False),
}


@pytest.mark.parametrize("path", discover("times.json", LATENT))
def test_times_of_levels(path: Path):
    """Between two trained times a straight line in log alpha; at the first below it."""
    for info in json.loads(path.read_text()).values():
        process = process_of(info)
        assert process.sigma_min == pytest.approx(info["sigma_first"], rel=1e-9)
        assert process.sigma_max == pytest.approx(info["sigma_last"], rel=1e-9)
        sigmas, expected = (
            torch.tensor([row[name] for row in info["rows"]], dtype=torch.float64)
            for name in ("sigma", "index_clamped")
        )
        close(process.time(sigmas), expected, atol=1e-9)


@latent_files("guided-*.safetensors")
@in_both_types
@torch.no_grad()
def test_guided(path: Path, dtype: torch.dtype):
    """Times, network outputs, guidance with one level an image, and walks on both grids."""
    info, data = settings(path), tensors(path)
    is_double = dtype == torch.float64
    denoiser = network_of(info, dtype)
    assert isinstance(denoiser.precond, DDPM)
    assert denoiser.precond.prediction_type == info["prediction_type"]
    assert denoiser.precond.process == process_of(info)
    x, sigma = data["x"].to(dtype), data["sigma"]
    close(denoiser.precond.time(sigma.to(dtype)), data["time"], atol=1e-9 if is_double else 1e-3)

    condition = condition_of(denoiser, data.get("text", data.get("labels")))
    null = condition_of(denoiser, data.get("null"))
    z = x / (1 + sigma.to(x) ** 2).sqrt().view(-1, 1, 1, 1)
    for name, told in (("raw.cond", condition), ("raw.null", null)):
        if name in data:
            raw = denoiser.model(z, data["time"].to(dtype), **told.arguments())
            close(raw, data[name], rtol_of_max=1e-6 if is_double else 2e-5)
    tolerance = 1e-6 if is_double else 2e-5
    for scale in info["guidance"]:
        mixed = guided(denoiser, scale, null)
        found = mixed(x, sigma, **condition.arguments())
        close(found, data[f"denoised.{scale}"], rtol_of_max=tolerance)

    walk = info["walk"]
    bounds = {name: walk[name] for name in ("sigma_min", "sigma_max")}
    grids = [key.split(".")[1] for key in data if key.endswith(".levels")]
    assert grids
    denoise = denoiser.given(condition, guidance=info["walk_guidance"], null=null)
    for grid in grids:
        levels = schedule_of(info, grid, **bounds).grid(walk["steps"])
        close(levels, data[f"walk.{grid}.levels"], rtol_of_max=1e-12)
        denoiser.require_levels(schedule_of(info, grid, **bounds))
        close(denoiser.precond.time(levels), data[f"walk.{grid}.times"], atol=1e-6)
        start = (levels[0] * data["walk.noise"]).to(dtype)
        for name, (solver, afs) in SOLVERS.items():
            model = analytical_first_step(denoise, levels[0]) if afs else denoise
            states = trajectory(solver, model, start, levels)
            golden = data[f"walk.{grid}.{name}"]
            for state, row in zip(states, golden, strict=True):
                close(state, row, rtol_of_max=1e-6 if is_double else 1e-4)


@latent_files("refrun-guided-*.safetensors")
@torch.no_grad()
def test_the_references_own_run(path: Path):
    """The SFD reference in float32 against ours in float64, on the inputs of ``guided-*``."""
    plain = path.with_name(path.name.removeprefix("refrun-"))
    info, data, reference = settings(plain), tensors(plain), tensors(path)
    denoiser = network_of(info, torch.float64)
    condition = condition_of(denoiser, data.get("text", data.get("labels")))
    null = condition_of(denoiser, data.get("null"))
    compared = 0
    for key, golden in reference.items():
        _, what, *rest = key.split(".")
        if what == "denoised":
            mixed = guided(denoiser, float(".".join(rest)), null)
            found = mixed(data["x"], data["sigma"], **condition.arguments())
            close(found, golden, rtol_of_max=1e-5)
            compared += 1
            continue
        grid, name, *thresholded = rest
        if thresholded:  # ours thresholds predictions as the reference does, if asked to
            solver, afs = DPMSolverPP(max_order=3, thresholding=True), False
        else:
            solver, afs = SOLVERS[name]
        walk = info["walk"]
        schedule = schedule_of(
            info, grid, sigma_min=walk["sigma_min"], sigma_max=walk["sigma_max"]
        )
        levels = schedule.grid(walk["steps"])
        denoise = denoiser.given(condition, guidance=info["walk_guidance"], null=null)
        model = analytical_first_step(denoise, levels[0]) if afs else denoise
        states = trajectory(solver, model, levels[0] * data["walk.noise"], levels)
        for state, row in zip(states, golden, strict=True):
            close(state, row, rtol_of_max=2e-5)
        compared += 1
    assert compared == len(reference)
