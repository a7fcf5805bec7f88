"""The command-line options that describe how images are drawn."""

import argparse
from typing import Any

from bdense.errors import InputError
from bdense.sampling import Sampler, sampler_from
from bdense.schedules import Schedule
from bdense.solvers import SOLVERS, Solver, make_solver

GRID: dict[str, Any] = {
    "nfe": 2,
    "afs": True,
    "schedule": "polynomial",
    "rho": 7.0,
    "sigma_min": 0.006,
    "sigma_max": 80.0,
}
SOLVER: dict[str, Any] = {"solver": "euler", "order": None}


def add_grid_options(parser: argparse.ArgumentParser) -> None:
    """NFE, AFS and the noise schedule."""

    def add(flag: str, what: str, **kwargs: Any) -> None:  # noqa: ANN401 - argparse's own
        default = GRID[flag.removeprefix("--").replace("-", "_")]
        # Absent where not given: a student has a grid of its own.
        parser.add_argument(
            flag, default=argparse.SUPPRESS, help=f"{what} (default: {default})", **kwargs
        )

    add("--nfe", "network evaluations", metavar="N", type=int)
    add(
        "--afs",
        "analytical first step: one more interval for the same NFE",
        action=argparse.BooleanOptionalAction,
    )
    add("--schedule", "or logsnr, time_uniform")
    add("--rho", "exponent of the schedule", type=float)
    add("--sigma-min", "last noise level", type=float)
    add("--sigma-max", "first noise level", type=float)


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
        help=f"of {ranges} (default: the highest)",
    )


def chosen_solver(options: argparse.Namespace, default: str) -> Solver:
    """The solver that the options name."""
    chosen = SOLVER | {"solver": default} | _given(options, SOLVER)
    return make_solver(chosen["solver"], order=chosen["order"])


def student_sampler(options: argparse.Namespace) -> Sampler:
    """Euler on the grid that the options describe: what a student is distilled for."""
    return _sampler(GRID | SOLVER | _given(options, GRID))


def chosen_sampler(options: argparse.Namespace, stored: dict[str, Any] | None = None) -> Sampler:
    """The model's own sampler where it has one, else the one the options describe.

    Raises:
        InputError: The options contradict the model's own sampler, or describe none.
    """
    given = _given(options, GRID | SOLVER)
    if stored is None:
        return _sampler(GRID | SOLVER | given)
    own = sampler_from(stored)
    kept = {"nfe": own.nfe, "afs": own.afs, **stored["schedule"]}
    kept["schedule"] = kept.pop("kind")
    kept |= {"solver": stored["solver"], "order": own.solver.order}
    if kept | given != kept:
        flags = ", ".join(f"{name}={value}" for name, value in given.items())
        raise InputError(
            f"{options.model} draws with the sampler it was distilled for (NFE {own.nfe}), and "
            f"{flags} asks for another; drop that, or distil a student for it"
        )
    return own


def _given(options: argparse.Namespace, known: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in vars(options).items() if name in known}


def _sampler(chosen: dict[str, Any]) -> Sampler:
    name, nfe, afs = chosen["solver"], chosen["nfe"], chosen["afs"]
    solver = make_solver(name, order=chosen["order"])
    num_intervals, rest = divmod(nfe + (1 if afs else 0), solver.nfe(1))
    if rest:
        taken, other = ("--afs", "--no-afs") if afs else ("--no-afs", "--afs")
        raise InputError(
            f"{name} spends {solver.nfe(1)} evaluations an interval, less one in all with --afs: "
            f"none of its grids costs --nfe {nfe} with {taken}; take --nfe {nfe + 1} or {other}"
        )
    return Sampler(
        num_intervals=num_intervals,
        afs=afs,
        schedule=Schedule(
            kind=chosen["schedule"],
            rho=chosen["rho"],
            sigma_min=chosen["sigma_min"],
            sigma_max=chosen["sigma_max"],
        ),
        solver=solver,
    )
