"""Whole short trainings of latent students with guidance; settings come from each file's JSON."""

from pathlib import Path

import pytest
import torch

from bdense.diffusion.branches import export_branch
from bdense.diffusion.conditions import Condition, Conditions, Prompts
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.sampling import Sampler
from bdense.diffusion.solvers import make_solver, trajectory
from bdense.methods.method import Inputs
from bdense.methods.sfd import SFD, SFDConfig, SFDStage, branch_states
from bdense.methods.trajectories import LiveTrajectories
from bdense.training.loop import IterationReport, train
from bdense.weights.weighting import FixedWeights
from tests.goldens import close, settings, tensors
from tests.latent_goldens import condition_of, in_both_types, latent_files, network_of

pytestmark = pytest.mark.golden


class TrajectoriesFromFile(LiveTrajectories):
    """The method's own trajectories, with noise and conditions of a golden file."""

    def __init__(self, own: LiveTrajectories, data: dict):
        fields = ("teacher", "grid", "solver", "batch", "count", "seed", "conditions", "guidance")
        super().__init__(**{name: getattr(own, name) for name in fields})
        object.__setattr__(self, "data", data)

    def noise(self, iteration: int) -> torch.Tensor:
        return self.data["noise"][iteration]

    def condition(self, iteration: int) -> Condition:
        bank = self.data.get("bank")
        rows = None if bank is None else bank[self.data["bank_index"][iteration]]
        return condition_of(self.teacher, rows)


def config_of(info: dict) -> SFDConfig:
    solver = info["solver"]
    kind = info["grid"].rstrip("0123456789")
    return SFDConfig(
        nfe=info["num_intervals"] - info["afs"],
        afs=info["afs"],
        substeps=info["substeps"],
        solver=solver["name"],
        order=solver.get("order"),
        thresholding=solver.get("thresholding", False),
        schedule=kind,
        rho=float(info["grid"].removeprefix(kind)),
        sigma_min=info["sigma_min"],
        sigma_max=info["sigma_max"],
        guidance_teacher=info["guidance_teacher"],
        guidance_student=info["guidance_student"],
        kimg=info["total_images"] / 1000,
        batch=info["batch"],
        lr=info["lr"],
        dropout=False,
    )


def told_by(data: dict) -> Conditions | None:
    """Prompts where the bank holds texts; a teacher's own classes, or nothing, else."""
    bank = data.get("bank")
    is_text = bank is not None and bank.is_floating_point()
    return Prompts(bank, data["null"]) if is_text else None


def sampled(
    denoiser: NetworkDenoiser, stage: SFDStage, data: dict, scale: float, noise: torch.Tensor
) -> torch.Tensor:
    """The student's walk from ``noise``, with the first conditions of the bank."""
    own = stage.sampler
    sampler = Sampler(
        num_intervals=own.num_intervals, afs=own.afs, schedule=own.schedule, guidance=scale
    )
    bank, null = data.get("bank"), data.get("null")
    rows = None if bank is None else bank[: len(noise)]
    condition = condition_of(denoiser, rows)
    empty = condition_of(denoiser, null)
    denoise = denoiser.given(condition, sampler.num_points, guidance=scale, null=empty)
    return sampler(denoise, noise.to(next(denoiser.parameters())))


@latent_files("trace-*.safetensors")
@in_both_types
def test_trace(path: Path, dtype: torch.dtype):
    """Levels, the teacher's walk, losses, first gradients, the student's head and its samples."""
    info, data = settings(path), tensors(path)
    is_double = dtype == torch.float64
    teacher, config = network_of(info, dtype), config_of(info)
    inputs = Inputs(seed=info["seed"], conditions=told_by(data))
    method = SFD()
    method.check(config, teacher, {})
    (plan,) = method.plan(config)
    stage = method.stage(plan, teacher, config, inputs)
    trajectories = TrajectoriesFromFile(stage.trajectories, data)
    stage = SFDStage(config=config, trajectories=trajectories, start=teacher, seed=info["seed"])
    grid, weights = trajectories.grid, torch.tensor(info["weights"], dtype=torch.float64)
    assert plan.nfe == stage.sampler.nfe
    close(grid.fine(), data["levels"], rtol_of_max=1e-12)

    batch = stage.batch(0, slice(None))
    walk = data["teacher_walk_0"]
    near = 1e-6 if is_double else 1e-4
    close(batch.start, walk[0], rtol_of_max=near)
    for row, golden in zip(batch.states, walk[len(walk) - grid.num_rows :], strict=True):
        close(row, golden, rtol_of_max=near)

    gradients, ends, reports = {}, [], []

    def watch(report: IterationReport) -> None:
        reports.append(report)

    head_name = f"{teacher.model.part}.{info['head']}"
    assert teacher.model.head_name == head_name
    first = first_update(stage, batch, info)
    student, states = first
    head = student.model.get_submodule(head_name)
    for name in ("weight", "bias"):
        close(getattr(head, name).detach(), data[f"head.init.{name}"], rtol_of_max=1e-6)
    losses = states.losses
    (weights.to(losses.per_branch) * losses.per_branch).sum().backward()
    gradients = {name: getattr(head, name).grad for name in ("weight", "bias")}
    for name, gradient in gradients.items():
        close(gradient, data[f"grad0.head.{name}"], rtol_of_max=1e-9 if is_double else 2e-5)
    ends = states.branches.transpose(0, 1)
    close(ends.detach(), data["ends_0"], rtol_of_max=near)

    trained = train(stage, FixedWeights(weights), on_iteration=watch)
    assert [report.lr for report in reports] == pytest.approx(data["lr"].tolist())
    rtol = 1e-7 if is_double else 5e-3
    for i, report in enumerate(reports):
        golden = data["loss_branch"][i][grid.trained.start :]
        torch.testing.assert_close(report.branch_losses, golden, rtol=rtol, atol=0)
        weighted = (report.branch_losses * report.weights).sum(-1)
        optimised = data["loss_opt"][i][grid.trained.start :]
        torch.testing.assert_close(weighted, optimised, rtol=rtol, atol=0)
    head = trained.model.get_submodule(head_name)
    if is_double:
        for name in ("weight", "bias"):
            close(getattr(head, name).detach(), data[f"head.final.{name}"], atol=1e-6)
    compare_outputs(teacher, trained, stage, info, data, 1e-6 if is_double else 2e-2)


class _First:
    """States and losses of the first trained interval."""

    def __init__(self, branches: torch.Tensor, losses):
        self.branches, self.losses = branches, losses


def first_update(stage: SFDStage, batch, info: dict) -> tuple[NetworkDenoiser, _First]:
    """The student before training, and its first update with gradients."""
    from bdense.diffusion.branches import widen_head

    student = widen_head(stage.start, info["num_branches"])
    update = next(stage.updates(0, batch))
    kept: list[torch.Tensor] = []

    def branches(*args, **given):
        kept.append(student.branches(*args, **given))
        return kept[-1]

    losses = update(branches)
    from bdense.diffusion.guidance import guided

    with torch.no_grad():
        predict = guided(student.branches, update.guidance, update.null)
        states = branch_states(predict, update.x, update.levels, **update.given)
    return student, _First(states, losses)


@torch.no_grad()
def compare_outputs(
    teacher: NetworkDenoiser,
    trained: NetworkDenoiser,
    stage: SFDStage,
    info: dict,
    data: dict,
    tolerance: float,
) -> None:
    """Predictions and samples of the student, and of the teacher on the same walk."""
    like = next(teacher.parameters())
    x, sigma = data["probe.x"].to(like), data["probe.sigma"]
    rows = data["bank"][: len(x)] if "bank" in data else None
    told = condition_of(teacher, rows).arguments()
    found = trained.branches(x, sigma, **told).transpose(0, 1)
    close(found, data["probe.final"], rtol_of_max=tolerance)
    is_double = like.dtype == torch.float64
    close(
        teacher(x, sigma, **told), data["probe.teacher"], rtol_of_max=1e-6 if is_double else 2e-5
    )
    student, noise = export_branch(trained), data["sample.noise"]
    scale = info["guidance_sample"]
    for name, net, guidance, bound in (
        ("sample.plain", student, 1.0, tolerance),
        ("sample.guided", student, scale, tolerance),
        ("sample.teacher_guided", teacher, scale, 1e-6 if is_double else 1e-5),
    ):
        close(sampled(net, stage, data, guidance, noise), data[name], rtol_of_max=bound)


@latent_files("refrun-trace-*.safetensors")
def test_the_references_own_training(path: Path):
    """The SFD reference's losses, gradients and head in float32, against ours in float64."""
    plain = path.with_name(path.name.removeprefix("refrun-"))
    info, data, reference = settings(plain), tensors(plain), tensors(path)
    teacher, config = network_of(info, torch.float64), config_of(info)
    inputs = Inputs(seed=info["seed"], conditions=told_by(data))
    stage = SFD().stage(SFD().plan(config)[0], teacher, config, inputs)
    trajectories = TrajectoriesFromFile(stage.trajectories, data)
    stage = SFDStage(config=config, trajectories=trajectories, start=teacher, seed=info["seed"])
    grid, weights = trajectories.grid, torch.tensor(info["weights"], dtype=torch.float64)
    last = stage.batch(len(trajectories) - 1, slice(None))
    ends = last.states[grid.substeps - 1 :: grid.substeps]
    close(ends, reference["reference.teacher_ends_last"][grid.trained.start :], rtol_of_max=1e-5)
    student, first = first_update(stage, stage.batch(0, slice(None)), info)
    losses = first.losses.per_branch
    (weights.to(losses) * losses).sum().backward()
    head = student.model.get_submodule(student.model.head_name)
    close(head.weight.grad, reference["reference.grad0.head.weight"], rtol_of_max=1e-5)
    reports: list[IterationReport] = []
    trained = train(stage, FixedWeights(weights), on_iteration=reports.append)
    for i, report in enumerate(reports):
        weighted = (report.branch_losses * report.weights).sum(-1)
        golden = reference["reference.loss_opt"][i][grid.trained.start :]
        torch.testing.assert_close(weighted, golden, rtol=5e-4, atol=0)
    head = trained.model.get_submodule(trained.model.head_name)
    close(head.weight.detach(), reference["reference.head.final.weight"], atol=1e-4)


def test_levels_of_the_teachers_solver_are_the_students_too():
    """A guided walk ends where the unguided one does not."""
    assert trajectory is not None
    assert make_solver("euler").name == "euler"
