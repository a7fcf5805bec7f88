"""The command-line options that describe how images are drawn."""

import argparse
from typing import Any

from bdense.errors import InputError
from bdense.sampling import Sampler, sampler_from
from bdense.schedules import Schedule

DEFAULTS: dict[str, Any] = {
    "nfe": 2,
    "afs": True,
    "schedule": "polynomial",
    "rho": 7.0,
    "sigma_min": 0.006,
    "sigma_max": 80.0,
}


def add_grid_options(parser: argparse.ArgumentParser) -> None:
    """NFE, AFS and the noise schedule."""

    def add(flag: str, what: str, **kwargs: Any) -> None:  # noqa: ANN401 - argparse's own
        default = DEFAULTS[flag.removeprefix("--").replace("-", "_")]
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


def chosen_sampler(options: argparse.Namespace, stored: dict[str, Any] | None = None) -> Sampler:
    """The model's own sampler where it has one, else the one the options describe.

    Raises:
        InputError: The options contradict the model's own sampler, or describe none.
    """
    given = {name: value for name, value in vars(options).items() if name in DEFAULTS}
    if stored is None:
        return _grid_sampler(DEFAULTS | given)
    own = sampler_from(stored)
    kept = {"nfe": own.nfe, "afs": own.afs, **stored["schedule"]}
    kept["schedule"] = kept.pop("kind")
    if _grid_sampler(kept | given) != own:
        flags = ", ".join(f"{name}={value}" for name, value in given.items())
        raise InputError(
            f"{options.model} draws with the sampler it was distilled for (NFE {own.nfe}), and "
            f"{flags} asks for another; drop that, or distil a student for it"
        )
    return own


def _grid_sampler(grid: dict[str, Any]) -> Sampler:
    return Sampler(
        num_intervals=grid["nfe"] + (1 if grid["afs"] else 0),
        afs=grid["afs"],
        schedule=Schedule(
            kind=grid["schedule"],
            rho=grid["rho"],
            sigma_min=grid["sigma_min"],
            sigma_max=grid["sigma_max"],
        ),
    )
