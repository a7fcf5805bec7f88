"""The command-line options that describe how images are drawn."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from bdense.diffusion.preconditioning import Preconditioning, native_schedule
from bdense.diffusion.sampling import Sampler, samplers_from
from bdense.diffusion.schedules import SCHEDULES, Levels, Schedule
from bdense.diffusion.solver_names import SOLVERS
from bdense.diffusion.solvers import DDIM, Solver, make_solver
from bdense.diffusion.vp import VPSchedule
from bdense.errors import InputError

LEVELS: dict[str, Any] = {
    "schedule": "polynomial",
    "rho": 7.0,
    "sigma_min": 0.006,
    "sigma_max": 80.0,
}
GRID: dict[str, Any] = {"nfe": 2, "afs": True, **LEVELS}
SOLVER: dict[str, Any] = {"solver": "euler", "order": None, "clip": False}
# The schedule that is a network's own process.
NATIVE = "native"
SECOND_STAGE_NFE = 1


def add_grid_options(parser: argparse.ArgumentParser, *, distilled: bool = False) -> None:
    """NFE, AFS and the noise schedule; ``distilled``: of a student that is made, for any NFE."""
    # Absent where not given: a student has a grid of its own.
    if distilled:
        parser.add_argument(
            "--nfe",
            metavar="N",
            type=int,
            nargs="+",
            default=argparse.SUPPRESS,
            help="network evaluations an image; several numbers make one student for all of them, "
            f"SFD-v (default: {GRID['nfe']}; {SECOND_STAGE_NFE} with --second-stage)",
        )
    else:
        parser.add_argument(
            "--nfe",
            metavar="N",
            type=int,
            default=argparse.SUPPRESS,
            help=f"network evaluations an image (default: {GRID['nfe']})",
        )
    parser.add_argument(
        "--afs",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help=f"analytical first step: one more interval for the same NFE (default: {GRID['afs']})",
    )
    add_level_options(parser, default=LEVELS["schedule"], native=not distilled)


def add_level_options(
    parser: argparse.ArgumentParser, *, default: str, native: bool = True
) -> None:
    """--schedule and the numbers that it takes; ``native``: the network's process is one, too."""
    *kinds, last = SCHEDULES
    if native:
        kinds, last = [*kinds, last], f"{NATIVE}, the process that the network was trained on"
    what = f"spacing of the noise levels: {', '.join(kinds)} or {last}"
    parser.add_argument(
        "--schedule", default=argparse.SUPPRESS, help=f"{what} (default: {default})"
    )
    numbers = {
        "rho": "exponent of the spacing",
        "sigma_min": "last noise level, the lowest",
        "sigma_max": "first noise level, the highest",
    }
    for name, what in numbers.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=float,
            default=argparse.SUPPRESS,
            help=f"{what} (default: {LEVELS[name]})",
        )


def add_clip_option(parser: argparse.ArgumentParser) -> None:
    """--clip, of what draws."""
    parser.add_argument(
        "--clip",
        action="store_true",
        default=argparse.SUPPRESS,
        help="clamp ddim's predictions to [-1, 1] (default: let them be)",
    )


def add_solver_options(parser: argparse.ArgumentParser, *, default: str, what: str) -> None:
    """--solver and its --order."""
    parser.add_argument(
        "--solver",
        choices=tuple(SOLVERS),
        default=argparse.SUPPRESS,
        help=f"{what} (default: {default})",
    )
    ranges = " or ".join(
        f"{name} ({orders[0]} to {orders[-1]})"
        for name, orders in SOLVERS.items()
        if len(orders) > 1
    )
    parser.add_argument(
        "--order",
        metavar="N",
        type=int,
        default=argparse.SUPPRESS,
        help=f"order of {ranges} (default: the highest)",
    )


def chosen_solver(options: argparse.Namespace, default: str) -> Solver:
    """The solver that the options name."""
    chosen = SOLVER | {"solver": default} | _given(options, SOLVER)
    return make_solver(chosen["solver"], order=chosen["order"])


def chosen_schedule(
    options: argparse.Namespace,
    precond: Preconditioning,
    default: str = LEVELS["schedule"],
) -> Levels:
    """The noise levels that the options describe.

    Args:
        options: The command line.
        precond: Of the network, whose own process is ``native``.
        default: What is taken without --schedule.

    Raises:
        InputError: The options describe no levels, or the network has no process.
    """
    given = _given(options, LEVELS)
    chosen = LEVELS | {"schedule": default} | given
    if chosen["schedule"] != NATIVE:
        return _schedule(chosen)
    given.pop("schedule", None)
    if given:
        raise InputError(
            f"--schedule {NATIVE} has the levels of the network's own process, and "
            f"{_flags(given)} asks for others; drop that, or choose another schedule"
        )
    return native_schedule(precond)


def student_samplers(
    options: argparse.Namespace, stage_one: Sampler | None = None
) -> list[Sampler]:
    """Euler on the grids that the options describe: what a student is distilled for, by NFE.

    Args:
        options: The command line.
        stage_one: A sampler of the teacher, where that is a student: its levels are kept.

    Raises:
        InputError: The options describe no such grids, or other levels than the teacher's.
    """
    known, given = GRID | SOLVER, _given(options, GRID)
    if given.get("schedule") == NATIVE:
        raise InputError(
            f"--schedule {NATIVE} ends without noise, which Euler students do not reach; choose "
            "another schedule, or distil with bdense progressive"
        )
    if stage_one is not None:
        known |= {"nfe": SECOND_STAGE_NFE} | _levels(stage_one)
        other = {name: value for name, value in given.items() if name in _levels(stage_one)}
        if known | other != known:
            raise InputError(
                f"--second-stage keeps the noise levels that {options.teacher} was distilled for, "
                f"and {_flags(other)} asks for others; drop that"
            )
    wanted = given.pop("nfe", [known["nfe"]])
    if len(set(wanted)) < len(wanted):
        raise InputError(f"--nfe {_spelt(wanted)} names a number twice; give each once")
    chosen = known | given
    return [_sampler(chosen | {"nfe": nfe}, _schedule(chosen)) for nfe in sorted(wanted)]


def chosen_sampler(
    options: argparse.Namespace, metadata: Mapping[str, Any], precond: Preconditioning
) -> Sampler:
    """The model's own sampler where it has one, else the one the options describe.

    Args:
        options: The command line.
        metadata: Of the model.
        precond: Of the model.

    Raises:
        InputError: The options contradict the model's own sampler, or describe none.
    """
    given = _given(options, GRID | SOLVER)
    served = {sampler.nfe: sampler for sampler in samplers_from(metadata)}
    native = given.get("schedule") == NATIVE
    if not served:
        usual = GRID | SOLVER | ({"solver": "ddim"} if native else {})
        return _sampler(usual | given, chosen_schedule(options, precond))
    smallest = min(served)
    own = served.get(given.get("nfe", smallest), served[smallest])
    kept = {"nfe": own.nfe, "afs": own.afs, **_levels(own)}
    kept |= {"solver": metadata["sampler"]["solver"], "order": own.solver.order}
    kept["clip"] = own.solver == DDIM(clip=True)
    if native and own.schedule == chosen_schedule(options, precond):
        del given["schedule"]
    if kept | given != kept:
        *others, largest = map(str, served)
        choices = f"{', '.join(others)} or {largest}" if others else largest
        flags = ", ".join(f"{name}={value}" for name, value in given.items())
        raise InputError(
            f"{options.model} draws with the sampler it was distilled for (NFE {choices}), and "
            f"{flags} asks for another; drop that, or distil a student for it"
        )
    return own


def _levels(sampler: Sampler) -> dict[str, Any]:
    """The schedule, by the names of its options."""
    levels = sampler.schedule.describe()
    return {"schedule": levels.pop("kind"), **levels}


def _spelt(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))


def _flags(values: Mapping[str, Any]) -> str:
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in values.items())


def _given(options: argparse.Namespace, known: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in vars(options).items() if name in known}


def _schedule(chosen: Mapping[str, Any]) -> Schedule:
    return Schedule(
        kind=chosen["schedule"],
        rho=chosen["rho"],
        sigma_min=chosen["sigma_min"],
        sigma_max=chosen["sigma_max"],
    )


def _sampler(chosen: Mapping[str, Any], schedule: Levels) -> Sampler:
    name, nfe, afs = chosen["solver"], chosen["nfe"], chosen["afs"]
    solver = make_solver(name, order=chosen["order"], clip=chosen["clip"])
    if isinstance(schedule, VPSchedule) and not isinstance(solver, DDIM):
        raise InputError(
            f"--schedule {NATIVE} ends without noise, which {name} does not reach; take "
            "--solver ddim"
        )
    num_intervals, rest = divmod(nfe + (1 if afs else 0), solver.nfe(1))
    if rest:
        taken, other = ("--afs", "--no-afs") if afs else ("--no-afs", "--afs")
        raise InputError(
            f"{name} spends {solver.nfe(1)} evaluations an interval, less one in all with --afs: "
            f"none of its grids costs --nfe {nfe} with {taken}; take --nfe {nfe + 1} or {other}"
        )
    return Sampler(num_intervals=num_intervals, afs=afs, schedule=schedule, solver=solver)
