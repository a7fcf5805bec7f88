"""Denoisers, guidance and walks of latent teachers; settings come from each file's own JSON."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from bdense.diffusion.codecs import Autoencoder
from bdense.diffusion.guidance import guided
from bdense.diffusion.preconditioning import DDPM
from bdense.diffusion.solvers import DPMSolverPP, Euler, analytical_first_step, trajectory
from bdense.models.latents import load_codec, load_text_encoder
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
    scales = [key.removeprefix("denoised.") for key in data if key.startswith("denoised.")]
    assert sorted(map(float, scales)) == sorted(info["guidance"])
    for scale in scales:
        mixed = guided(denoiser, float(scale), null)
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
        close(denoiser.precond.time(levels), data[f"walk.{grid}.times"], atol=1e-9)
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


@latent_files("guided-*.safetensors")
@torch.no_grad()
def test_latents_of_a_quantising_autoencoder(path: Path):
    """Decoding quantises, encoding does not; in slices as at once."""
    info, data = settings(path), tensors(path)
    if "vq.latents" not in data:
        pytest.skip("this teacher has no autoencoder in its folder")
    codec = load_codec(LATENT / info["folder"])
    close(codec.decode(data["vq.latents"]), data["vq.decoded"], rtol_of_max=2e-5)
    close(codec.encode(data["vq.images"]), data["vq.encoded"], rtol_of_max=2e-5)
    one = dataclasses.replace(codec, slice=1)
    close(one.decode(data["vq.latents"]), data["vq.decoded"], rtol_of_max=2e-5)


@latent_files("pipeline-*.safetensors")
@torch.no_grad()
def test_a_whole_pipeline(path: Path):
    """Prompts to tokens, embeddings, latents at the pipeline's own levels, and images."""
    info, data = settings(path), tensors(path)
    folder = LATENT / info["folder"]
    encoder, codec, denoiser = load_text_encoder(folder), load_codec(folder), network_of(info)
    assert encoder.length == info["max_length"]
    assert torch.equal(encoder.tokens(info["prompts"]), data["token_ids"])
    empty = [""] * len(data["null_ids"])
    assert torch.equal(encoder.tokens(empty), data["null_ids"])
    prompts = encoder.prompts(info["prompts"])
    close(prompts.embeddings, data["prompt_embeds"], rtol_of_max=1e-5)
    assert prompts.empty is not None
    close(prompts.empty.expand(len(empty), -1, -1), data["null_embeds"], rtol_of_max=1e-5)

    levels, walk = data["ve.levels"], data["ve.walk"]
    assert isinstance(denoiser.precond, DDPM)
    indices = torch.tensor([*info["timesteps"], info["last_index"]], dtype=torch.float64)
    close(denoiser.precond.time(levels), indices, atol=1e-6)
    condition = prompts.evaluation(0, range(len(info["prompts"])))
    null = prompts.null()
    denoise = denoiser.given(condition, guidance=info["guidance"], null=null)
    states = trajectory(Euler(), denoise, walk[0].float(), levels)
    for state, row in zip(states, walk, strict=True):
        close(state, row, rtol_of_max=1e-4)
    alphas = 1 / (1 + levels**2).sqrt()
    z = states * alphas.to(states).view(-1, 1, 1, 1, 1)
    for state, row in zip(z, data["latents"], strict=True):
        close(state, row, rtol_of_max=1e-4)
    decoded = codec.decode(z[-1])
    close(decoded, data["decoded_raw"], atol=2e-3)
    close((decoded / 2 + 0.5).clamp(0, 1), data["images"], atol=2e-3)
    assert isinstance(codec, Autoencoder)
    assert codec.scaling_factor == info["scaling_factor"]
    close(
        codec.encode(data["vae.images"]) / codec.scaling_factor, data["vae.mean"], rtol_of_max=1e-5
    )
