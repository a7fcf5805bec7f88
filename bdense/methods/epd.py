"""EPD: a frozen teacher learns how its solver steps (Zhu et al. 2025, arXiv 2507.14797).

The student is the teacher with a solver whose few numbers are trained: that its states at the ends
of its steps are those of the teacher's many small steps.

B batch, P points, C channels, H x W pixels, N student intervals.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NoReturn, Self

import torch
from torch import Tensor, nn

from bdense.diffusion import SOLVERS
from bdense.diffusion.conditions import Condition
from bdense.diffusion.denoiser import NetworkDenoiser, call_for_states
from bdense.diffusion.epd import EPD, Table, walk
from bdense.diffusion.guidance import calls, guided, null_for
from bdense.diffusion.intervals import IntervalGrid
from bdense.diffusion.sampling import Sampler, samplers_from
from bdense.diffusion.solvers import Solver, analytical_first_step, make_solver
from bdense.errors import InputError
from bdense.knobs import KnobError, knob, knob_of
from bdense.methods.method import (
    GridConfig,
    GuidanceKnobs,
    Inputs,
    Method,
    MethodConfig,
    MethodStage,
    StagePlan,
)
from bdense.methods.trajectories import Trajectories, TrajectoryBatch
from bdense.networks import Network
from bdense.randomness import Stream, generator
from bdense.training.optimisation import LRSchedule
from bdense.training.stage import Branches, BranchMeans
from bdense.weights.weighting import BranchWeighting

Loss = Literal["l2", "l1"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EPDConfig(GridConfig, GuidanceKnobs):
    """The knobs of EPD."""

    heading: ClassVar[str] = "method epd"

    steps: int = knob(
        3, "steps of the student, N; NFE is N (1 + points), less 1 with afs", low=1, high=1000
    )
    points: int = knob(
        2, "points in each step, whose slopes are computed as one batch", low=1, high=1000
    )
    max_order: int = knob_of(EPD, "max_order", 1)
    afs: bool = knob(
        True,
        "analytical first step: one evaluation less; for a teacher of latents it is off unless "
        "given",
    )
    bound_o: float = knob(0.05, "slopes are scaled by 1 plus or minus this at most", low=0)
    bound_s: float = knob(
        0.05,
        "levels told to the network are scaled by 1 plus or minus this at most",
        low=0,
        below=1,
    )
    last_scale: bool = knob(True, "scale the slopes of the last step, too")
    substeps: int = knob(
        8, "steps that the teacher takes in each of the student's", low=1, high=1000
    )
    solver: str = knob("dpm2", "solver that the teacher walks with", choices=tuple(SOLVERS))
    order: int | None = knob(None, "order of the solver", low=1, none="the highest")
    updates: Literal["each", "detached", "last"] = knob(
        "each",
        "each: an update after every step of the student's walk, backwards through all of it so "
        "far; detached: through that step alone; last: one, after the last step",
    )
    loss: Loss = knob("l2", "distance between states: squared or absolute errors, summed")
    kimg: float = knob_of(GridConfig, "kimg", 10.0)
    lr: float = knob_of(MethodConfig, "lr", 0.2)
    lr_schedule: LRSchedule = knob_of(MethodConfig, "lr_schedule", "linear")
    dropout: bool = knob_of(MethodConfig, "dropout", False)

    def __post_init__(self) -> None:
        MethodConfig.__post_init__(self)
        for name in ("ema", "tail", "rescale_weights", "lora_rank"):
            if getattr(self, name):
                raise KnobError(name, "does not apply to epd, which trains no network; drop it")
        if self.guidance_student != self.guidance_teacher:
            raise KnobError(
                "guidance_student",
                f"must be `guidance_teacher` {self.guidance_teacher:g}, as epd trains no network "
                f"that could learn guidance, got {self.guidance_student:g}",
            )
        _ = self.levels  # refuses what does not fit together
        self.make_solver()  # refuses an order that it does not have

    def make_solver(self) -> Solver:
        """What the teacher walks with."""
        return make_solver(self.solver, order=self.order)


class RawTable(nn.Module):
    """A table's numbers as they are trained, without bounds.

    r = sigmoid, w = softmax over the points of a step, o and s = 1 - b + 2 b sigmoid(. / 2).

    Args:
        config: Its bounds.
        raw: [N, P] each.
    """

    def __init__(self, config: EPDConfig, raw: Table) -> None:
        super().__init__()
        self.config = config
        for name, values in raw._asdict().items():
            self.register_parameter(name, nn.Parameter(values.clone()))

    @classmethod
    def drawn(cls, config: EPDConfig, seed: int) -> Self:
        """From N(0, 1), as published."""
        draw = generator(seed, Stream.INITIALISATION)
        shape = config.steps, config.points
        return cls(config, Table(*(torch.randn(shape, generator=draw) for _ in Table._fields)))

    def forward(self) -> Table:
        """The numbers themselves, [N, P] float64."""
        raw = {name: values.double() for name, values in self.named_parameters()}
        o = _about_one(raw["o"], self.config.bound_o)
        if not self.config.last_scale:
            o = torch.cat((o[:-1], torch.ones_like(o[-1:])))
        s = _about_one(raw["s"], self.config.bound_s)
        return Table(raw["r"].sigmoid(), raw["w"].softmax(-1), o, s)

    @torch.no_grad()
    def solver(self) -> EPD:
        """The solver with these numbers."""
        rows = {name: values.tolist() for name, values in self()._asdict().items()}
        return EPD(**rows, max_order=self.config.max_order)


def _about_one(raw: Tensor, bound: float) -> Tensor:
    return 1 - bound + 2 * bound * (raw / 2).sigmoid()


class TabledNetwork(Network):
    """A teacher's network, frozen, beside the table that is trained for it.

    Args:
        network: Of one branch; ``select`` gives it back.
        table: The only parameters that are trained.
    """

    def __init__(self, network: Network, table: RawTable) -> None:
        super().__init__()
        for name in Network.__annotations__:
            setattr(self, name, getattr(network, name))
        self.head_name = f"network.{network.head_name}"
        self.table, self.network = table, network

    @classmethod
    def build(cls, options: Mapping[str, Any], *, num_branches: int, outputs: int) -> NoReturn:
        raise NotImplementedError("it is made of a network for a training, and never kept")

    def describe(self) -> dict[str, Any]:
        return self.network.describe()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401  the network's
        found: Tensor = self.network(*args, **kwargs)
        return found

    def checkpoint_blocks(self, on: bool) -> None:
        self.network.checkpoint_blocks(on)

    def widen(self, num_branches: int) -> Self:
        """A copy whose network is frozen.

        Raises:
            InputError: K is not 1.
        """
        if num_branches != 1:
            raise InputError(f"epd trains no network, so that it has 1 branch, not {num_branches}")
        copied = copy.deepcopy(self)
        copied.network.requires_grad_(False)
        return copied

    def select(self, branch: int) -> Network:  # type: ignore[override]
        """A copy of the network without the table."""
        return self.network.select(branch)


@dataclass(eq=False, kw_only=True)
class EPDStage(MethodStage):
    """The one stage, which trains a table.

    Attributes:
        trajectories: The teacher's, of every step of the student: without AFS.
        table: What is trained; until ``begin``, what it starts as.
        seed: Of dropout.
    """

    kind: ClassVar[str] = "epd"

    config: EPDConfig
    trajectories: Trajectories
    table: RawTable
    seed: int
    start: NetworkDenoiser = field(init=False)

    def __post_init__(self) -> None:
        teacher = self.trajectories.teacher
        table = copy.deepcopy(self.table).to(next(teacher.parameters()))
        network = TabledNetwork(teacher.model, table).train(teacher.training)
        start = NetworkDenoiser(network, teacher.precond).train(teacher.training)
        self.start = start.execute(teacher.execution)

    @property
    def sampler(self) -> Sampler:
        """With the table as it is trained so far."""
        return Sampler(
            num_intervals=self.config.steps,
            afs=self.config.afs,
            schedule=self.trajectories.grid.schedule,
            solver=self.table.solver(),
            guidance=self.config.guidance_student,
        )

    def batch(self, iteration: int, images: slice) -> TrajectoryBatch:
        return self.trajectories.part(iteration, images)

    def begin(self, student: NetworkDenoiser) -> None:
        assert isinstance(student.model, TabledNetwork)
        self.table = student.model.table

    def updates(self, iteration: int, batch: TrajectoryBatch) -> Iterator["EPDUpdate"]:
        """One for each step of the student's own walk, or one for the whole walk."""
        config, substeps = self.config, batch.grid.substeps
        every = range(config.steps)
        x: Tensor = batch.start
        null = null_for(config.guidance_student, self.trajectories.conditions, like=x)
        older: Sequence[Tensor] = ()
        for steps in [every] if config.updates == "last" else [range(n, n + 1) for n in every]:
            update = EPDUpdate(
                stream=(iteration, steps[0]),
                steps=steps,
                x=x.detach() if config.updates == "detached" else x,
                older=older,
                levels=batch.grid.student(),
                target=batch.states[substeps * steps.stop - 1],
                given=batch.condition.arguments(),
                null=null,
                table=self.table,
            )
            yield update
            x, older = update.end, update.older_then

    def describe(self, weighting: BranchWeighting) -> dict[str, Any]:
        return {
            "weights": weighting.describe(),
            **{f"config.{name}": value for name, value in self.config.identity().items()},
            "config.seed": self.seed,
            **{f"trajectories.{k}": value for k, value in self.trajectories.describe().items()},
        }

    def on(self, device: torch.device) -> "EPDStage":
        return replace(self, trajectories=self.trajectories.on(device))


@dataclass(eq=False, kw_only=True)
class EPDUpdate:
    """Some steps of the student's walk, from the state ``x`` [B, C, H, W] on.

    Attributes:
        older: Slopes at the starts of the steps before, the newest first.
        levels: [N + 1] of the whole walk.
        target: [B, C, H, W] the teacher's state at the end.
        null: What guidance leads away from; None without guidance.
        end: Where the student ended.
        older_then: As ``older``, for the step after.
    """

    stream: tuple[int, ...]
    steps: range
    x: Tensor
    older: Sequence[Tensor]
    levels: Tensor
    target: Tensor
    given: Mapping[str, Any]
    null: Condition | None
    table: RawTable
    end: Tensor = field(init=False)
    older_then: Sequence[Tensor] = field(init=False)

    @property
    def where(self) -> Mapping[str, int]:
        return {"interval": self.steps[-1]}

    def __call__(self, branches: Branches) -> BranchMeans:
        config, first = self.table.config, self.steps.start
        predict = guided(branches, config.guidance_student, self.null)

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            return call_for_states(predict, self.given, x, sigma)[:, -1]

        model = analytical_first_step(denoise, self.levels[0]) if config.afs else denoise
        rows = Table(*(values[first : self.steps.stop] for values in self.table()))
        levels = self.levels[first : self.steps.stop + 1]
        for x, older in walk(model, self.x, levels, rows, config.max_order, self.older):
            self.end, self.older_then = x, older
        error = self.end - self.target
        distance = error.square() if config.loss == "l2" else error.abs()
        keeps_graph = config.updates == "each"
        return BranchMeans(distance.sum()[None] / len(error), keeps_graph=keeps_graph)


class EPDMethod(Method):
    """EPD: one stage."""

    name: ClassVar[str] = "epd"
    title: ClassVar[str] = "EPD"
    paper: ClassVar[str] = "Ensemble of Parallel Directions (EPD, arXiv 2507.14797)"
    Config: ClassVar[type[EPDConfig]] = EPDConfig

    def plan(
        self, config: EPDConfig, teacher: NetworkDenoiser | None = None
    ) -> tuple[StagePlan, ...]:
        row = ((0.5,) * config.points,)
        solver = EPD(r=row, w=row, o=row, s=row)  # its size counts
        nfe = (solver.nfe(config.steps) - config.afs) * calls(config.guidance_student)
        sequential = solver.sequential_nfe(config.steps) - config.afs
        label, updates = f"{nfe} NFE, {sequential} one after another", config.num_updates
        return (StagePlan(name="", label=label, num_updates=updates, nfe=nfe, branched=False),)

    def check(
        self, config: EPDConfig, teacher: NetworkDenoiser, metadata: Mapping[str, Any]
    ) -> None:
        config.require_guidable(teacher, metadata)
        teacher.require_levels(config.levels_for(teacher))
        teacher.execution.require_training("a table")
        if samplers_from(metadata):
            raise InputError(
                "the teacher is a student, which has a sampler already; give its own teacher"
            )
        if teacher.execution.is_compiled:
            raise InputError(
                "epd goes backwards through a call of the network several times, which a compiled "
                "one cannot; drop compile, and precision fast, which compiles"
            )

    def stage(
        self, plan: StagePlan, teacher: NetworkDenoiser, config: EPDConfig, inputs: Inputs
    ) -> EPDStage:
        # AFS is the student's; the teacher's states are wanted after the first step as well.
        grid = IntervalGrid(
            num_intervals=config.steps,
            substeps=config.substeps,
            afs=False,
            schedule=config.levels_for(teacher),
        )
        trajectories = Trajectories(
            teacher=teacher,
            grid=grid,
            solver=config.make_solver(),
            batch=config.batch,
            count=config.num_updates,
            seed=inputs.seed,
            conditions=inputs.conditions_for(teacher),
            guidance=config.guidance_teacher,
        )
        table = RawTable.drawn(config, inputs.seed)
        return EPDStage(config=config, trajectories=trajectories, table=table, seed=inputs.seed)
