"""Progressive Distillation, plain or with dense branch supervision (B-DENSE).

Salimans & Ho 2022 (arXiv 2202.00512), algorithm 2; B-DENSE (arXiv 2602.15971), section 3. A step
of the student lands where K DDIM steps of the teacher land; then the student, by branch K, is the
next round's teacher: N -> N / K -> ...

In our coordinates, x = z / alpha and sigma = 1 / sqrt(SNR), for any parameterisation of either
network. B batch, K branches, C channels, H x W pixels, N student steps.
"""

import copy
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from bdense import NUMERICS
from bdense.data.datasets import Dataset
from bdense.diffusion import LevelWeight, ScheduleKind
from bdense.diffusion.conditions import Condition, Conditions
from bdense.diffusion.denoiser import Denoiser, NetworkDenoiser
from bdense.diffusion.grid_knobs import GridKnobs, NativeGridKnobs
from bdense.diffusion.guidance import calls, guided, null_for
from bdense.diffusion.preconditioning import levels_on, make_preconditioning
from bdense.diffusion.sampling import Sampler, levels_of, samplers_from
from bdense.diffusion.solvers import DDIM
from bdense.diffusion.vp import Levels, snr_weight
from bdense.errors import InputError
from bdense.execution import moved
from bdense.knobs import KnobError, knob, knob_of, knobs_of
from bdense.methods.images import ImageBatch, ImageStage
from bdense.methods.method import (
    GuidanceKnobs,
    Inputs,
    Method,
    MethodConfig,
    StagePlan,
    require_pixels,
)
from bdense.models.store import denoiser_sha256
from bdense.training.optimisation import LRSchedule
from bdense.training.stage import Branches, ImageLosses
from bdense.training.teacher_knobs import TeacherKnobs
from bdense.weights.weighting import BranchWeighting

WeightsSpace = Literal["clean", "state"]
PredictionType = Literal["epsilon", "sample", "v_prediction"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PDConfig(MethodConfig, NativeGridKnobs, GuidanceKnobs):
    """The knobs of PD; the defaults of a round are the reference's for CIFAR-10."""

    heading: ClassVar[str] = "method progressive"

    steps: int = knob(help="DDIM steps of the teacher", low=2)
    until: int = knob(help="DDIM steps of the last student", low=1)
    substeps: int = knob(
        2,
        "the teacher's steps in each of the student's, K: every round divides their number by K",
        low=2,
        high=1000,
    )
    updates: int = knob(50_000, "updates in each round", low=1)
    lr_schedule: LRSchedule = knob_of(MethodConfig, "lr_schedule", "linear")
    clip_norm: float | None = knob_of(MethodConfig, "clip_norm", 1.0)
    rescale_weights: bool = knob_of(MethodConfig, "rescale_weights", True)
    dropout: bool = knob_of(MethodConfig, "dropout", False)
    loss: LevelWeight = knob(
        "snr_trunc",
        "weight of each noise level: the image's squared error counts times 1 (constant), SNR "
        "(snr), max(SNR, 1) (snr_trunc) or SNR + 1 (v), of the step's beginning for all branches",
    )
    clip_targets: bool = knob(
        False, "clamp the teacher's predictions to [-1, 1] in training, which keeps targets there"
    )
    clip_samples: bool = knob(
        False, "clamp predictions to [-1, 1] when teacher and students draw images"
    )
    weights_space: WeightsSpace = knob(
        "clean",
        "clean: take w_k as they are; state: multiply them by 1 - t_k / t_0 of each step, as "
        "SFD's loss does by itself, and keep their sum",
    )
    prediction_type: PredictionType | None = knob(
        None,
        "what the students' networks predict: noise, image or v; a teacher that predicts another "
        "is converted first, by a round that keeps its number of steps",
        none="what the teacher's network predicts",
    )
    schedule: ScheduleKind | Literal["native"] = knob_of(NativeGridKnobs, "schedule", "native")
    flip: bool = knob_of(TeacherKnobs, "flip", False)

    def __post_init__(self) -> None:
        MethodConfig.__post_init__(self)
        _require_dividing(self.steps, self.until, self.substeps)
        _ = self.chosen_levels  # which refuses what does not fit together
        for name in ("rho", "sigma_min", "sigma_max"):
            # Given as the default or not, the config is the same.
            if getattr(self, name) == knobs_of(GridKnobs)[name].default:
                object.__setattr__(self, name, None)

    @property
    def num_branches(self) -> int:
        return self.substeps

    @property
    def num_updates(self) -> int:
        """Iterations of each round."""
        return self.updates

    def for_one_shot(self, length: float) -> Self:
        self.require_one_call()
        return replace(self, updates=max(1, round(length * self.updates)))

    @classmethod
    def usual(cls, metadata: Mapping[str, Any], teacher: NetworkDenoiser) -> dict[str, Any]:
        """A student's own levels and guidance; a teacher's process has its own levels."""
        if not (served := samplers_from(metadata)):
            return {}
        return {**levels_of(metadata, teacher.precond), "guidance_teacher": served[0].guidance}

    @property
    def rounds(self) -> tuple[int, ...]:
        """N of each round's student, from steps / K down to ``until``."""
        steps = [self.steps // self.substeps]
        while steps[-1] > self.until:
            steps.append(steps[-1] // self.substeps)
        return tuple(steps)

    def levels(self, teacher: NetworkDenoiser) -> Levels:
        """The noise levels of all grids."""
        return levels_on(self.chosen_levels, teacher.precond)


def _require_dividing(first: int, last: int, substeps: int) -> None:
    """Refuse numbers of steps that do not lead from one to the other, and name one that does."""
    if last >= first:
        raise KnobError("until", f"must be below `steps` {first}, the teacher's, got {last}")
    reached = first
    while reached > last and reached % substeps == 0:
        reached //= substeps
    if reached != last:
        power = max(1, round(math.log(first / last, substeps)))
        raise KnobError(
            "steps",
            f"{first} do not become `until` {last} by dividing by `substeps` {substeps} again and "
            f"again; start at {last * substeps**power}",
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class PDStage(ImageStage):
    """A round: a student whose N steps follow the teacher's K N, or one that is converted.

    Attributes:
        teacher: One branch, on the device to train on.
        start: What the student starts as.
        levels: Noise levels of both grids.
        steps: N of the student.
        substeps: K; 1 in a round that converts the teacher and keeps its steps.
        guidance: Of the teacher in this round.
    """

    kind: ClassVar[str] = "pd"

    config: PDConfig
    teacher: NetworkDenoiser
    start: NetworkDenoiser
    levels: Levels
    steps: int
    dataset: Dataset
    seed: int
    substeps: int
    conditions: Conditions
    guidance: float = 1.0

    def __post_init__(self) -> None:
        self._require_images("progressive distillation")
        self.teacher.require_levels(self.levels)
        for scale in (self.guidance, self.config.guidance_student):
            null_for(scale, self.conditions)

    @property
    def num_branches(self) -> int:
        return self.substeps

    @property
    def sampler(self) -> Sampler:
        config = self.config
        return pd_sampler(
            self.levels, self.steps, clip=config.clip_samples, guidance=config.guidance_student
        )

    @property
    def round(self) -> int:
        return self.steps

    def intervals_at(self, iteration: int) -> int:
        return self.steps

    def updates(self, iteration: int, batch: ImageBatch) -> Iterator["RoundUpdate"]:
        levels = batch.levels(self.levels.grid(self.steps * self.substeps), self.substeps)
        x = batch.clean + _per_image(levels[0], batch.clean) * batch.noise
        own = self.config.guidance_student
        theirs, null = (null_for(scale, self.conditions, like=x) for scale in (self.guidance, own))
        denoise = self.teacher.given(batch.condition, guidance=self.guidance, null=theirs)
        yield RoundUpdate(
            stream=(self.steps, iteration),
            x=x,
            levels=levels,
            targets=dense_targets(denoise, x, levels, clip=self.config.clip_targets),
            given=batch.condition.arguments(),
            guidance=own,
            null=null,
            loss=self.config.loss,
            space=self.config.weights_space,
        )

    def describe(self, weighting: BranchWeighting) -> dict[str, Any]:
        started = {} if self.start is self.teacher else {"start": denoiser_sha256(self.start)}
        return {**self.describe_run(weighting), "num_steps": self.steps, **started}

    def describe_run(self, weighting: BranchWeighting) -> dict[str, Any]:
        """The identity of a run without its numbers of steps."""
        config, added = self.config, self.config.changed()
        conditions = self.conditions.describe()
        if self.start.label_dim or conditions:
            conditions["labels"] = self.dataset.labels_sha256
        drawn = {"batch": config.batch, "seed": self.seed, "flip": config.flip}
        batches = {"data": self.dataset.sha256, **drawn, **conditions}
        scales = {"teacher": self.guidance, "student": config.guidance_student}
        added |= {f"guidance_{who}": scale for who, scale in scales.items() if scale != 1}
        weights: Any = weighting.describe()
        if not weighting.learns:
            weights = config.scaled(weighting.weights()).tolist()
            added.pop("rescale_weights", None)  # seen in the weights
        if added.get("lr_schedule") == "constant":
            del added["lr_schedule"]  # seen in anneal
        fields = {
            **added,
            "updates": config.updates,
            "substeps": self.substeps,
            "num_branches": weighting.num_branches,
            "batch": config.batch,
            "lr": config.lr,
            "anneal": config.lr_schedule == "linear",
            "optimizer": config.optimizer,
            "betas": list(config.betas),
            "weight_decay": config.weight_decay,
            "clip_norm": config.clip_norm,
            "loss": config.loss,
            "clip_targets": config.clip_targets,
            "weights_space": config.weights_space,
            "dropout": config.dropout,
            "flip": config.flip,
            "seed": self.seed,
        }
        return {
            "numerics": NUMERICS,
            "teacher": denoiser_sha256(self.teacher),
            "precision": self.teacher.execution.precision,
            "schedule": self.levels.describe(),
            "weights": weights,
            **{f"config.{name}": value for name, value in fields.items()},
            **{f"batches.{name}": value for name, value in batches.items()},
        }

    def on(self, device: torch.device) -> "PDStage":
        teacher = self.teacher.on(device)
        start = teacher if self.start is self.teacher else self.start.on(device)
        return replace(self, teacher=teacher, start=start)


@dataclass(frozen=True, eq=False, kw_only=True)
class RoundUpdate:
    """One update of a round, for states ``x`` [B, C, H, W] at the first of ``levels``."""

    where: ClassVar[Mapping[str, int]] = {}

    stream: tuple[int, ...]
    x: Tensor
    levels: Tensor
    targets: Tensor
    given: Mapping[str, Any]
    guidance: float
    null: Condition | None
    loss: LevelWeight
    space: WeightsSpace

    def __call__(self, branches: Branches) -> "RoundLosses":
        """The branches' losses, weighted by the noise level."""
        predict = guided(branches, self.guidance, self.null)
        errors = branch_errors(predict, self.x, self.levels[0], self.targets, **self.given)
        losses = moved(snr_weight(self.levels[0], self.loss), errors) * errors
        return RoundLosses(losses, self.levels, self.space)


@dataclass(frozen=True, eq=False)
class RoundLosses(ImageLosses):
    """Losses whose branch weights may differ by image."""

    levels: Tensor
    space: WeightsSpace

    def image_weights(self, weights: Tensor) -> Tensor:
        return image_weights(weights, self.levels, self.space)


@torch.no_grad()
def dense_targets(denoise: Denoiser, x: Tensor, levels: Tensor, *, clip: bool = False) -> Tensor:
    """What each branch has to predict for one step to land where the teacher's first k steps do.

    D*^k = sum_{j<=k} (r_j - r_{j-1}) / (r_k - r_0) D(x_{j-1}), r = 1 / t: a convex combination, so
    that nothing cancels. D*^1 is the teacher's own prediction at x; where t_K = 0, r_K = infinity
    leaves only the last prediction, the reference's rule for its last interval.

    Args:
        denoise: The teacher, its conditions bound.
        x: [B, C, H, W] states at t_0.
        levels: [K + 1, B] float64 t_0 > .. > t_K of each image; t_K may be 0.
        clip: Clamp the teacher's predictions to [-1, 1]; its steps follow from the clamped ones.

    Returns:
        [K, B, C, H, W] D*^1..D*^K.
    """
    predictions: list[Tensor] = []
    for t, t_next in itertools.pairwise(levels):
        denoised = denoise(x, t)
        predictions.append(denoised.clamp(-1, 1) if clip else denoised)
        # DDIM, x' = D + (t' / t) (x - D).
        x = predictions[-1] + _per_image(t_next / t, x) * (x - predictions[-1])
    return torch.stack(
        [
            sum(
                (_per_image(share, x) * predictions[j] for j, share in enumerate(shares)),
                start=torch.zeros_like(x),
            )
            for shares in target_shares(levels)
        ]
    )


def target_shares(levels: Tensor) -> list[Tensor]:
    """How much of each teacher prediction is in each target.

    Args:
        levels: [K + 1, B] float64, decreasing; the last may be 0.

    Returns:
        For k = 1..K, [k, B] shares of D(x_0)..D(x_{k-1}): not negative, sum 1.
    """
    shares = []
    for k in range(1, len(levels)):
        # r_j / r_k = t_k / t_j; 1 for j = k also where t_k = 0.
        ratios = torch.cat([levels[k] / levels[:k], torch.ones_like(levels[:1])])
        shares.append(ratios.diff(dim=0) / (1 - ratios[0]))
    return shares


def branch_errors(
    branches: Branches,
    x: Tensor,
    sigma: Tensor,
    targets: Tensor,
    **given: Any,  # noqa: ANN401  of branches
) -> Tensor:
    """|D^k - D*^k|^2, mean over pixels.

    Args:
        branches: The student's ``branches``; its K branches stand for D*^1..D*^K, a single one
            for D*^K.
        x: [B, C, H, W] states at ``sigma``.
        sigma: [B].
        targets: [K', B, C, H, W], K' >= K; the last K are meant.

    Returns:
        [K, B].
    """
    denoised = branches(x, sigma, **given)
    targets = targets[-denoised.shape[1] :].transpose(0, 1)
    return (denoised - targets).square().mean(dim=(2, 3, 4)).T


def image_weights(weights: Tensor, levels: Tensor, space: WeightsSpace) -> Tensor:
    """Branch weights of each image.

    Args:
        weights: [K] w_1..w_K, or [K, B] those of each image.
        levels: [K' + 1, B] t_{n,0}..t_{n,K'}, of which the last K are the branches'.
        space: As in ``PDConfig.weights_space``.

    Returns:
        [K, B] float64, each image's sum that of ``weights``.
    """
    given = weights if weights.dim() == 2 else weights[:, None]
    own = given.double().expand(-1, levels.shape[1])
    if space == "clean":
        return own
    levels = moved(levels, own)
    shares = own * (1 - levels[-len(weights) :] / levels[0])
    return shares * (own.sum(0) / shares.sum(0))


def reparameterised(denoiser: NetworkDenoiser, prediction_type: str) -> NetworkDenoiser:
    """A copy whose network is taken to predict something else: a start for a converting round.

    A round with K = 1 at the teacher's own number of steps then makes it the teacher's equal:
    its only target is D*^1, the teacher's prediction.

    Args:
        denoiser: With the preconditioning of a VP process.
        prediction_type: One of ``bdense.diffusion.preconditioning.PREDICTIONS``.
    """
    precond = denoiser.precond
    if prediction_of(denoiser) is None:
        raise InputError(
            f"prediction_type {prediction_type} needs a network of a VP process (ddpm, cosine), "
            f"and the teacher has precond={precond.name!r}; leave it out"
        )
    copied = copy.deepcopy(denoiser)
    options = precond.options() | {"prediction_type": prediction_type}
    copied.precond = make_preconditioning(precond.name, options)
    return copied


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    """[B] float64 to [B, 1, 1, 1] in the images' type and on their device."""
    return moved(values, images).view(-1, 1, 1, 1)


def pd_sampler(
    levels: Levels, steps: int, *, clip: bool = False, guidance: float = 1.0
) -> Sampler:
    """How a teacher or student of progressive distillation draws images in that many steps."""
    solver = DDIM(clip=clip)
    return Sampler(
        num_intervals=steps, afs=False, schedule=levels, solver=solver, guidance=guidance
    )


def prediction_of(denoiser: NetworkDenoiser) -> str | None:
    """What a network on a VP process predicts; None for others."""
    return denoiser.precond.options().get("prediction_type")


class Progressive(Method):
    """Progressive Distillation: one stage a round."""

    name: ClassVar[str] = "progressive"
    title: ClassVar[str] = "PD"
    paper: ClassVar[str] = "Progressive Distillation (arXiv 2202.00512)"
    Config: ClassVar[type[PDConfig]] = PDConfig
    needs_data: ClassVar[bool] = True

    def plan(
        self, config: PDConfig, teacher: NetworkDenoiser | None = None
    ) -> tuple[StagePlan, ...]:
        """The rounds, after one that converts the teacher where ``prediction_type`` asks for it.

        With a teacher that predicts that already there is none to convert.
        """

        def plan(steps: int, *, branched: bool = True) -> StagePlan:
            return StagePlan(
                name=f"{steps:05d}",
                label=f"{steps} steps",
                num_updates=config.updates,
                nfe=steps * calls(config.guidance_student),
                branched=branched,
            )

        wanted = config.prediction_type
        converts = wanted is not None and (teacher is None or prediction_of(teacher) != wanted)
        first = (plan(config.steps, branched=False),) if converts else ()
        return first + tuple(plan(steps) for steps in config.rounds)

    def check(
        self, config: PDConfig, teacher: NetworkDenoiser, metadata: Mapping[str, Any]
    ) -> None:
        teacher.execution.require_training("progressive distillation")
        config.require_guidable(teacher, metadata)
        names = ("clip_targets", "clip_samples", "flip")
        require_pixels(config, dict.fromkeys(names, (True,)), teacher, metadata)
        levels = config.levels(teacher)
        teacher.require_levels(levels)
        if not self.plan(config, teacher)[0].branched:
            reparameterised(teacher, str(config.prediction_type))
        for own in samplers_from(metadata):
            if not isinstance(own.solver, DDIM):
                raise InputError(
                    f"the teacher is a student that draws by {own.solver.name}, and progressive "
                    "distillation only goes on from ddim; give its own teacher (a student of SFD "
                    "is distilled further by the method sfd with second_stage)"
                )
            if own.num_intervals != config.steps or own.schedule != levels:
                raise InputError(
                    f"the teacher is a student of {own.num_intervals} steps at "
                    f"{own.schedule.text()}, which only knows those, and the first round begins "
                    f"with {config.steps} steps at {levels.text()}; give its own teacher, or its "
                    "steps and levels (steps, schedule)"
                )
            if own.guidance != config.guidance_teacher:
                raise KnobError(
                    "guidance_teacher",
                    f"{config.guidance_teacher:g}: the teacher is a student that draws at "
                    f"guidance {own.guidance:g}; take that, or leave it out",
                )

    def teacher_sampler(self, config: PDConfig, teacher: NetworkDenoiser) -> Sampler | None:
        """The number of steps that the first round begins with."""
        return pd_sampler(
            config.levels(teacher),
            config.steps,
            clip=config.clip_samples,
            guidance=config.guidance_teacher,
        )

    def stage(
        self, plan: StagePlan, teacher: NetworkDenoiser, config: PDConfig, inputs: Inputs
    ) -> PDStage:
        """The round to the plan's number of steps.

        A student that is the next round's teacher is asked as it draws.
        """
        served = teacher.samplers
        start = teacher
        if not plan.branched:
            start = reparameterised(teacher, str(config.prediction_type))
        return PDStage(
            config=config,
            teacher=teacher,
            start=start,
            levels=config.levels(teacher),
            steps=plan.nfe // calls(config.guidance_student),
            dataset=inputs.require_dataset(self.name),
            seed=inputs.seed,
            substeps=config.substeps if plan.branched else 1,
            guidance=served[0].guidance if served else config.guidance_teacher,
            conditions=inputs.conditions_for(teacher),
        )

    def identity(
        self,
        config: PDConfig,
        teacher: NetworkDenoiser,
        inputs: Inputs,
        weighting: BranchWeighting,
    ) -> dict[str, Any]:
        """Without ``until``: a run that goes on further keeps its rounds."""
        stage = self.stage(self.plan(config)[-1], teacher, config, inputs)
        return {
            **stage.describe_run(weighting),
            "first": config.steps,
            "prediction_type": config.prediction_type or prediction_of(teacher),
            "clip_samples": config.clip_samples,
        }
