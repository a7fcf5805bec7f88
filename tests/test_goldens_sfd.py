"""The engine against data made by the SFD reference; settings come from each file's own JSON."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from bdense.diffusion.conditions import TensorCondition
from bdense.diffusion.pictures import to_uint8
from bdense.diffusion.sampling import Sampler
from bdense.diffusion.schedules import Schedule
from bdense.diffusion.solvers import (
    DPM2,
    IPNDM,
    DPMSolverPP,
    Euler,
    Heun,
    Solver,
    analytical_first_step,
    trajectory,
)
from bdense.networks.layers import UNetBlock
from tests.goldens import close, discover, golden_network, settings, tensors

pytestmark = pytest.mark.golden

GRID_KINDS = ("polynomial", "logsnr", "time_uniform")


def solver_from(name: str, config: dict, *, thresholding: bool) -> Solver:
    """The reference's solver; what a trace's configuration says beside is not read."""
    match name:
        case "euler":
            return Euler()
        case "heun":
            return Heun()
        case "dpm":
            return DPM2(r=config.get("r", 0.5))
        case "ipndm":
            return IPNDM(max_order=config["max_order"])
        case "dpmpp":
            data = config.get("predict_x0", True)
            return DPMSolverPP(
                max_order=config["max_order"],
                prediction="data" if data else "noise",
                lower_order_final=config.get("lower_order_final", True),
                thresholding=thresholding and data,  # the reference never thresholds noise
            )
    raise AssertionError(f"the reference has no solver {name}")


@pytest.mark.parametrize("path", discover("schedules.json"))
def test_schedules(path: Path):
    """The reference computes in float32, where time_uniform cancels and rho = 1 loses the end."""
    compared = 0
    for key, golden in json.loads(path.read_text()).items():
        kind, *options = key.split("|")
        if not options or kind not in GRID_KINDS:
            continue
        option = {name: float(value) for name, value in (o.split("=") for o in options)}
        grid = Schedule(
            kind=kind, rho=option["rho"], sigma_min=option["smin"], sigma_max=option["smax"]
        ).grid(int(option["n"]) - 1)
        reference = torch.tensor(golden["t"], dtype=torch.float64)
        rtol, atol = (5e-5, 1.4e-5) if kind == "time_uniform" else (2e-6, 4e-6)
        bound = rtol * reference + atol
        assert bool(((grid - reference).abs() <= bound).all()), key
        compared += 1
    assert compared > 100


@pytest.mark.parametrize("path", discover("unetblock.json"))
def test_unet_blocks(path: Path):
    data = tensors(path)
    for name, options in settings(path).items():
        block = UNetBlock(**{k: v for k, v in options.items() if k != "heads"}).eval()
        prefix = f"{name}.param."
        block.load_state_dict(
            {k.removeprefix(prefix): v for k, v in data.items() if k.startswith(prefix)}
        )
        x, emb = data[f"{name}.x"].requires_grad_(), data[f"{name}.emb"].requires_grad_()
        y = block(x, emb)
        y.backward(data[f"{name}.gy"])
        close(y.detach(), data[f"{name}.y"], atol=1e-5)
        close(x.grad, data[f"{name}.gx"], rtol_of_max=1e-5)
        close(emb.grad, data[f"{name}.gemb"], rtol_of_max=1e-5)
        for parameter, value in block.named_parameters():
            close(value.grad, data[f"{name}.grad.{parameter}"], rtol_of_max=1e-5)


@pytest.mark.parametrize("path", discover("edm-*.io.safetensors"))
def test_network_outputs(path: Path):
    """A level a call with and without labels, all levels in one call, and F itself."""
    name = path.name.removesuffix(".io.safetensors")
    net, data = golden_network(name), tensors(path.with_suffix(".safetensors"))
    labels, mixed_labels = data.get("class_labels"), data.get("mixed.class_labels")

    moved = json.loads((path.parent / "edm-nets.json").read_text())[name]
    moved = moved["io_abs_change_for_1ulp_input"]

    def atol(sigma: torch.Tensor) -> float:
        # VP's D = x - sigma F is large where sigma is: no CPU repeats it closer than 2 ulps of x.
        return max(1e-5, 2 * moved[f"{sigma.item():.3g}"])

    with torch.no_grad():
        for x, sigma, i in zip(data["x"], data["sigma"], range(len(data["x"])), strict=True):
            close(net(x, sigma, labels), data["out"][i], atol=atol(sigma))
            if "augment.labels" in data:
                out = net(x, sigma, labels, augment_labels=data["augment.labels"])
                close(out, data["augment.out"][i], atol=atol(sigma))
            if "nolabel.out" in data:
                close(net(x, sigma), data["nolabel.out"][i], atol=atol(sigma))
        mixed = net(data["mixed.x"], data["mixed.sigma"], mixed_labels)
        for out, golden, sigma in zip(mixed, data["mixed.out"], data["mixed.sigma"], strict=True):
            close(out, golden, atol=atol(sigma))
        raw = net.model(data["raw5.cin_x"], data["raw5.c_noise"].flatten(), labels)
        close(raw, data["raw5.F"], atol=1e-5)


@pytest.mark.parametrize("path", discover("solvers-*.safetensors"))
def test_solvers(path: Path):
    family = path.stem.removeprefix("solvers-")
    table, data = json.loads((path.parent / "solvers.json").read_text())[family], tensors(path)
    # The reference fails on some settings, and has no numbers for them.
    variants = {key: entry for key, entry in table.items() if "error" not in entry}
    assert {f"{key}.traj" for key in variants} == {key for key in data if key.endswith(".traj")}
    net = golden_network("edm-song-tiny")
    for key, entry in variants.items():
        solver = solver_from(family, entry["kwargs"], thresholding=entry["thresholding"])
        schedule = Schedule(kind=entry.get("typ", "polynomial"), rho=entry.get("rho", 7.0))
        num_intervals = int(key.rsplit(".n", 1)[1]) - 1
        grid = schedule.grid(num_intervals)
        calls = 0

        def counted(x, sigma):
            nonlocal calls
            calls += 1
            return net(x, sigma)

        afs, to_zero = bool(entry.get("afs")), bool(entry.get("dz"))
        denoise = analytical_first_step(counted, grid[0]) if afs else counted
        states = trajectory(solver, denoise, grid[0] * data["latents"], grid)
        if to_zero:
            with torch.no_grad():
                states = torch.cat([states, denoise(states[-1], grid[-1])[None]])
        assert calls == entry["nfe"] == solver.nfe(num_intervals) - afs + to_zero, key
        for state, golden in zip(states, data[f"{key}.traj"], strict=True):
            close(state, golden, rtol_of_max=1e-5, atol=20 * entry["sens_last"])


# The file has no settings beside it: the reference's defaults, as its author ran each half.
@pytest.mark.parametrize("path", discover("sampling.safetensors"))
@pytest.mark.parametrize(
    ("half", "name", "sampler"),
    [
        ("uncond", "song", Sampler(num_intervals=3, afs=True)),
        ("cond", "dhariwal", Sampler(num_intervals=4, afs=False)),
    ],
)
def test_sampling(path: Path, half: str, name: str, sampler: Sampler):
    """The reference sampler, down to the written bytes."""
    data, net = tensors(path), golden_network(f"edm-{name}-tiny")
    condition = None
    if net.label_dim:
        condition = TensorCondition(
            "class_labels", F.one_hot(data[f"{half}.label_idx"], net.label_dim).float()
        )
    images = sampler(net.given(condition), data[f"{half}.latents"])
    close(images, data[f"{half}.images_f32"], atol=1e-5)
    assert torch.equal(to_uint8(images).permute(0, 2, 3, 1), data[f"{half}.images_u8"])
