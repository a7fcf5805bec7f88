"""``bdense sample``: draw images from a model as one picture."""

import argparse
from collections.abc import Mapping
from typing import Any

import torch

from bdense.diffusion.conditions import conditions_for
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.preconditioning import (
    Preconditioning,
    levels_on,
    native_schedule,
)
from bdense.diffusion.sampling import Sampler, draw_images, samplers_from, save_grid
from bdense.diffusion.schedules import Levels
from bdense.diffusion.solvers import make_solver
from bdense.errors import InputError
from bdense.execution import Execution
from bdense.knobs import from_options, spelt_options
from bdense.models.store import load_model
from bdense.verbs.common import chosen_hardware, require_writable
from bdense.verbs.options import Drawing, SampleOptions

_LEVELS = ("schedule", "rho", "sigma_min", "sigma_max")
_USUAL = {"nfe": 2, "afs": True, "solver": "euler", "order": None, "clip": False}


def sample(options: argparse.Namespace) -> None:
    """Run the verb."""
    own, drawing = from_options(SampleOptions, options), from_options(Drawing, options)
    device, execution = chosen_hardware(options)
    require_writable(own.out)
    model, sampler = model_and_sampler(own.model, drawing, device, execution)
    images = draw_images(
        model, sampler, own.images, seed=own.seed, batch=drawing.batch, class_index=drawing.class_
    )
    save_grid(images, own.out, own.columns)
    print(own.out)


def model_and_sampler(
    source: str, drawing: Drawing, device: torch.device, execution: Execution
) -> tuple[NetworkDenoiser, Sampler]:
    """The model on its device, and its sampler.

    Raises:
        InputError: There is no such model, or it has another sampler than the one asked for.
    """
    model, metadata = load_model(source)
    sampler = _chosen_sampler(source, drawing, metadata, model.precond)
    conditions_for(model.label_dim, drawing.class_)  # refuses a class it does not know
    return model.to(device).execute(execution), sampler


def _chosen_sampler(
    source: str, drawing: Drawing, metadata: Mapping[str, Any], precond: Preconditioning
) -> Sampler:
    """The model's own sampler if it has one, else the one that was asked for."""
    asked = {name: getattr(drawing, name) for name in (*_USUAL, *_LEVELS)}
    asked = {name: value for name, value in asked.items() if value is not None}
    served = {sampler.nfe: sampler for sampler in samplers_from(metadata)}
    native = asked.get("schedule") == "native"
    if not served:
        usual = _USUAL | ({"solver": "ddim"} if native else {})
        return _sampler(usual | asked, levels_on(drawing.chosen_levels, precond))
    smallest = min(served)
    own = served.get(asked.get("nfe", smallest), served[smallest])
    levels = own.schedule.describe()
    kept = {"nfe": own.nfe, "afs": own.afs, "schedule": levels.pop("kind"), **levels}
    solver = own.solver.describe()
    kept |= {"solver": solver["solver"], "clip": solver.get("clip", False)}
    kept["order"] = solver.get("max_order", own.solver.order)
    if native and own.schedule == native_schedule(precond):
        del asked["schedule"]
    if kept | asked != kept:
        other = {name: value for name, value in asked.items() if kept.get(name) != value}
        *others, largest = map(str, served)
        choices = f"{', '.join(others)} or {largest}" if others else largest
        raise InputError(
            f"{source} draws with the sampler it was distilled for (NFE {choices}), and "
            f"{spelt_options(other)} asks for another; drop that, or distil a student for it"
        )
    return own


def _sampler(chosen: Mapping[str, Any], schedule: Levels) -> Sampler:
    name, nfe, afs = chosen["solver"], chosen["nfe"], chosen["afs"]
    solver = make_solver(name, order=chosen["order"], clip=chosen["clip"])
    num_intervals, rest = divmod(nfe + (1 if afs else 0), solver.evaluations)
    if rest:
        taken, other = ("--afs", "--no-afs") if afs else ("--no-afs", "--afs")
        raise InputError(
            f"{name} needs {solver.evaluations} evaluations an interval, one less in total with "
            f"--afs, which cannot add up to --nfe {nfe} with {taken}; take --nfe {nfe + 1} or "
            f"{other}"
        )
    return Sampler(num_intervals=num_intervals, afs=afs, schedule=schedule, solver=solver)
