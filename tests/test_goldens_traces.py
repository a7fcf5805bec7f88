"""Whole short trainings against the SFD reference; settings come from each file's own JSON."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from bdense.diffusion.branches import export_branch, widen_head
from bdense.diffusion.conditions import Condition, TensorCondition, Unconditional
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.intervals import IntervalGrid
from bdense.diffusion.sampling import Sampler
from bdense.diffusion.schedules import Schedule
from bdense.diffusion.step_condition import with_step_condition
from bdense.methods.sfd import SFDConfig, SFDStage, branch_losses, branch_states
from bdense.methods.trajectories import Trajectories
from bdense.randomness import Stream
from bdense.training.loop import IterationReport, train
from bdense.weights.weighting import FixedWeights
from tests.goldens import close, discover, golden_network, settings, tensors
from tests.test_goldens_sfd import solver_from

pytestmark = pytest.mark.golden


class TrajectoriesFromFile(Trajectories):
    """Live trajectories whose random draws are those of a golden file."""

    def __init__(self, info: dict, data: dict):
        config = info["config"]
        teacher = golden_network(config["net"])
        second = config["second"]
        super().__init__(
            teacher=teacher,
            grid=grid_of(config, data, config["num_steps"] - 1),
            solver=solver_from(config["sampler_tea"], config, thresholding=config["thresh"]),
            batch=data["noise"].shape[1],
            count=len(data["noise"]),
            seed=0,
            conditions=teacher.conditions,
            teacher_afs=bool(second and second["afs"]),
        )
        object.__setattr__(self, "file", (config, data))

    def beginning(self, iteration: int, images: slice):
        """Without AFS as the reference does: from 80 times the noise, whatever its grid's t_0."""
        grid, start, condition = super().beginning(iteration, images)
        return grid, start if grid.afs else 80 * self.noise(iteration)[images], condition

    def grid_at(self, iteration: int) -> IntervalGrid:
        config, data = self.file
        return grid_of(config, data, int(data["num_steps"][iteration]) - 1)

    def noise(self, iteration: int) -> torch.Tensor:
        return self.file[1]["noise"][iteration]

    def condition(self, iteration: int) -> Condition:
        if not self.teacher.label_dim:
            return Unconditional()
        index = self.file[1]["label_idx"][iteration]
        return TensorCondition("class_labels", F.one_hot(index, self.teacher.label_dim).float())


class Float32Grid(IntervalGrid):
    """The reference's levels, rounded to float32 as it computes them, for runs without AFS.

    There some pixels of a branch start within rounding of their targets, and L1 gradients are
    signs: a level that is off by one bit flips some. Our own levels are checked beside these.
    """

    levels: torch.Tensor

    def own_fine(self) -> torch.Tensor:
        return super().fine()

    def fine(self) -> torch.Tensor:
        own = self.own_fine()
        return own if self.afs else self.levels.double()


def grid_of(config: dict, data: dict, num_intervals: int) -> IntervalGrid:
    grid = Float32Grid(
        num_intervals=num_intervals,
        substeps=config["M"] + 1,
        afs=config["afs"],
        schedule=Schedule(kind=config["schedule_type"], rho=config["schedule_rho"]),
    )
    object.__setattr__(grid, "levels", data["t_steps_teacher"])
    return grid


def start_of(path: Path, info: dict, data: dict, teacher: NetworkDenoiser) -> NetworkDenoiser:
    """What the student is a copy of: the teacher, with the file's step layers where it has any."""
    if not info["config"]["step_cond"]:
        return teacher
    start = with_step_condition(teacher, seed=0)
    layers = {k.removeprefix("init."): v for k, v in data.items() if k.startswith("init.model.")}
    added = start.state_dict().keys() - teacher.state_dict().keys()
    assert layers.keys() == added, path
    start.load_state_dict(start.state_dict() | layers)
    return start


@pytest.fixture
def reference_dropout(monkeypatch):
    """The golden's own seeds: 9000 + 100 * iteration + step, set before each student step."""

    class Seeded:
        def __init__(self, device, seed, stream, iteration, n):
            assert stream is Stream.DROPOUT
            self.seed = 9000 + 100 * iteration + n

        def __enter__(self):
            torch.manual_seed(self.seed)

        def __exit__(self, *_):
            return None

    monkeypatch.setattr("bdense.training.loop.seeded", Seeded)


def is_noisy(info: dict) -> bool:
    """Whether gradients of pure rounding noise count: L1, of branches that start at their targets.

    Another CPU, or oneDNN kept to SSE4.1 on the same one, moves losses by 2e-5 of their maximum.
    """
    return info["K"] > 1 and info["config"]["a"] == 0


def compare_losses(reports: list[IterationReport], info: dict, data: dict) -> None:
    tolerance = {"rtol_of_max": 1e-4 if is_noisy(info) else 1e-5}
    assert [report.lr for report in reports] == pytest.approx(data["lr"].tolist())
    first = 1 if info["config"]["afs"] else 0
    for i, report in enumerate(reports):
        intervals = slice(first, int(data["num_steps"][i]) - 1)
        golden = data["loss_opt"][i]
        assert len(report.branch_losses) == int((~golden[first:].isnan()).sum())
        weighted = (report.branch_losses * report.weights).sum(-1)
        close(weighted, golden[intervals], **tolerance)
        if "loss_branch" in data:
            close(report.branch_losses, data["loss_branch"][i][intervals], **tolerance)


@pytest.mark.parametrize("path", discover("*trace*.safetensors"))
def test_trace(path: Path, reference_dropout):
    """Teacher, losses, first gradients, and the student at the end."""
    info, data = settings(path), tensors(path)
    config, num_branches = info["config"], info["K"]
    trajectories = TrajectoriesFromFile(info, data)
    teacher, grid = trajectories.teacher, trajectories.grid_at(0)
    weights = torch.tensor(info.get("weights") or [1.0], dtype=torch.float64)
    assert isinstance(grid, Float32Grid)
    own = grid.own_fine()
    close(own, data["t_steps_teacher"].double(), rtol_of_max=2e-6)
    close(own[:: grid.substeps], data["t_steps_student"].double(), rtol_of_max=2e-6)

    walk = trajectories[0]
    golden_walk = data["teacher_traj_iter0"]
    close(walk.start, golden_walk[0], rtol_of_max=1e-6)
    for row, golden in zip(walk.states, golden_walk[-grid.num_rows :], strict=True):
        close(row, golden, rtol_of_max=2e-5)
    start = start_of(path, info, data, teacher)
    if not config["dropout"]:
        check_first_gradient(start, walk, weights, info, data)

    reports: list[IterationReport] = []
    assert len(weights) == num_branches
    stage = SFDStage(
        config=SFDConfig(
            kimg=config["iters"] * config["B"] / 1000,
            batch=config["B"],
            substeps=grid.substeps,
            lr=config["lr"],
            dropout=config["dropout"],
        ),
        trajectories=trajectories,
        start=start,
    )
    student = train(stage, FixedWeights(weights), on_iteration=reports.append)
    compare_losses(reports, info, data)
    head = student.get_submodule(info["grad0_names"]["head"])
    close(head.weight.detach(), data["final.head.weight"], atol=1e-4)
    assert sum(p.numel() for p in export_branch(student).parameters()) == sum(
        p.numel() for p in start.parameters()
    )
    atol = 1e-4 if config["afs"] and not is_noisy(info) else 4e-3
    for suffix in probes(data):
        compare_outputs(suffix, start, student, grid, data, atol)


def probes(data: dict) -> list[str]:
    """The endings of the probe arrays: one for each N of SFD-v, else the empty one."""
    return [k.removeprefix("samples_final") for k in data if k.startswith("samples_final")]


@torch.no_grad()
def compare_outputs(
    suffix: str,
    start: NetworkDenoiser,
    student: NetworkDenoiser,
    grid: IntervalGrid,
    data: dict,
    atol: float,
) -> None:
    points = int(suffix.removeprefix(".step")) if suffix else grid.num_points
    told = points if student.step_condition else None
    labels = data.get("probe_labels")
    for i, sigma in enumerate(data["probe_sigma"]):
        out = student.branches(data["probe_x"][i], sigma, labels, num_points=told)
        golden = data[f"probe_out_final{suffix}"][i]
        close(out if student.num_branches > 1 else out[:, 0], golden, atol=atol)
    sampler = Sampler(num_intervals=points - 1, afs=grid.afs, schedule=grid.schedule)
    labelled = "sample_labels" in data
    condition = TensorCondition("class_labels", data["sample_labels"]) if labelled else None
    for when, net in (("init", start), ("final", export_branch(student))):
        drawn = sampler(net.given(condition, sampler.num_points), data["sample_noise"])
        close(drawn, data[f"samples_{when}{suffix}"], atol=1e-4 if when == "init" else atol)


def check_first_gradient(start: NetworkDenoiser, walk, weights, info: dict, data: dict) -> None:
    """Gradient of the first trained interval, and the student's state after it."""
    student, grid = widen_head(start, info["K"]), walk.grid
    n = grid.trained.start
    x = data["student_states_iter0"][n - 1] if n else walk.start
    told = {"num_points": grid.num_points} if student.step_condition else {}
    told |= walk.condition.arguments()
    states = branch_states(student.branches, x, grid.interval(n), **told)
    losses = branch_losses(states, walk.states[: grid.substeps])
    (weights.to(losses) * losses).sum().backward()
    close(states[:, -1].detach(), data["student_states_iter0"][n], rtol_of_max=1e-5)
    names = info["grad0_names"]
    head = student.get_submodule(names["head"])
    close(head.weight.grad, data["grad0.head.weight"], rtol_of_max=1e-5)
    close(head.bias.grad, data["grad0.head.bias"], rtol_of_max=1e-5)
    first_conv = student.get_parameter(names["first_conv"])
    close(first_conv.grad, data["grad0.first_conv.weight"], rtol_of_max=1e-5)
