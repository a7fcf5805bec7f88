"""Whole short trainings of latent students with guidance; settings come from each file's JSON."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from bdense.diffusion.branches import export_branch, widen_head
from bdense.diffusion.conditions import Condition, Conditions, Prompts
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.guidance import guided
from bdense.diffusion.intervals import IntervalGrid
from bdense.methods.method import Inputs
from bdense.methods.sfd import SFD, SFDConfig, SFDStage, branch_states
from bdense.methods.trajectories import Trajectories
from bdense.training.loop import IterationReport, train
from bdense.weights.weighting import FixedWeights
from tests.goldens import close, settings, tensors
from tests.latent_goldens import condition_of, in_both_types, latent_files, network_of

pytestmark = pytest.mark.golden


class TrajectoriesFromFile(Trajectories):
    """The method's own trajectories, with noise and conditions of a golden file."""

    def __init__(self, own: Trajectories, data: dict):
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
    sampler = replace(stage.sampler, guidance=scale)
    bank, null = data.get("bank"), data.get("null")
    rows = None if bank is None else bank[: len(noise)]
    condition = condition_of(denoiser, rows)
    empty = condition_of(denoiser, null)
    denoise = denoiser.given(condition, sampler.num_points, guidance=scale, null=empty)
    return sampler(denoise, noise.to(next(denoiser.parameters())))


@dataclass(frozen=True)
class Tolerances:
    """Of README's columns, relative to the maximum unless said."""

    walk: float
    loss: float  # element by element
    gradient: float
    end: float  # samples and predictions of the trained student
    teacher: float
    weights: float | None  # absolute; None: rounding decides


# A network embeds its time in float32 whatever its type, by exp and sin that CPUs round otherwise.
FLOAT64 = Tolerances(walk=1e-6, loss=1e-7, gradient=1e-9, end=1e-6, teacher=1e-6, weights=1e-6)
OTHER_CPU = Tolerances(walk=1e-5, loss=5e-3, gradient=2e-5, end=2e-2, teacher=1e-5, weights=None)
FLOAT32 = Tolerances(walk=1e-4, loss=5e-3, gradient=2e-5, end=2e-2, teacher=1e-5, weights=None)


@torch.no_grad()
def tolerances_for(teacher: NetworkDenoiser, data: dict) -> Tolerances:
    """Strict where this CPU embeds a time as the one that made the file."""
    like = next(teacher.parameters())
    if like.dtype == torch.float32:
        return FLOAT32
    golden = data["probe.teacher"]
    found = teacher(data["probe.x"], data["probe.sigma"], **probed(teacher, data))
    off = (found - golden).abs().max() / golden.abs().max()
    assert off < 5e-6
    return FLOAT64 if off < 1e-12 else OTHER_CPU


def probed(teacher: NetworkDenoiser, data: dict) -> Mapping[str, torch.Tensor]:
    """The first conditions of the bank."""
    rows = data["bank"][: len(data["probe.x"])] if "bank" in data else None
    return condition_of(teacher, rows).arguments()


def stage_of(info: dict, data: dict, dtype: torch.dtype) -> SFDStage:
    """The method's own stage, with the draws of a file."""
    teacher, config = network_of(info, dtype), config_of(info)
    method = SFD()
    method.check(config, teacher, {})
    (plan,) = method.plan(config)
    inputs = Inputs(seed=info["seed"], conditions=told_by(data))
    own = method.stage(plan, teacher, config, inputs)
    assert plan.nfe == own.sampler.nfe
    return replace(own, trajectories=TrajectoriesFromFile(own.trajectories, data))


def first_update(
    stage: SFDStage, weights: torch.Tensor
) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """The head with its first gradients, the branches' ends and losses of that update."""
    student = widen_head(stage.start, len(weights))
    update = next(stage.updates(0, stage.batch(0, slice(None))))
    losses = update(student.branches).per_branch
    (weights.to(losses) * losses).sum().backward()
    with torch.no_grad():
        predict = guided(student.branches, update.guidance, update.null)
        states = branch_states(predict, update.x, update.levels, **update.given)
    head = student.model.get_submodule(student.model.head_name)
    return head, states.transpose(0, 1), losses


def compare_losses(
    reports: list[IterationReport], first: int, golden: torch.Tensor, rtol: float
) -> None:
    """Weighted sums [iterations, N]; of an interval without network there is none."""
    for report, row in zip(reports, golden, strict=True):
        weighted = (report.branch_losses * report.weights).sum(-1)
        torch.testing.assert_close(weighted, row[first:], rtol=rtol, atol=0)


@latent_files("trace-*.safetensors")
@in_both_types
def test_trace(path: Path, dtype: torch.dtype):
    """Levels, the teacher's walk, losses, first gradients, the student's head and its samples."""
    info, data = settings(path), tensors(path)
    stage = stage_of(info, data, dtype)
    teacher, grid = stage.start, stage.trajectories.grid
    within = tolerances_for(teacher, data)
    weights = torch.tensor(info["weights"], dtype=torch.float64)
    assert isinstance(grid, IntervalGrid)
    close(grid.fine(), data["levels"], rtol_of_max=1e-12)

    batch, walk = stage.batch(0, slice(None)), data["teacher_walk_0"]
    close(batch.start, walk[0], rtol_of_max=within.walk)
    for row, golden in zip(batch.states, walk[len(walk) - grid.num_rows :], strict=True):
        close(row, golden, rtol_of_max=within.walk)
    head, ends, losses = first_update(stage, weights)
    first = grid.trained.start
    torch.testing.assert_close(
        losses.detach().double(), data["loss_branch"][0, first], rtol=within.loss, atol=0
    )
    close(ends, data["ends_0"], rtol_of_max=within.walk)
    for name in ("weight", "bias"):
        value = getattr(head, name)
        close(value.detach(), data[f"head.init.{name}"])
        close(value.grad, data[f"grad0.head.{name}"], rtol_of_max=within.gradient)

    reports: list[IterationReport] = []
    trained = train(stage, FixedWeights(weights), on_iteration=reports.append)
    assert [report.lr for report in reports] == pytest.approx(data["lr"].tolist())
    compare_losses(reports, first, data["loss_opt"], within.loss)
    for report, golden in zip(reports, data["loss_branch"], strict=True):
        torch.testing.assert_close(report.branch_losses, golden[first:], rtol=within.loss, atol=0)
    head = trained.model.get_submodule(trained.model.head_name)
    if within.weights is not None:
        for name in ("weight", "bias"):
            final = data[f"head.final.{name}"]
            close(getattr(head, name).detach(), final, atol=within.weights)
    compare_outputs(teacher, trained, stage, info, data, within)


@torch.no_grad()
def compare_outputs(
    teacher: NetworkDenoiser,
    trained: NetworkDenoiser,
    stage: SFDStage,
    info: dict,
    data: dict,
    within: Tolerances,
) -> None:
    """Predictions and samples of the student, and of the teacher on the same walk."""
    like = next(teacher.parameters())
    x, sigma, told = data["probe.x"].to(like), data["probe.sigma"], probed(teacher, data)
    found = trained.branches(x, sigma, **told).transpose(0, 1)
    close(found, data["probe.final"], rtol_of_max=within.end)
    close(teacher(x, sigma, **told), data["probe.teacher"], rtol_of_max=2 * within.teacher)
    student, noise = export_branch(trained), data["sample.noise"]
    scale = info["guidance_sample"]
    for name, net, guidance, bound in (
        ("sample.plain", student, 1.0, within.end),
        ("sample.guided", student, scale, within.end),
        ("sample.teacher_guided", teacher, scale, within.teacher),
    ):
        close(sampled(net, stage, data, guidance, noise), data[name], rtol_of_max=bound)


@latent_files("refrun-trace-*.safetensors")
def test_the_references_own_training(path: Path):
    """The SFD reference's losses, gradients and head in float32, against ours in float64."""
    plain = path.with_name(path.name.removeprefix("refrun-"))
    info, data, reference = settings(plain), tensors(plain), tensors(path)
    stage = stage_of(info, data, torch.float64)
    grid, weights = stage.trajectories.grid, torch.tensor(info["weights"], dtype=torch.float64)
    assert isinstance(grid, IntervalGrid)
    first, last = grid.trained.start, len(stage.trajectories) - 1
    ends = stage.batch(last, slice(None)).states[grid.substeps - 1 :: grid.substeps]
    close(ends, reference["reference.teacher_ends_last"][first:], rtol_of_max=1e-5)
    head, _, _ = first_update(stage, weights)
    close(head.weight.grad, reference["reference.grad0.head.weight"], rtol_of_max=1e-5)
    reports: list[IterationReport] = []
    trained = train(stage, FixedWeights(weights), on_iteration=reports.append)
    compare_losses(reports, first, reference["reference.loss_opt"], 5e-4)
    head = trained.model.get_submodule(trained.model.head_name)
    close(head.weight.detach(), reference["reference.head.final.weight"], atol=1e-4)
