"""Consistency distillation, plain or with dense branch supervision (B-DENSE).

Song et al. 2023 (arXiv 2303.01469), algorithm 2; B-DENSE (arXiv 2602.15971), section 3. The
student learns f, which maps every state of a teacher's trajectory to its end at epsilon, the
lowest level.

In our coordinates f(x, t) = D + (epsilon / t) (x - D): the Euler step of the student's denoiser D
from t straight to epsilon. f(x, epsilon) = x holds by construction for any preconditioning, and
the student is a denoiser like its teacher. Branch k learns f at the state that the teacher reaches
after its k-th sub-step. B batch, K branches, C channels, H x W pixels, N intervals.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from bdense import NUMERICS
from bdense.data.datasets import Dataset
from bdense.diffusion.conditions import Condition, Conditions
from bdense.diffusion.denoiser import Denoiser, NetworkDenoiser
from bdense.diffusion.guidance import calls, guided, null_for
from bdense.diffusion.sampling import Sampler, samplers_from
from bdense.diffusion.solvers import Solver, StepNoise, make_solver, no_noise, trajectory
from bdense.errors import InputError
from bdense.execution import moved
from bdense.knobs import knob, knob_of
from bdense.methods.images import ImageBatch, ImageStage
from bdense.methods.method import (
    GridConfig,
    GuidanceKnobs,
    Inputs,
    Method,
    MethodConfig,
    StagePlan,
    require_pixels,
)
from bdense.methods.perceptual import LPIPS
from bdense.models.store import denoiser_sha256
from bdense.training.optimisation import Average
from bdense.training.stage import Branches, BranchMeans
from bdense.training.teacher_knobs import TeacherKnobs
from bdense.weights.weighting import BranchWeighting

Loss = Literal["pseudo-huber", "l2", "lpips"]
StepSolver = Literal["heun", "euler", "dpm2", "ipndm"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsistencyConfig(GridConfig, GuidanceKnobs):
    """Knobs of consistency distillation; mu is Song et al.'s, levels and step size are ours.

    ``sigma_min`` is epsilon, where f leaves x as it is.
    """

    heading: ClassVar[str] = "method consistency"

    nfe: int = knob(1, "predictions an image; above 1 by multistep sampling", low=1)
    steps: int = knob(18, "intervals of the noise levels, N", low=1)
    substeps: int = knob(
        1,
        "steps that the teacher takes in each interval, K; plain learns from the last",
        low=1,
        high=1000,
    )
    solver: StepSolver = knob("heun", "solver of the teacher's steps")
    loss: Loss = knob(
        "pseudo-huber",
        "distance between f and its target: sqrt(|.|^2 + c^2) - c, the squared error, or LPIPS "
        "(needs the extra lpips and 0.5 GB of weights)",
    )
    huber_c: float | None = knob(
        None,
        "c of pseudo-huber",
        above=0,
        none="0.00054 sqrt(C H W), after Song & Dhariwal 2023",
    )
    target_decay: float = knob(
        0.95, "mu: what the target network keeps of itself at each update", low=0, below=1
    )
    target_schedule: Literal["fixed", "progressive"] = knob(
        "fixed",
        "fixed: N and mu as given; progressive: N rises from 2 to steps, and mu with it to "
        "exp(2 ln target_decay / N) (Song et al., appendix C)",
    )
    flip: bool = knob_of(TeacherKnobs, "flip", False)
    dropout: bool = knob_of(MethodConfig, "dropout", False)

    def __post_init__(self) -> None:
        MethodConfig.__post_init__(self)
        _ = self.levels  # refuses levels that do not fit together
        if self.huber_c is not None and self.loss != "pseudo-huber":
            raise InputError(
                f"huber_c={self.huber_c:g} needs loss=pseudo-huber, got loss={self.loss}; drop it"
            )

    @property
    def num_branches(self) -> int:
        return self.substeps

    def intervals_at(self, iteration: int) -> int:
        """N at that iteration."""
        if self.target_schedule == "fixed":
            return self.steps
        first = min(2, self.steps)
        risen = iteration / self.num_updates * ((self.steps + 1) ** 2 - first**2) + first**2
        return min(self.steps, math.ceil(math.sqrt(risen) - 1) + 1)

    def decay_at(self, iteration: int) -> float:
        """mu at that iteration."""
        if self.target_schedule == "fixed" or self.target_decay == 0:
            return self.target_decay
        return math.exp(2 * math.log(self.target_decay) / self.intervals_at(iteration))


@dataclass(frozen=True, slots=True, kw_only=True)
class MultistepConsistency(Solver):
    """f from the first level; then noise is added up to each next one, and f taken again.

    Song et al. 2023, algorithm 1, in which the last level of the grid is epsilon.
    """

    name: ClassVar[str] = "consistency"
    reaches_zero: ClassVar[bool] = True

    def steps(
        self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: StepNoise = no_noise
    ) -> Iterator[Tensor]:
        """x' = f(x, t) + sqrt(t'^2 - epsilon^2) z; no noise in the last interval."""
        end = sigmas[-1]
        for i, (t, t_next) in enumerate(itertools.pairwise(sigmas)):
            x = towards(denoise(x, t), x, end / t)
            if t_next > end:
                x = x + (t_next**2 - end**2).sqrt() * noise(i).to(x)
            yield x


def towards(denoised: Tensor, x: Tensor, ratio: Tensor) -> Tensor:
    """f = D + (epsilon / t) (x - D), of any shapes that broadcast."""
    return denoised + ratio * (x - denoised)


@dataclass(eq=False, kw_only=True)
class ConsistencyStage(ImageStage):
    """The one stage: a student, and the average of it that makes its targets."""

    kind: ClassVar[str] = "consistency"

    config: ConsistencyConfig
    teacher: NetworkDenoiser
    dataset: Dataset
    seed: int
    conditions: Conditions

    def __post_init__(self) -> None:
        self._require_images("consistency distillation")
        self.config.require_null(self.conditions)
        self._levels = self.config.levels_for(self.teacher)
        self.teacher.require_levels(self._levels)
        self._solver = make_solver(self.config.solver)
        self._perceptual = LPIPS() if self.config.loss == "lpips" else None
        self._student: NetworkDenoiser | None = None
        self._target: Average | None = None

    @property
    def start(self) -> NetworkDenoiser:
        return self.teacher

    @property
    def sampler(self) -> Sampler:
        """How the student draws: one step, or several with noise between them."""
        return Sampler(
            num_intervals=self.config.nfe,
            afs=False,
            schedule=self._levels,
            solver=MultistepConsistency(),
            guidance=self.config.guidance_student,
        )

    def intervals_at(self, iteration: int) -> int:
        return self.config.intervals_at(iteration)

    def updates(self, iteration: int, batch: ImageBatch) -> Iterator["ConsistencyUpdate"]:
        """One update."""
        config = self.config
        assert self._target is not None
        own, null = config.guidance_student, self._null(config.guidance_student, batch)
        target = self._target.network.given(batch.condition, guidance=own, null=null)
        scale = config.guidance_teacher
        teacher = self.teacher.given(
            batch.condition, guidance=scale, null=self._null(scale, batch)
        )
        fine = self._levels.grid(config.intervals_at(iteration) * config.substeps)
        levels = moved(batch.levels(fine, config.substeps), batch.clean)[..., None, None, None]
        x = batch.clean + levels[0] * batch.noise
        states = trajectory(self._solver, teacher, x, levels)
        yield ConsistencyUpdate(
            stream=(0, iteration),
            x=x,
            level=levels[0],
            end=config.sigma_min,
            targets=consistency_targets(target, states[1:], levels[1:], config.sigma_min),
            given=batch.condition.arguments(),
            null=null,
            config=config,
            perceptual=self._perceptual,
        )

    def end(self, iteration: int) -> None:
        """The target follows the student: theta^- <- mu theta^- + (1 - mu) theta."""
        assert self._student is not None
        assert self._target is not None
        self._target.add(self._student, 1 - self.config.decay_at(iteration))

    def _null(self, scale: float, batch: ImageBatch) -> Condition | None:
        return null_for(scale, self.conditions, like=batch.clean)

    def describe(self, weighting: BranchWeighting) -> dict[str, Any]:
        perceptual = {} if self._perceptual is None else {"lpips": self._perceptual.describe()}
        conditions = self.conditions.describe()
        labelled = bool(self.teacher.label_dim or conditions)
        return {
            "numerics": NUMERICS,
            "teacher": denoiser_sha256(self.teacher),
            "precision": self.teacher.execution.precision,
            "weights": weighting.describe(),
            **{f"config.{name}": value for name, value in self.config.identity().items()},
            **perceptual,
            "data": self.dataset.sha256,
            **conditions,
            **({"labels": self.dataset.labels_sha256} if labelled else {}),
            "seed": self.seed,
        }

    def on(self, device: torch.device) -> "ConsistencyStage":
        return replace(self, teacher=self.teacher.on(device))

    def begin(self, student: NetworkDenoiser) -> None:
        self._student, self._target = student, Average.of(student)

    def state(self) -> Mapping[str, Tensor]:
        assert self._target is not None
        return self._target.network.state_dict()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        assert self._target is not None
        self._target.network.load_state_dict(dict(state))


@torch.no_grad()
def consistency_targets(target: Denoiser, states: Tensor, levels: Tensor, end: float) -> Tensor:
    """f of the target network at the teacher's states.

    Args:
        target: D^-(x; sigma) by branch K.
        states: [K, B, C, H, W] after each of the teacher's sub-steps.
        levels: [K, B, 1, 1, 1] their levels; where one is ``end``, f is the state itself.
        end: epsilon.

    Returns:
        [K, B, C, H, W].
    """
    return torch.stack(
        [towards(target(x, t.flatten()), x, end / t) for x, t in zip(states, levels, strict=True)]
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class ConsistencyUpdate:
    """One update for states ``x`` [B, C, H, W] at ``level`` [B, 1, 1, 1]."""

    where: ClassVar[Mapping[str, int]] = {}

    stream: tuple[int, ...]
    x: Tensor
    level: Tensor
    end: float
    targets: Tensor
    given: Mapping[str, Any]
    null: Condition | None
    config: ConsistencyConfig
    perceptual: LPIPS | None

    def __call__(self, branches: Branches) -> BranchMeans:
        predict = guided(branches, self.config.guidance_student, self.null)
        denoised = predict(self.x, self.level.flatten(), **self.given)
        ratio = (self.end / self.level)[:, None]
        found = towards(denoised, self.x[:, None], ratio).unbind(1)
        pairs = zip(found, self.targets[-len(found) :], strict=True)
        return BranchMeans(torch.stack([self._distance(*pair) for pair in pairs]))

    def _distance(self, found: Tensor, target: Tensor) -> Tensor:
        """0-dim, mean over the batch."""
        if self.perceptual is not None:
            return self.perceptual(found, target)
        if self.config.loss == "l2":
            return (found - target).square().mean()
        return pseudo_huber(found, target, self.config.huber_c)


def pseudo_huber(found: Tensor, target: Tensor, c: float | None = None) -> Tensor:
    """sqrt(|found - target|^2 + c^2) - c, mean over the batch: 0-dim.

    Args:
        found, target: [B, C, H, W].
        c: Errors far below it count by their square; None is 0.00054 sqrt(C H W).
    """
    if c is None:
        c = 0.00054 * math.sqrt(found[0].numel())
    distance = (found - target).square().flatten(1).sum(1)
    return ((distance + c * c).sqrt() - c).mean()


class Consistency(Method):
    """Consistency distillation: one stage."""

    name: ClassVar[str] = "consistency"
    title: ClassVar[str] = "CD"
    paper: ClassVar[str] = "Consistency Distillation (arXiv 2303.01469)"
    Config: ClassVar[type[ConsistencyConfig]] = ConsistencyConfig
    needs_data: ClassVar[bool] = True

    def plan(
        self, config: ConsistencyConfig, teacher: NetworkDenoiser | None = None
    ) -> tuple[StagePlan, ...]:
        nfe, updates = config.nfe * calls(config.guidance_student), config.num_updates
        return (StagePlan(name="", label=f"{nfe} NFE", num_updates=updates, nfe=nfe),)

    def check(
        self, config: ConsistencyConfig, teacher: NetworkDenoiser, metadata: Mapping[str, Any]
    ) -> None:
        config.require_guidable(teacher, metadata)
        require_pixels(config, {"flip": (True,), "loss": ("lpips",)}, teacher, metadata)
        teacher.require_levels(config.levels)
        if samplers_from(metadata):
            raise InputError(
                "the teacher is a student, which only knows the levels it was distilled for; "
                "give its own teacher"
            )

    def stage(
        self,
        plan: StagePlan,
        teacher: NetworkDenoiser,
        config: ConsistencyConfig,
        inputs: Inputs,
    ) -> ConsistencyStage:
        return ConsistencyStage(
            config=config,
            teacher=teacher,
            dataset=inputs.require_dataset(self.name),
            seed=inputs.seed,
            conditions=inputs.conditions_for(teacher),
        )
