"""Simple and Fast Distillation, plain or with dense branch supervision (B-DENSE).

Zhou et al. 2024 (arXiv 2409.19681), algorithm 1; B-DENSE (arXiv 2602.15971), section 3.

B batch, K branches, C channels, H x W pixels, N student intervals.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from bdense.diffusion import SOLVERS
from bdense.diffusion.conditions import Condition
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.epd import at_guidance, read_table
from bdense.diffusion.guidance import guided, null_for
from bdense.diffusion.intervals import IntervalGrid, VariableGrid
from bdense.diffusion.sampling import Sampler, samplers_from, served_metadata
from bdense.diffusion.schedules import Schedule
from bdense.diffusion.solvers import Solver, analytical_slope, make_solver
from bdense.diffusion.step_condition import Start, with_step_condition
from bdense.errors import InputError
from bdense.execution import moved
from bdense.knobs import KnobError, knob, knob_of
from bdense.methods.method import (
    GridConfig,
    GuidanceKnobs,
    Inputs,
    Method,
    MethodConfig,
    MethodStage,
    StagePlan,
    require_pixels,
)
from bdense.methods.perceptual import LPIPS
from bdense.methods.recordings import TrajectoryStore
from bdense.methods.trajectories import Trajectories, TrajectoryBatch
from bdense.models.store import denoiser_sha256
from bdense.training.optimisation import LRSchedule
from bdense.training.stage import Branches, BranchMeans
from bdense.weights.weighting import BranchWeighting

Perceptual = Literal["none", "lpips", "lpips-sfd"]
# What is usual for a student of several NFE, and for a second stage (Zhou et al. 2024).
_SEVERAL_NFE: Mapping[str, Any] = {"kimg": 800}
_SECOND_STAGE: Mapping[str, Any] = {
    "nfe": 1,
    "substeps": 3,
    "solver": "euler",
    "kimg": 2000,
    "lr": 0.0005,
}


def _named(usual: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in usual.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class SFDConfig(GridConfig, GuidanceKnobs):
    """The knobs of SFD; the defaults are the reference's for one NFE."""

    heading: ClassVar[str] = "method sfd"

    nfe: int | tuple[int, ...] = knob(
        2,
        "network evaluations an image; several numbers make one student for all of them, SFD-v, "
        f"which defaults to {_named(_SEVERAL_NFE)}",
        low=1,
    )
    substeps: int = knob(
        4, "steps that the teacher takes in each of the student's, K", low=1, high=1000
    )
    afs: bool = knob(
        True,
        "analytical first step: one more interval for the same NFE; for a teacher of latents "
        "it is off unless given",
    )
    solver: str = knob("dpmpp", "solver that the teacher walks with", choices=tuple(SOLVERS))
    order: int | None = knob(None, "order of the solver", low=1, none="the highest")
    epd_table: str | None = knob(
        None,
        "table of solver epd, learned for the teacher's own grid of (nfe + afs) x substeps steps",
        metavar="FILE",
        none="none: the midpoint of each step",
    )
    thresholding: bool = knob(False, "dynamic thresholding of dpmpp's predictions")
    lr_schedule: LRSchedule = knob_of(MethodConfig, "lr_schedule", "step")
    perceptual: Perceptual = knob(
        "none",
        "add the LPIPS between the ends of the last interval to the loss (needs the extra lpips "
        "and 0.5 GB of weights): lpips feeds it images in [0, 1], which it expects, lpips-sfd in "
        "[-1, 1], as the reference does",
    )
    step_condition: Start = knob(
        "teacher",
        "where a student for several NFE starts: as its teacher, or with random layers for the "
        "number of steps, as the reference does",
    )
    second_stage: bool = knob(
        False,
        "the teacher is itself a student of SFD, whose steps are distilled into fewer; "
        f"defaults to {_named(_SECOND_STAGE)}",
    )

    def __post_init__(self) -> None:
        MethodConfig.__post_init__(self)
        several = self.several_nfe
        if not several or len(set(several)) < len(several):
            raise KnobError("nfe", f"must be one number or several different ones, got {several}")
        kept = tuple(sorted(several)) if len(several) > 1 else several[0]
        object.__setattr__(self, "nfe", kept)
        _ = self.levels  # refuses noise levels that do not fit together
        # The highest order is the default: given or not, the config is the same.
        if self.make_solver() == make_solver(self.solver, thresholding=self.thresholding):
            object.__setattr__(self, "order", None)
        if self.step_condition != "teacher" and len(several) == 1:
            raise KnobError(
                "step_condition",
                f"{self.step_condition} is for a student of several NFE, got nfe={self.nfe}; give "
                "more numbers or leave it out",
            )
        if self.second_stage and len(several) > 1:
            raise KnobError("second_stage", f"is for one NFE, got nfe={list(several)}; give one")
        if self.second_stage and self.solver != "euler":
            raise KnobError(
                "solver",
                f"must be euler with `second_stage`, as the teacher is a student and takes Euler "
                f"steps, got {self.solver}",
            )

    @classmethod
    def read_all(cls, tree: Mapping[str, Any], where: str = "") -> Self:
        """With the usual values for several NFE or a second stage."""
        usual: Mapping[str, Any] = {}
        if tree.get("second_stage") is True:
            usual = _SECOND_STAGE
        elif isinstance(nfe := tree.get("nfe"), list | tuple) and len(nfe) > 1:
            usual = _SEVERAL_NFE
        return super(SFDConfig, cls).read_all({**usual, **tree}, where)

    @property
    def several_nfe(self) -> tuple[int, ...]:
        """``nfe`` as numbers, in rising order."""
        return self.nfe if isinstance(self.nfe, tuple) else (self.nfe,)

    @property
    def num_branches(self) -> int:
        return self.substeps

    @property
    def num_intervals(self) -> int:
        grid = self.grid()
        return 1 if isinstance(grid, VariableGrid) else len(grid.trained)

    def grid(self, levels: Schedule | None = None) -> IntervalGrid | VariableGrid:
        """The student's intervals and the teacher's sub-steps.

        Args:
            levels: Bound to a network; None is ``self.levels``.
        """
        schedule = levels or self.levels
        first, *others = (
            IntervalGrid(num_intervals=n, substeps=self.substeps, afs=self.afs, schedule=schedule)
            for n in self._several_intervals
        )
        return VariableGrid((first, *others)) if others else first

    def samplers(self, levels: Schedule | None = None) -> tuple[Sampler, ...]:
        """How the student draws, by NFE; ``levels`` as of ``grid``."""
        return tuple(
            Sampler(
                num_intervals=number,
                afs=self.afs,
                schedule=levels or self.levels,
                guidance=self.guidance_student,
            )
            for number in self._several_intervals
        )

    @property
    def _several_intervals(self) -> tuple[int, ...]:
        return tuple(nfe + self.afs for nfe in self.several_nfe)

    def for_one_shot(self, length: float) -> Self:
        if len(self.several_nfe) > 1:
            raise KnobError(
                "nfe",
                f"{list(self.several_nfe)}: a student of several NFE is told their number already "
                "and cannot be told its weights too; give one",
            )
        self.require_one_call()
        return replace(self, kimg=length * self.kimg)

    def make_solver(self) -> Solver:
        """What the teacher walks with.

        Raises:
            InputError: Knobs of the solver do not fit, see also ``teacher_table``.
        """
        own = make_solver(self.solver, order=self.order, thresholding=self.thresholding)
        table = self.teacher_table()
        return own if table is None else table.solver

    def teacher_table(self) -> Sampler | None:
        """What ``epd_table`` holds.

        Raises:
            InputError: It cannot be read, or is for another number of steps than the teacher's.
        """
        if self.epd_table is None:
            return None
        if self.solver != "epd":
            raise KnobError("epd_table", f"is for `solver` epd, got {self.solver}; drop one")
        if self.order is not None:
            raise KnobError("order", f"{self.order} is the table's own with `epd_table`; drop it")
        table = read_table(self.epd_table)
        walked = [number * self.substeps for number in self._several_intervals]
        if walked != [table.num_intervals]:
            raise KnobError(
                "epd_table",
                f"{self.epd_table} is for {table.num_intervals} steps, and the teacher takes "
                f"{' or '.join(map(str, walked))}; learn a table for these (method epd)",
            )
        return table

    def require_table(self, levels: Schedule) -> None:
        """Refuse a table for other noise levels; warn of one learned at another guidance."""
        if (table := self.teacher_table()) is None:
            return
        if table.schedule != levels:
            raise KnobError(
                "epd_table",
                f"{self.epd_table} is for {table.schedule.text()}, and the teacher walks along "
                f"{levels.text()}; learn a table for these (method epd)",
            )
        at_guidance(table, self.guidance_teacher, f"the EPD table {self.epd_table}")


@dataclass(frozen=True, eq=False, kw_only=True)
class SFDStage(MethodStage):
    """A student that follows its teacher's trajectories.

    Attributes:
        trajectories: As many as the config asks for, on the training device.
        seed: Of dropout; the noise is the trajectories' own.
        start: What the student starts as.
        perceptual: Added at the end of the last interval, C * H * W times, as in the reference's
            second stage; None adds nothing.
    """

    kind: ClassVar[str] = "sfd"

    config: SFDConfig
    trajectories: Trajectories
    start: NetworkDenoiser
    seed: int = 0
    perceptual: LPIPS | None = None

    def __post_init__(self) -> None:
        self.config.require_null(self.trajectories.conditions)

    @property
    def sampler(self) -> Sampler:
        """How the student draws, with its fewest evaluations."""
        return self.samplers[0]

    @property
    def samplers(self) -> tuple[Sampler, ...]:
        """How the student draws, by NFE."""
        return self.config.samplers(self.trajectories.grid.schedule)

    def metadata(self) -> dict[str, Any]:
        stage = {"stage": 2} if self.config.second_stage else {}
        perceptual = {} if self.perceptual is None else {"perceptual": self.perceptual.describe()}
        return {**stage, **perceptual, **served_metadata(self.samplers)}

    def batch(self, iteration: int, images: slice) -> TrajectoryBatch:
        return self.trajectories.part(iteration, images)

    def updates(self, iteration: int, batch: TrajectoryBatch) -> Iterator["IntervalUpdate"]:
        """An update for each trained interval, on the student's own path."""
        grid = batch.grid
        x = batch.start
        if grid.afs:
            x = first_interval_without_network(x, grid.interval(0))
        points = {"num_points": grid.num_points} if self.start.step_condition else {}
        guidance = self.config.guidance_student
        null = null_for(guidance, self.trajectories.conditions, like=x)
        for row, n in enumerate(grid.trained):
            update = IntervalUpdate(
                stream=(iteration, n),
                where={"interval": n},
                x=x,
                levels=grid.interval(n),
                targets=batch.states[row * grid.substeps : (row + 1) * grid.substeps],
                given={**batch.condition.arguments(), **points},
                guidance=guidance,
                null=null,
                perceptual=self.perceptual if n == grid.num_intervals - 1 else None,
            )
            yield update
            x = update.end

    def describe(self, weighting: BranchWeighting) -> dict[str, Any]:
        config = self.config
        perceptual = {} if self.perceptual is None else {"perceptual": self.perceptual.describe()}
        added = {f"config.{name}": value for name, value in config.changed().items()}
        if config.guidance_student != 1:
            added["config.guidance_student"] = config.guidance_student
        return {
            "weights": weighting.describe(),
            **added,
            "config.num_branches": weighting.num_branches,
            "config.images": config.images,
            "config.lr": config.lr,
            "config.betas": list(config.betas),
            "config.dropout": config.dropout,
            "config.seed": self.seed,
            "start": denoiser_sha256(self.start),
            **perceptual,
            **{f"trajectories.{k}": value for k, value in self.trajectories.describe().items()},
        }

    def on(self, device: torch.device) -> "SFDStage":
        moved = self.trajectories.on(device)
        same = self.start is self.trajectories.teacher
        start = moved.teacher if same else self.start.on(device)
        return replace(self, trajectories=moved, start=start)


@dataclass(eq=False, kw_only=True)
class IntervalUpdate:
    """One interval from the state ``x`` [B, C, H, W] on; ``end`` is where the student ended."""

    stream: tuple[int, ...]
    where: Mapping[str, int]
    x: Tensor
    levels: Tensor
    targets: Tensor
    given: Mapping[str, Any]
    guidance: float
    null: Condition | None
    perceptual: LPIPS | None
    end: Tensor = field(init=False)

    def __call__(self, branches: Branches) -> BranchMeans:
        """The branches' states and losses."""
        predict = guided(branches, self.guidance, self.null)
        states = branch_states(predict, self.x, self.levels, **self.given)
        self.end = states[:, -1].detach()
        losses = branch_losses(states, self.targets)
        return IntervalLosses(losses, states, self.targets, self.perceptual)


@dataclass(frozen=True, eq=False)
class IntervalLosses(BranchMeans):
    """L1 losses; to their weighted sum the perceptual loss of the end is added."""

    states: Tensor
    targets: Tensor
    perceptual: LPIPS | None

    def weighted(self, weights: Tensor) -> Tensor:
        if weights.dim() == 1:
            total = super().weighted(weights)
        else:
            losses = image_losses(self.states, self.targets)
            total = (moved(weights, losses) * losses).sum(0).mean()
        if self.perceptual is None:
            return total
        ends = self.states[:, -1]
        return total + ends[0].numel() * self.perceptual(ends, self.targets[-1])


def first_interval_without_network(x: Tensor, levels: Tensor) -> Tensor:
    """AFS: the whole first interval along the analytical slope; [B, C, H, W] to the same."""
    return x + (levels[-1] - levels[0]) * analytical_slope(x, levels[0])


def branch_states(
    branches: Branches,
    x: Tensor,
    levels: Tensor,
    **given: Any,  # noqa: ANN401  of branches
) -> Tensor:
    """Each branch's prediction of the teacher's state: x^k = x + (t_{n,k} - t_n) (x - D^k) / t_n.

    Args:
        branches: The student's ``branches``; its K branches stand for t_{n,1}..t_{n,K}, a single
            one for t_{n,K}.
        x: [B, C, H, W] the student's state at t_n.
        levels: [K + 1] float64, t_{n,0} = t_n down to t_{n,K}.
        given: Conditions, and ``num_points`` N + 1 for a step-conditional student.

    Returns:
        [B, K, C, H, W]; index -1 is the end of the interval.
    """
    t = levels[0]
    denoised = branches(x, t, **given)
    slopes = (x[:, None] - denoised) / t
    steps = (levels[1:] - t)[-denoised.shape[1] :]
    return x[:, None] + moved(steps, x).view(-1, 1, 1, 1) * slopes


def branch_losses(states: Tensor, targets: Tensor) -> Tensor:
    """|x^k - x^T_{n,k}|, summed over pixels, mean over the batch.

    Args:
        states: [B, K, C, H, W] from ``branch_states``.
        targets: [K', B, C, H, W] teacher states, K' >= K; the last K are meant.

    Returns:
        [K].
    """
    targets = targets[-states.shape[1] :].transpose(0, 1)
    return (states - targets).abs().sum(dim=(0, 2, 3, 4)) / len(states)


def image_losses(states: Tensor, targets: Tensor) -> Tensor:
    """As ``branch_losses``, of each image: [K, B]."""
    targets = targets[-states.shape[1] :].transpose(0, 1)
    return (states - targets).abs().sum(dim=(2, 3, 4)).T


class SFD(Method):
    """Simple and Fast Distillation: one stage."""

    name: ClassVar[str] = "sfd"
    title: ClassVar[str] = "SFD"
    paper: ClassVar[str] = "Simple and Fast Distillation (SFD, arXiv 2409.19681)"
    Config: ClassVar[type[SFDConfig]] = SFDConfig

    def plan(
        self, config: SFDConfig, teacher: NetworkDenoiser | None = None
    ) -> tuple[StagePlan, ...]:
        several = [sampler.nfe for sampler in config.samplers()]
        label = f"{', '.join(map(str, several))} NFE"
        return (StagePlan(name="", label=label, num_updates=config.num_updates, nfe=several[0]),)

    def check(
        self, config: SFDConfig, teacher: NetworkDenoiser, metadata: Mapping[str, Any]
    ) -> None:
        config.require_guidable(teacher, metadata)
        require_pixels(config, {"perceptual": ("lpips", "lpips-sfd")}, teacher, metadata)
        levels = config.levels_for(teacher)
        teacher.require_levels(levels)
        config.require_table(levels)
        served = {sampler.num_intervals: sampler for sampler in samplers_from(metadata)}
        if config.second_stage:
            _check_second_stage(config, served, levels)
        elif served:
            raise InputError(
                "the teacher is a student, which only knows the levels it was distilled for; "
                "distil it further with second_stage, or give its own teacher"
            )

    def stage(
        self, plan: StagePlan, teacher: NetworkDenoiser, config: SFDConfig, inputs: Inputs
    ) -> SFDStage:
        store = self.recording(config, teacher, inputs)
        start = teacher
        if len(config.several_nfe) > 1 and not teacher.step_condition:
            start = with_step_condition(teacher, start=config.step_condition, seed=inputs.seed)
        perceptual = None
        if config.perceptual != "none":
            perceptual = LPIPS(as_reference=config.perceptual == "lpips-sfd")
        return SFDStage(
            config=config,
            trajectories=(store.open() if store is not None else _live(config, teacher, inputs)),
            start=start,
            seed=inputs.seed,
            perceptual=perceptual,
        )

    def recording(
        self, config: SFDConfig, teacher: NetworkDenoiser, inputs: Inputs
    ) -> TrajectoryStore | None:
        """The teacher's trajectories, which do not depend on the branch weights."""
        if inputs.recordings is None:
            return None
        live = _live(config, teacher, inputs)
        return TrajectoryStore(live, inputs.recordings.root, inputs.recordings.dtype)


def _live(config: SFDConfig, teacher: NetworkDenoiser, inputs: Inputs) -> Trajectories:
    """The teacher's trajectories, computed anew for every batch."""
    teacher_afs = False
    if config.second_stage:
        served = {sampler.num_intervals: sampler for sampler in samplers_from(inputs.metadata)}
        teacher_afs = served[_walked(config)].afs
    elif (table := config.teacher_table()) is not None:
        teacher_afs = table.afs
    return Trajectories(
        teacher=teacher,
        grid=config.grid(config.levels_for(teacher)),
        solver=config.make_solver(),
        batch=config.batch,
        count=config.num_updates,
        seed=inputs.seed,
        teacher_afs=teacher_afs,
        conditions=inputs.conditions_for(teacher),
        guidance=config.guidance_teacher,
    )


def _walked(config: SFDConfig) -> int:
    """Intervals that the teacher of a second stage walks."""
    return (config.several_nfe[0] + config.afs) * config.substeps


def _check_second_stage(
    config: SFDConfig, served: Mapping[int, Sampler], levels: Schedule
) -> None:
    """Refuse a teacher that is not a student of this grid and these steps.

    A student for several NFE gets the number of points of the grid it walks.
    """
    if not served:
        raise KnobError(
            "second_stage",
            "distils a student further, and this teacher is not a student; make one of it first, "
            "with `nfe` 5",
        )
    any_of_them = next(iter(served.values()))
    if not isinstance(any_of_them.schedule, Schedule):
        raise InputError(
            "second_stage walks students of SFD, and the teacher draws by "
            f"{any_of_them.schedule.text()}; distil it further with the method progressive"
        )
    if any_of_them.solver.name != config.solver:
        raise InputError(
            f"second_stage walks students by {config.solver}, and the teacher draws by "
            f"{any_of_them.solver.name}; give its own teacher, without second_stage"
        )
    if any_of_them.schedule != levels:
        raise InputError(
            f"second_stage keeps the teacher's noise levels, {any_of_them.schedule.describe()}, "
            f"got {levels.describe()}; give the teacher's (schedule, rho, sigma_min, "
            "sigma_max)"
        )
    if (wanted := _walked(config)) not in served:
        own = " or ".join(map(str, served))
        raise InputError(
            f"the teacher was distilled for {own} intervals, and (nfe + afs) x substeps is "
            f"{wanted} here; choose nfe and substeps so that it is {own}, or give another student"
        )
