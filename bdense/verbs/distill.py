"""``bdense distill``: a few-step student, or several NFE's, or a student of a student."""

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bdense.command import Verbs
from bdense.diffusion.branches import export_branch
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.intervals import IntervalGrid, VariableGrid
from bdense.diffusion.sampling import Sampler, samplers_from, served_metadata
from bdense.diffusion.schedules import Schedule
from bdense.diffusion.solvers import Euler, Solver
from bdense.diffusion.step_condition import STARTS, with_step_condition
from bdense.errors import InputError
from bdense.methods.perceptual import LPIPS
from bdense.methods.sfd import IterationReport, SFDConfig, distill
from bdense.methods.trajectories import LiveTrajectories
from bdense.models.cards import inherited, write_card
from bdense.models.sources import load_model
from bdense.models.store import denoiser_sha256, save_denoiser
from bdense.verbs.common import (
    Progress,
    add_execution_options,
    add_model,
    add_out,
    chosen_execution,
    computing_verb,
    image_count,
    require_file_name,
    unfinished,
)
from bdense.verbs.grid_options import (
    add_grid_options,
    add_solver_options,
    chosen_solver,
    student_samplers,
)
from bdense.weights.spaces import RULES, LogLinearWeights
from bdense.weights.weighting import BranchWeighting, FixedWeights, LearnedWeights

TEACHER_SOLVER = "dpmpp"
PERCEPTUAL = ("lpips", "lpips-sfd")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Usual:
    """What is taken where an option is not given, after Zhou et al. 2024 (docs/method.md)."""

    substeps: int = 4
    kimg: float = 200
    lr: float = 5e-5


_ONE_NFE, _SEVERAL_NFE = _Usual(), _Usual(kimg=800)
_SECOND_STAGE = _Usual(substeps=3, kimg=2000, lr=5e-4)


def add_distill(verbs: Verbs) -> None:
    """The verb and its options."""
    parser = computing_verb(
        verbs,
        "distill",
        "distil a few-step student with SFD, plain or B-DENSE",
        "bdense distill teacher.safetensors --nfe 2 --a 1.386 --out student.safetensors",
        _distill,
    )
    add_model(parser, "teacher")
    parser.add_argument(
        "--method",
        choices=("sfd", "sfd-bdense"),
        default="sfd-bdense",
        help="plain SFD, or with branches",
    )
    parser.add_argument(
        "--second-stage",
        action="store_true",
        help="TEACHER is a student itself; distil its steps into fewer",
    )

    def add(flag: str, what: str, default: str, **kwargs: Any) -> None:  # noqa: ANN401
        # Absent where not given: what is usual depends on the other options.
        what += f" (default: {default})"
        parser.add_argument(flag, default=argparse.SUPPRESS, help=what, **kwargs)

    add("--a", "slope of the branch weights, log w_k = a k + b", "0", type=float)
    add("--b", "offset of the branch weights, log w_k = a k + b", "0", type=float)
    add(
        "--learn",
        f"learn the branch weights while training, by the rule {' or '.join(RULES)}",
        "fixed by --a and --b",
        metavar="RULE",
    )
    add(
        "--strength",
        "exponent of --learn's rule: 0 is uniform, below 0 the reverse",
        "1",
        type=float,
    )
    add_grid_options(parser, distilled=True)
    add(
        "--step-condition",
        "where a student for several NFE starts: as its teacher, or with random layers for the "
        "number of steps, as the reference does",
        STARTS[0],
        choices=STARTS,
    )
    one, several, second = _ONE_NFE, _SEVERAL_NFE, _SECOND_STAGE
    add(
        "--substeps",
        "steps that the teacher takes in each of the student's",
        f"{one.substeps}; {second.substeps} with --second-stage",
        metavar="K",
        type=int,
    )
    add_solver_options(
        parser,
        default=f"{TEACHER_SOLVER}; euler with --second-stage",
        what="solver that the teacher walks with",
    )
    add(
        "--kimg",
        "training length in thousands of images",
        f"{one.kimg}; {several.kimg} for several NFE; {second.kimg} with --second-stage",
        type=float,
    )
    parser.add_argument(
        "--batch", metavar="N", type=int, default=128, help="images in each iteration"
    )
    add(
        "--lr",
        "Adam's step size; a tenth of it in the second half",
        f"{one.lr:g}; {second.lr:g} with --second-stage",
        type=float,
    )
    parser.add_argument(
        "--dropout",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train with the teacher's own dropout",
    )
    add(
        "--perceptual",
        "add the LPIPS between the ends of the last interval to the loss (needs the extra lpips, "
        "and 0.5 GB of weights); lpips feeds it images in [0, 1], which it expects, lpips-sfd in "
        "[-1, 1], as the reference does",
        "none",
        choices=PERCEPTUAL,
    )
    add_execution_options(parser)
    add_out(parser, "safetensors file to write")


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Who is distilled into what, beside how long and by which weights.

    Attributes:
        samplers: What the student will draw with, by NFE.
        solver: What the teacher walks with.
        teacher_afs: Whether its first step is analytical.
        usual: What is taken where an option is not given.
    """

    samplers: list[Sampler]
    solver: Solver
    teacher_afs: bool
    usual: _Usual

    def grid(self, substeps: int) -> IntervalGrid | VariableGrid:
        """The student's intervals with K teacher sub-steps in each."""
        first, *others = self.samplers
        afs, schedule = first.afs, first.schedule
        assert isinstance(schedule, Schedule)  # the options describe no other
        if not others:
            return IntervalGrid(
                num_intervals=first.num_intervals, substeps=substeps, afs=afs, schedule=schedule
            )
        return VariableGrid(
            num_intervals=tuple(sampler.num_intervals for sampler in self.samplers),
            substeps=substeps,
            afs=afs,
            schedule=schedule,
        )


def _distill(options: argparse.Namespace) -> None:
    given, execution = vars(options), chosen_execution(options)
    require_file_name(options.out)
    teacher, known = load_model(options.teacher)
    plan = _second_stage(options, known) if options.second_stage else _first_stage(options, known)
    teacher.to(options.device).execute(execution)
    grid = plan.grid(given.get("substeps", plan.usual.substeps))
    weighting = _weighting(options, grid.substeps)
    config = SFDConfig(
        num_branches=weighting.num_branches,
        images=image_count(given.get("kimg", plan.usual.kimg)),
        lr=given.get("lr", plan.usual.lr),
        dropout=options.dropout,
        seed=options.seed,
    )
    trajectories = LiveTrajectories(
        teacher=teacher,
        grid=grid,
        solver=plan.solver,
        batch=options.batch,
        count=config.iterations(options.batch),
        seed=options.seed,
        teacher_afs=plan.teacher_afs,
    )
    start = _start(options, plan, teacher)
    perceptual = _perceptual(options)
    show, scratch = Progress(), unfinished(options.out)

    def on_iteration(done: IterationReport) -> None:
        show(done.iteration + 1, done.iterations, f"loss {done.loss:.4g}")

    branched = distill(
        teacher,
        trajectories,
        config,
        weighting,
        start=start,
        perceptual=perceptual,
        checkpoint=scratch,
        on_iteration=on_iteration,
    )
    metadata = {
        "kind": "student",
        "method": options.method,
        **({"stage": 2} if options.second_stage else {}),
        **_weights_metadata(weighting),
        **({"perceptual": perceptual.describe()} if perceptual else {}),
        "training": asdict(config) | {"batch": options.batch, "precision": execution.precision},
        "teacher_sha256": denoiser_sha256(teacher),
        **inherited(known, Path(options.teacher).name),
        **served_metadata(plan.samplers),
    }
    student = export_branch(branched)
    save_denoiser(options.out, student, metadata)
    write_card(options.out, student, metadata)
    scratch.unlink(missing_ok=True)
    print(f"{options.out} NFE {' '.join(str(sampler.nfe) for sampler in plan.samplers)}")


def _first_stage(options: argparse.Namespace, known: Mapping[str, Any]) -> _Plan:
    """A teacher that answers at any level, walked with any solver."""
    if samplers_from(known):
        raise InputError(
            f"{options.teacher} is a student, which knows the levels it was distilled for alone; "
            "distil it further with --second-stage, or give its teacher"
        )
    samplers = student_samplers(options)
    return _Plan(
        samplers=samplers,
        solver=chosen_solver(options, TEACHER_SOLVER),
        teacher_afs=False,
        usual=_SEVERAL_NFE if len(samplers) > 1 else _ONE_NFE,
    )


def _second_stage(options: argparse.Namespace, known: Mapping[str, Any]) -> _Plan:
    """A teacher that is a student: on its own grid, by its own steps.

    A student for several NFE is told its number of points, that of the grid it walks.
    """
    served = {sampler.num_intervals: sampler for sampler in samplers_from(known)}
    if not served:
        raise InputError(
            f"--second-stage distils a student further, and {options.teacher} is none; make one "
            "of it first, with bdense distill --nfe 5"
        )
    (*_, any_of_them) = served.values()
    if not isinstance(any_of_them.schedule, Schedule):
        raise InputError(
            f"--second-stage walks students of SFD, and {options.teacher} draws by "
            f"{any_of_them.schedule.text()}; distil it further with bdense progressive"
        )
    samplers = student_samplers(options, any_of_them)
    if len(samplers) > 1:
        raise InputError(
            f"--second-stage is for one NFE, got --nfe {' '.join(map(str, options.nfe))}; give one"
        )
    solver = chosen_solver(options, "euler")
    if not isinstance(solver, Euler):
        raise InputError(
            f"--second-stage walks a student, which takes Euler steps, got --solver "
            f"{options.solver}; drop it"
        )
    (student,) = samplers
    substeps = vars(options).get("substeps", _SECOND_STAGE.substeps)
    wanted = student.num_intervals * substeps
    if substeps < 1:
        raise InputError(f"substeps (K) must be at least 1, got {substeps}")
    if wanted not in served:
        own = " or ".join(map(str, served))
        raise InputError(
            f"--nfe {student.nfe} with --substeps {substeps} makes the teacher walk "
            f"{student.num_intervals} x {substeps} = {wanted} intervals, and {options.teacher} "
            f"was distilled for {own}; {_way_out(served, student, wanted)}"
        )
    return _Plan(
        samplers=samplers, solver=solver, teacher_afs=served[wanted].afs, usual=_SECOND_STAGE
    )


def _way_out(served: Mapping[int, Sampler], student: Sampler, wanted: int) -> str:
    """What would fit: other numbers for this teacher, or another teacher."""
    free = student.num_intervals - student.nfe
    fitting = [
        f"--nfe {intervals // substeps - free} --substeps {substeps}"
        for intervals in served
        for substeps in range(2, intervals + 1)
        if intervals % substeps == 0 and intervals // substeps > free
    ]
    other = f"give a student distilled with --nfe {wanted - any(s.afs for s in served.values())}"
    return f"take {' or '.join(fitting)}, or {other}" if fitting else other


def _weighting(options: argparse.Namespace, substeps: int) -> BranchWeighting:
    """Given, or learned, for the method's number of branches."""
    given = {
        name: value
        for name, value in vars(options).items()
        if name in ("a", "b", "learn", "strength")
    }
    spelt = " ".join(f"--{name} {value}" for name, value in given.items())
    if options.method == "sfd":
        if any(given.values()):
            raise InputError(
                f"--method sfd has one output and no branch weights, got {spelt}; drop that or "
                "use --method sfd-bdense"
            )
        return FixedWeights(LogLinearWeights(a=0.0)(1))
    if "learn" not in given:
        if "strength" in given:
            raise InputError(
                f"--strength is of weights that are learned, got {spelt}; add --learn "
                f"{' or --learn '.join(RULES)}, or drop it"
            )
        a, b = given.get("a", 0.0), given.get("b", 0.0)
        # LogLinearWeights refuses a K below 1 as the grid has done.
        return FixedWeights(LogLinearWeights(a=a, b=b)(substeps))
    if "a" in given or "b" in given:
        raise InputError(
            f"--learn sets the branch weights that --a and --b would give, got {spelt}; drop one"
        )
    return LearnedWeights(substeps, rule=given["learn"], strength=given.get("strength", 1.0))


def _weights_metadata(weighting: BranchWeighting) -> dict[str, Any]:
    """The weights at the end, and the rule that they follow from."""
    described: dict[str, Any] = {"weights": weighting.weights().tolist()}
    if isinstance(weighting, LearnedWeights):
        described["weighting"] = weighting.describe()
    return described


def _start(
    options: argparse.Namespace, plan: _Plan, teacher: NetworkDenoiser
) -> NetworkDenoiser | None:
    """What a student for several NFE starts from."""
    chosen = vars(options).get("step_condition")
    if len(plan.samplers) > 1:
        start = with_step_condition(teacher, start=chosen or STARTS[0], seed=options.seed)
        return start.execute(teacher.execution)
    if chosen is not None:
        raise InputError(
            f"--step-condition {chosen} is of a student for several NFE, got one; give --nfe more "
            "numbers or drop it"
        )
    return None


def _perceptual(options: argparse.Namespace) -> LPIPS | None:
    chosen = vars(options).get("perceptual")
    return None if chosen is None else LPIPS(as_reference=chosen == "lpips-sfd")
