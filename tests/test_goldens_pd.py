"""Progressive distillation against the reference, in float64; settings from each file's JSON.

Errors are |d| / (1 + |golden|) unless they are said to be relative. What belongs to B-DENSE, the
optimiser and DDPM's levels is not the reference's but these files' own.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bdense.data.datasets import Dataset
from bdense.diffusion.branches import export_branch, widen_head
from bdense.diffusion.conditions import Unconditional
from bdense.diffusion.ddpm import DDPMSchedule
from bdense.diffusion.denoiser import Denoiser, NetworkDenoiser
from bdense.diffusion.preconditioning import Cosine
from bdense.diffusion.sampling import Sampler
from bdense.diffusion.solvers import DDIM, trajectory
from bdense.diffusion.vp import CosineSchedule, VPSchedule, snr_weight
from bdense.methods.images import ImageBatch
from bdense.methods.progressive import (
    PDConfig,
    PDStage,
    branch_errors,
    dense_targets,
    target_shares,
)
from bdense.models.store import load_tensors
from bdense.training.loop import IterationReport, train
from bdense.training.teacher import squared_error
from bdense.weights.weighting import FixedWeights
from tests.goldens import PD, discover, settings, tensors
from tests.pd_nets import tiny_conv

pytestmark = pytest.mark.golden

PREDICTION = {"x": "sample", "eps": "epsilon", "v": "v_prediction"}
LOSS = {"constant": "constant", "snr": "snr", "snr_trunc": "snr_trunc", "v_mse": "v"}


def near(actual: Tensor, golden: Tensor, bound: float) -> None:
    assert actual.shape == golden.shape
    error = float(((actual - golden).abs() / (1 + golden.abs())).max())
    assert error <= bound, f"off by {error:.3g}, allowed {bound:.3g}"


def relative(actual: Tensor, golden: Tensor, bound: float) -> None:
    assert actual.shape == golden.shape
    error = float(((actual - golden).abs() / golden.abs()).max())
    assert error <= bound, f"off by {error:.3g} of it, allowed {bound:.3g}"


def schedule_of(description: dict[str, Any]) -> VPSchedule:
    if description["name"] == "cosine":
        return CosineSchedule(
            logsnr_min=description["logsnr_min"], logsnr_max=description["logsnr_max"]
        )
    assert description["name"] == "ddpm_linear_table"
    return DDPMSchedule(
        num_train_timesteps=description["T"],
        beta_start=description["beta_start"],
        beta_end=description["beta_end"],
    )


def column(mean_type: str) -> Cosine:
    """The tiny networks are told arctan(sigma) whatever the process."""
    return Cosine(prediction_type=PREDICTION[mean_type])


def gauss(mu: Tensor, s: Tensor) -> Denoiser:
    """The exact D where each channel is N(mu, s^2)."""
    mean = mu.view(-1, 1, 1)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        variance = sigma.to(x).view(-1, 1, 1, 1) ** 2
        return mean + s**2 * (x - mean) / (s**2 + variance)

    return denoise


def denoiser_of(data: dict[str, Tensor], name: str, config: dict[str, Any]) -> Denoiser:
    if f"{name}/mu" in data:
        return gauss(data[f"{name}/mu"], data[f"{name}/s"])
    return tiny_conv(data, f"{name}/", column(config["mean_type"]))


def four(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def noise_of(x: Tensor, denoised: Tensor, sigma: Tensor) -> Tensor:
    return (x - denoised) / four(sigma)


def v_of(x: Tensor, denoised: Tensor, sigma: Tensor) -> Tensor:
    """alpha eps - s x_0."""
    return (noise_of(x, denoised, sigma) - four(sigma) * denoised) / four((1 + sigma**2).sqrt())


def levels_at(schedule: VPSchedule, i: Tensor, num_steps: int, substeps: int) -> Tensor:
    """[K + 1, B]: the file counts steps i from the clean end."""
    fine = schedule.grid(num_steps * substeps)
    return fine[substeps * (num_steps - 1 - i) + torch.arange(substeps + 1)[:, None]]


def logsnr(sigma: Tensor) -> Tensor:
    return -2 * sigma.log()


# ---- schedules ----


@pytest.mark.parametrize("path", discover("schedules.json", PD))
def test_levels(path: Path):
    tables = json.loads(path.read_text())
    for name, table in tables.items():
        if name.startswith("cosine"):
            schedule = CosineSchedule(
                logsnr_min=table["logsnr_min"], logsnr_max=table["logsnr_max"]
            )
            u = torch.tensor(table["u"], dtype=torch.float64)
            exact = torch.tensor(table["logsnr_exact"], dtype=torch.float64)
            near(logsnr(schedule.level(u)), exact, 1e-12)
    table = tables["ddpm_linear_T1000"]
    ddpm = DDPMSchedule(
        num_train_timesteps=table["T"], beta_start=table["beta_start"], beta_end=table["beta_end"]
    )
    whole = torch.arange(1, table["T"] + 1, dtype=torch.float64) / table["T"]
    near(logsnr(ddpm.level(whole)), torch.tensor(table["logsnr"], dtype=torch.float64), 1e-11)
    options = tables["ddpm_1024_options"]["logsnr_at_k"]
    for name, schedule in (
        ("A_native_T1024_linspace", DDPMSchedule(num_train_timesteps=1024)),
        ("C_logalphabar_interp_T1000", ddpm),
    ):
        grid = schedule.grid(1024)
        assert float(grid[-1]) == 0
        for k, golden in options[name].items():
            assert float(logsnr(grid[1024 - int(k)])) == pytest.approx(golden, rel=1e-11)


@pytest.mark.parametrize("path", discover("math-check.json", PD))
def test_shares_and_composition(path: Path):
    """Shares of two predictions; on a Gaussian, a chain of ideal students keeps its end point."""
    facts = json.loads(path.read_text())
    schedule = CosineSchedule()
    for name, rows in facts["pd_target_weights_K2"].items():
        for row in rows:
            if not isinstance(row, dict):
                continue
            i = torch.tensor([row["i"]])
            shares = target_shares(levels_at(schedule, i, int(name[1:]), 2))[-1]
            assert shares.flatten().tolist() == pytest.approx([row["w1"], row["w2"]], abs=1e-12)
    single = facts["gauss_single_halving"]
    mu = torch.tensor(single["mu"], dtype=torch.float64)
    teacher = gauss(mu, torch.tensor(single["s"], dtype=torch.float64))
    noise = torch.randn(
        4, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    chain = [row["N"] for row in facts["gauss_chain_16_to_1"]]

    def ideal(steps: int) -> Denoiser:
        """The student whose D is D*^2 at every level of its grid."""
        if steps == 16:
            return teacher
        above, fine = ideal(2 * steps), schedule.grid(2 * steps)

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            n = int((fine - sigma.flatten()[0]).abs().argmin())
            levels = fine[n : n + 3, None].expand(-1, len(x))
            return dense_targets(above, x, levels)[-1]

        return denoise

    def end(denoise: Denoiser, steps: int) -> Tensor:
        sampler = Sampler(num_intervals=steps, afs=False, schedule=schedule, solver=DDIM())
        return sampler(denoise, noise)

    for steps in chain:
        near(end(ideal(steps), steps), end(teacher, 16), 1e-13)


# ---- targets and losses ----


@pytest.mark.parametrize("path", discover("targets-[gc]*.safetensors", PD))
def test_targets(path: Path):
    """The reference's own: one halving, one branch."""
    config, data = settings(path)["config"], tensors(path)
    schedule = schedule_of(config["schedule"])
    teacher, student = (denoiser_of(data, name, config) for name in ("teacher", "student"))
    for num_steps in config["N_student"]:
        check_halving(schedule, teacher, student, num_steps, config, data)


@torch.no_grad()
def check_halving(
    schedule: VPSchedule,
    teacher: Denoiser,
    student: Denoiser,
    num_steps: int,
    config: dict[str, Any],
    data: dict[str, Tensor],
) -> None:
    of = {k.split("/", 1)[1]: v for k, v in data.items() if k.startswith(f"N{num_steps}/")}
    levels = levels_at(schedule, of["i"], num_steps, 2)
    sigma = levels[0]
    near(logsnr(sigma), of["logsnr"], 1e-11)
    near(logsnr(levels[1]), of["logsnr_mid"], 1e-11)
    x = data["x"] + four(sigma) * data["eps"]
    near(x / four((1 + sigma**2).sqrt()), of["z"], 1e-13)
    targets = dense_targets(teacher, x, levels)
    # Branch 1's target is the teacher's own prediction.
    near(targets[0], of["teacher_x_t"], 1e-11)
    near(targets[-1], of["x_target"], 1e-11)
    near(noise_of(x, targets[-1], sigma), of["eps_target"], 1e-11)
    near(v_of(x, targets[-1], sigma), of["v_target"], 1e-11)
    predicted = student(x, sigma)
    near(predicted, of["student_x"], 1e-11)
    error = (predicted - targets[-1]).square().mean(dim=(1, 2, 3))
    relative(error, of["x_mse"], 1e-10)
    for name in config["weight_types"]:
        relative(snr_weight(sigma, LOSS[name]) * error, of[f"loss_{name}"], 1e-10)


@pytest.mark.parametrize("path", discover("targets-bdense-*.safetensors", PD))
@torch.no_grad()
def test_dense_targets(path: Path):
    """K branches: states, targets, each branch's losses, their weighted sums."""
    config, data = settings(path)["config"], tensors(path)
    schedule = schedule_of(config["schedule"])
    teacher = denoiser_of(data, "teacher", config)
    for substeps, num_steps in config["K_N"]:
        prefix = f"K{substeps}/N{num_steps}/"
        of = {k.removeprefix(prefix): v for k, v in data.items() if k.startswith(prefix)}
        levels = levels_at(schedule, of["i"], num_steps, substeps)
        sigma = levels[0]
        x = of["z"] * four((1 + sigma**2).sqrt())
        targets = dense_targets(teacher, x, levels)
        near(targets, of["x_target_k"], 1e-11)
        for k in range(substeps):
            near(noise_of(x, targets[k], sigma), of["eps_target_k"][k], 1e-11)
            near(v_of(x, targets[k], sigma), of["v_target_k"][k], 1e-11)
        errors = errors_of(of, config, x, sigma, targets)
        for name in config["weight_types"]:
            losses = snr_weight(sigma, LOSS[name]) * errors
            near(losses, of[f"loss_k_{name}"], 1e-10)
            for arm in ("uniform", "exp"):
                total = (of[f"w_{arm}"][:, None] * losses).sum(0).mean()
                relative(total.view(1), of[f"total_{name}_{arm}"], 1e-10)


def errors_of(
    of: dict[str, Tensor], config: dict[str, Any], x: Tensor, sigma: Tensor, targets: Tensor
) -> Tensor:
    """[K, B] of the file's student."""
    if "student/mu" in of:
        each = zip(of["student/mu"], of["student/s"], strict=True)
        predicted = torch.stack([gauss(mu, s)(x, sigma) for mu, s in each])
        near(predicted, of["student_x_k"], 1e-11)
        return (predicted - targets).square().mean(dim=(2, 3, 4))
    student = tiny_conv(of, "student/", column(config["mean_type"]), len(targets))
    near(student.branches(x, sigma).transpose(0, 1), of["student_x_k"], 1e-11)
    return branch_errors(student.branches, x, sigma, targets)


@pytest.mark.parametrize("mean_type", PREDICTION)
@pytest.mark.parametrize("path", discover("targets-base-*.safetensors", PD))
def test_the_denoising_loss(path: Path, mean_type: str):
    """Every weight, at continuous times and at those of 16 steps."""
    golden, config = tensors(path), settings(path)["config"]
    schedule = schedule_of(config["schedule"])
    precond = Cosine(prediction_type=PREDICTION[mean_type], **schedule.options())
    denoiser = tiny_conv(golden, "model/", precond)
    times = {"cont": golden["u_continuous"], "N16": (golden["i_discrete_N16"] + 1) / 16}
    assert list(LOSS) == config["weight_types"]
    for name, u in times.items():
        sigma = schedule.level(u)
        for reference_name, loss in LOSS.items():
            errors = squared_error(denoiser.branches, golden["x"], golden["eps"], sigma)
            expected = golden[f"{mean_type}/{name}/loss_{reference_name}"]
            near((snr_weight(sigma, loss) * errors).detach(), expected, 1e-11)


# ---- sampling ----


@pytest.mark.parametrize("path", discover("ddim-*.safetensors", PD))
def test_ddim(path: Path):
    """Every state of every walk, clipped or not."""
    config, data = settings(path)["config"], tensors(path)
    schedule = schedule_of(config["schedule"])
    denoise = denoiser_of(data, "model", config)
    start = schedule.start(data["init_z"])
    for steps in config["steps"]:
        grid = schedule.grid(steps)
        # The file counts from the clean end.
        near(logsnr(grid[:-1]).flip(0), data[f"steps{steps}/logsnr"][1:], 1e-11)
        for clip in (False, True):
            walk = trajectory(DDIM(clip=clip), denoise, start, grid)
            alpha = 1 / (1 + grid**2).sqrt()
            z = walk * alpha.view(-1, 1, 1, 1, 1)
            near(z, data[f"steps{steps}/clip{int(clip)}/traj"], 1e-10)


# ---- whole short trainings ----


@dataclass(frozen=True, eq=False, kw_only=True)
class FileStage(PDStage):
    """A round on a file's own images, noise and times."""

    data: dict[str, Tensor]

    def batch(self, iteration: int, images: slice) -> ImageBatch:
        assert images == slice(0, self.batch_size)
        interval = self.steps - 1 - self.data["i"][iteration]
        clean, noise = self.data["x"][iteration], self.data["eps"][iteration]
        return ImageBatch(clean, noise, interval, Unconditional())


def rounds_of(path: Path) -> list[dict[str, Tensor]]:
    data = tensors(path)
    count = settings(path)["config"].get("rounds", 1)
    if count == 1:
        return [data]
    named = [f"round{r}/" for r in range(1, count + 1)]
    return [{k.removeprefix(p): v for k, v in data.items() if k.startswith(p)} for p in named]


def training_of(config: dict[str, Any], steps: int) -> PDConfig:
    """To a student of that many steps."""
    decay, substeps = config["weight_decay"], config.get("K", 2)
    return PDConfig(
        steps=steps * substeps,
        until=steps,
        substeps=substeps,
        updates=config["updates"],
        lr=config["lr"],
        lr_schedule={"linear_to_0": "linear"}.get(config["lr_schedule"], "constant"),
        # flax's Adam decouples its decay.
        optimizer="adamw" if decay else config["optimizer"],
        betas=tuple(config["adam_betas"]),
        weight_decay=decay,
        clip_norm=config["grad_clip"],
        loss=LOSS[config["loss"]],
        rescale_weights=False,
    )


def bound_of(config: dict[str, Any]) -> float:
    """As the files' README suggests: a branch that starts at its target has gradients of noise."""
    if config["method"] == "pd":
        return 1e-10
    return 1e-6 if config["schedule"]["name"].startswith("ddpm") else 1e-7


@pytest.mark.parametrize("path", discover("pd-trace-*.safetensors", PD))
def test_trace(path: Path, tmp_path):
    """Losses, gradients, weights and samples of every round; the next teacher is branch K."""
    config = settings(path)["config"]
    substeps = config.get("K", 2)
    schedule, steps = schedule_of(config["schedule"]), config["teacher_steps"]
    teacher = tiny_conv(rounds_of(path)[0], "teacher/", column(config["mean_type"]))
    for number, data in enumerate(rounds_of(path)):
        near_weights(teacher, data, "teacher/", bound_of(config))
        steps //= substeps
        student = check_round(
            teacher, schedule, steps, config, data, tmp_path / f"round{number}.safetensors"
        )
        teacher = export_branch(student)


def check_round(
    teacher: NetworkDenoiser,
    schedule: VPSchedule,
    steps: int,
    config: dict[str, Any],
    data: dict[str, Tensor],
    checkpoint: Path,
) -> NetworkDenoiser:
    training = training_of(config, steps)
    weights = torch.tensor(config.get("branch_weights") or [1.0], dtype=torch.float64)
    assert len(weights) == (training.substeps if config["method"] == "bdense" else 1)
    bound = bound_of(config)
    start = widen_head(teacher, len(weights))
    near_weights(start, data, "init/", bound)
    check_first_gradient(start, teacher, schedule, steps, training, weights, data, bound)
    reports: list[IterationReport] = []

    def on_iteration(report: IterationReport) -> None:
        reports.append(report)
        if report.iteration == 1:
            after1 = load_tensors(checkpoint)[0]
            for name, golden in named(data, "after1/"):
                near(after1[f"model.{name}"], golden, bound)

    stage = FileStage(
        config=training,
        teacher=teacher,
        start=teacher,
        levels=schedule,
        steps=steps,
        dataset=Dataset("file", torch.zeros(1, *teacher.image_shape, dtype=torch.uint8), ""),
        seed=0,
        substeps=training.substeps,
        conditions=Unconditional(),
        data=data,
    )
    student = train(
        stage,
        FixedWeights(weights),
        checkpoint=checkpoint,
        checkpoint_seconds=0,
        on_iteration=on_iteration,
    )
    relative(torch.tensor([r.lr for r in reports], dtype=torch.float64), data["lr"], 1e-12)
    relative(torch.tensor([r.loss for r in reports], dtype=torch.float64), data["loss"], bound)
    norms = torch.tensor([r.gradient_norm for r in reports], dtype=torch.float64)
    relative(norms, data["gnorm"], bound)
    near(torch.cat([r.branch_losses for r in reports]), data["loss_k"], bound)
    near_weights(student, data, "final/", bound)
    for name, golden in named(data, "sample/"):
        if name != "init_z":
            who, taken, clip = name.split("_")
            nets = {"teacher": teacher, "init": teacher, "student": export_branch(student)}
            sampler = Sampler(
                num_intervals=int(taken[1:]),
                afs=False,
                schedule=schedule,
                solver=DDIM(clip=clip == "clip1"),
            )
            near(sampler(nets[who], data["sample/init_z"]), golden, 10 * bound)
    return student


def check_first_gradient(
    student: NetworkDenoiser,
    teacher: NetworkDenoiser,
    schedule: VPSchedule,
    steps: int,
    training: PDConfig,
    weights: Tensor,
    data: dict[str, Tensor],
    bound: float,
) -> None:
    levels = levels_at(schedule, data["i"][0], steps, training.substeps)
    x = data["x"][0] + four(levels[0]) * data["eps"][0]
    targets = dense_targets(teacher, x, levels)
    losses = snr_weight(levels[0], training.loss) * branch_errors(
        student.branches, x, levels[0], targets
    )
    (weights @ losses).mean().backward()
    for name, golden in named(data, "grad0/"):
        gradient = student.get_parameter(f"model.{name}").grad
        # Of the whole gradient: a branch at its target has one of rounding noise.
        scale = math.sqrt(sum(float(g.square().sum()) for _, g in named(data, "grad0/")))
        assert float((gradient - golden).abs().max()) <= bound * scale


def named(data: dict[str, Tensor], prefix: str) -> list[tuple[str, Tensor]]:
    return [(k.removeprefix(prefix), v) for k, v in data.items() if k.startswith(prefix)]


def near_weights(
    network: NetworkDenoiser, data: dict[str, Tensor], prefix: str, bound: float
) -> None:
    own: Callable[[str], Tensor] = network.get_parameter
    for name, golden in named(data, prefix):
        near(own(f"model.{name}").detach(), golden, bound)
