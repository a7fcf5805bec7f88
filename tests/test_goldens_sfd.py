"""The engine against data made by the SFD reference; settings come from each file's own JSON."""

import json
from pathlib import Path

import pytest
import torch

from bdense.branches import export_branch, widen_head
from bdense.networks.layers import UNetBlock
from bdense.sampling import Sampler, to_uint8
from bdense.schedules import Schedule
from bdense.sfd import SFDConfig, branch_losses, branch_states, distill
from bdense.solvers import DPMSolverPP, Euler, Solver, analytical_first_step, trajectory
from bdense.trajectories import IntervalGrid, LiveTrajectories, Walk
from tests.goldens import close, discover, golden_network, settings, tensors

pytestmark = pytest.mark.golden

GRID_KINDS = ("polynomial", "logsnr", "time_uniform")


def solver_from(name: str, config: dict, *, thresholding: bool) -> Solver:
    if name == "euler":
        return Euler()
    if name == "dpmpp" and config.get("predict_x0", True):
        return DPMSolverPP(
            max_order=config["max_order"],
            lower_order_final=config.get("lower_order_final", True),
            thresholding=thresholding,
        )
    pytest.skip(f"solver {name} with predict_x0={config.get('predict_x0')} is not built yet")


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
    name = path.name.removesuffix(".io.safetensors")
    net, data = golden_network(name), tensors(path.with_suffix(".safetensors"))
    labels = data.get("class_labels")
    with torch.no_grad():
        for i, sigma in enumerate(data["sigma"]):
            close(net(data["x"][i], sigma, labels), data["out"][i], atol=1e-5)
            if "augment.labels" in data:
                out = net(data["x"][i], sigma, labels, data["augment.labels"])
                close(out, data["augment.out"][i], atol=1e-5)
            if "nolabel.out" in data:
                close(net(data["x"][i], sigma), data["nolabel.out"][i], atol=1e-5)
        mixed = net(data["mixed.x"], data["mixed.sigma"], data.get("mixed.class_labels"))
        close(mixed, data["mixed.out"], atol=1e-5)
        raw = net.model(data["raw5.cin_x"], data["raw5.c_noise"].flatten(), labels)
        close(raw, data["raw5.F"], atol=1e-5)


@pytest.mark.parametrize("path", discover("solvers-*.safetensors"))
def test_solvers(path: Path):
    family = path.stem.removeprefix("solvers-")
    table, data = json.loads((path.parent / "solvers.json").read_text())[family], tensors(path)
    variants = {
        key: entry
        for key, entry in table.items()
        if "error" not in entry and f"{key}.traj" in data
    }
    if family not in ("euler", "dpmpp"):
        pytest.skip(f"solver {family} is not built yet")
    net, compared = golden_network("edm-song-tiny"), 0
    for key, entry in variants.items():
        if not entry["kwargs"].get("predict_x0", True):
            continue  # noise prediction is not built yet
        solver = solver_from(family, entry["kwargs"], thresholding=entry["thresholding"])
        points = int(key.rsplit(".n", 1)[1])
        grid = Schedule(kind=entry.get("typ", "polynomial"), rho=entry.get("rho", 7.0)).grid(
            points - 1
        )
        calls = 0

        def counted(x, sigma):
            nonlocal calls
            calls += 1
            return net(x, sigma)

        denoise = analytical_first_step(counted, grid[0]) if entry.get("afs") else counted
        states = trajectory(
            solver, denoise, grid[0] * data["latents"], grid, denoise_to_zero=bool(entry.get("dz"))
        )
        golden = data[f"{key}.traj"]
        assert calls == entry["nfe"], key
        for row in range(len(golden)):
            close(states[row], golden[row], rtol_of_max=1e-5, atol=20 * entry["sens_last"])
        compared += 1
    assert compared > 0


def trace_settings(path: Path) -> dict:
    """The JSON of a trace; the test is skipped where it needs what is not built yet."""
    info = settings(path)
    config = info["config"]
    for option in ("step_cond", "second", "dropout"):
        if config[option]:
            pytest.skip(f"{option} is not built yet")
    if "label_idx" in info["schema"]:
        pytest.skip("class-conditional distillation is not built yet")
    return info


class NoiseFromFile(LiveTrajectories):
    """Live trajectories that start from the noise of a golden file."""

    def __init__(self, noise: torch.Tensor, **kwargs):
        super().__init__(**kwargs, batch=noise.shape[1], count=len(noise), seed=0)
        object.__setattr__(self, "file_noise", noise)

    def noise(self, iteration: int) -> torch.Tensor:
        return self.file_noise[iteration]


def trace_trajectories(config: dict, data: dict) -> NoiseFromFile:
    grid = IntervalGrid(
        num_intervals=config["num_steps"] - 1,
        substeps=config["M"] + 1,
        afs=config["afs"],
        schedule=Schedule(kind=config["schedule_type"], rho=config["schedule_rho"]),
    )
    solver = solver_from(config["sampler_tea"], config, thresholding=config["thresh"])
    return NoiseFromFile(
        data["noise"], teacher=golden_network(config["net"]), grid=grid, solver=solver
    )


@pytest.mark.parametrize("path", discover("*-trace-*.safetensors"))
def test_trace(path: Path):
    """Whole short trainings: teacher, losses, first gradients, and the student at the end."""
    info, data = trace_settings(path), tensors(path)
    config, num_branches = info["config"], info["K"]
    trajectories = trace_trajectories(config, data)
    grid, teacher = trajectories.grid, trajectories.teacher
    weights = torch.tensor(info.get("weights") or [1.0], dtype=torch.float64)
    # Without AFS, branches that start at their targets have L1 gradients of pure rounding noise.
    loose = not config["afs"] and config["a"] == 0
    close(grid.student(), data["t_steps_student"].double(), rtol_of_max=2e-6)
    close(grid.fine(), data["t_steps_teacher"].double(), rtol_of_max=2e-6)

    walk = trajectories[0]
    golden_walk = data["teacher_traj_iter0"]
    close(walk.start, golden_walk[0], rtol_of_max=1e-6)
    for row, golden in zip(walk.states, golden_walk[-grid.num_rows :], strict=True):
        close(row, golden, rtol_of_max=2e-5)
    check_first_gradient(teacher, walk, grid, weights, info, data)

    reports = []
    train = SFDConfig(
        num_branches=num_branches,
        images=config["iters"] * config["B"],
        lr=config["lr"],
        dropout=config["dropout"],
    )
    student = distill(teacher, trajectories, train, weights, on_iteration=reports.append)
    assert [report.lr for report in reports] == pytest.approx(data["lr"].tolist())
    losses = torch.stack([report.branch_losses for report in reports])
    first = grid.trained.start
    tolerance = 1e-4 if loose else 1e-5
    close((losses * weights).sum(-1), data["loss_opt"][:, first:], rtol_of_max=tolerance)
    if "loss_branch" in data:
        close(losses, data["loss_branch"][:, first:], rtol_of_max=tolerance)

    atol = 1e-4 if config["afs"] else 4e-3
    with torch.no_grad():
        for i, sigma in enumerate(data["probe_sigma"]):
            out = student.branches(data["probe_x"][i], sigma)
            golden = data["probe_out_final"][i]
            close(out if num_branches > 1 else out[:, 0], golden, atol=atol)
    sampler = Sampler(num_intervals=grid.num_intervals, afs=grid.afs, schedule=grid.schedule)
    exported = export_branch(student)
    close(sampler(teacher, data["sample_noise"]), data["samples_init"], atol=1e-4)
    close(sampler(exported, data["sample_noise"]), data["samples_final"], atol=atol)
    head = student.get_submodule(info["grad0_names"]["head"])
    close(head.weight.detach(), data["final.head.weight"], atol=1e-4)
    assert sum(p.numel() for p in exported.parameters()) == sum(
        p.numel() for p in teacher.parameters()
    )


def check_first_gradient(
    teacher, walk: Walk, grid: IntervalGrid, weights, info: dict, data: dict
) -> None:
    """Gradient of the first trained interval, and the student's state after it."""
    student = widen_head(teacher, info["K"])
    n = grid.trained.start
    x = data["student_states_iter0"][n - 1] if n else walk.start
    states = branch_states(student, x, grid.interval(n))
    losses = branch_losses(states, walk.states[: grid.substeps])
    (weights.to(losses) * losses).sum().backward()
    close(states[:, -1].detach(), data["student_states_iter0"][n], rtol_of_max=1e-5)
    names = info["grad0_names"]
    head = student.get_submodule(names["head"])
    close(head.weight.grad, data["grad0.head.weight"], rtol_of_max=1e-5)
    close(head.bias.grad, data["grad0.head.bias"], rtol_of_max=1e-5)
    first_conv = student.get_parameter(names["first_conv"])
    close(first_conv.grad, data["grad0.first_conv.weight"], rtol_of_max=1e-5)


@pytest.mark.parametrize("path", discover("sampling.safetensors"))
def test_sampling(path: Path):
    """The reference sampler at its defaults (4 time stamps, AFS), down to the written bytes.

    The file's class-conditional half needs a network that is not built yet.
    """
    data, net = tensors(path), golden_network("edm-song-tiny")
    sampler = Sampler(num_intervals=3, afs=True)
    images = sampler(net, data["uncond.latents"])
    close(images, data["uncond.images_f32"], atol=1e-5)
    assert torch.equal(to_uint8(images).permute(0, 2, 3, 1), data["uncond.images_u8"])
