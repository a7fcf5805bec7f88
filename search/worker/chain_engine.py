"""Where a promotion file meets the engine: spec in, ``bdense`` objects out."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.preconditioning import DDPM, Cosine
from bdense.diffusion.schedules import Levels
from bdense.errors import InputError
from bdense.methods.progressive import PDConfig, Progressive
from bdense.weights.spaces import sum_to_one, uniform_weights
from search.errors import SpecError
from search.spec.promotion_spec import PromotionSpec
from search.study.arms import Arm
from search.worker.engine import architecture, check_models, execution, given_weights


def check_promotion(spec: PromotionSpec) -> None:
    """Refuse what only the engine can see, before anything is spent.

    Raises:
        SpecError: The chain does not divide, rounds or schedule do not fit, or as of
            ``search.worker.engine.check_models``.
    """
    check_models(spec)
    try:
        round_config(spec)
        if spec.resources.gpus == 0:
            execution(spec).require(torch.device("cpu"))
        made = architecture(spec)
    except InputError as error:
        raise SpecError(f"promotion {spec.name}: {error}") from error
    if made["precond"] not in (DDPM.name, Cosine.name):
        if spec.schedule == "native":
            raise SpecError(
                f"promotion {spec.name}: schedule: native: the teacher has precond "
                f"{made['precond']}, which has no process of its own; give a schedule "
                "(kind, sigma_min, sigma_max), or train a teacher with precond cosine or ddpm"
            )
        if spec.prediction_type is not None:
            raise SpecError(
                f"promotion {spec.name}: prediction_type {spec.prediction_type}: the teacher has "
                f"precond {made['precond']}, which has no prediction type; leave it out"
            )


def round_config(spec: PromotionSpec) -> PDConfig:
    """The chain and how each round is trained.

    Raises:
        InputError: K does not lead from the first number of steps to the last.
    """
    options = spec.round.model_dump()
    levels: dict[str, Any] = {}
    if spec.schedule != "native":
        levels = spec.schedule.model_dump()
        levels["schedule"] = levels.pop("kind")
    return PDConfig(
        steps=spec.chain.first,
        until=spec.chain.last,
        substeps=spec.chain.substeps,
        lr_schedule="linear" if options.pop("anneal") else "constant",
        weights_space=spec.weights_space,
        prediction_type=spec.prediction_type,
        clip_samples=spec.clip_samples,
        **options,
        **levels,
    )


def chain_schedule(spec: PromotionSpec, teacher: NetworkDenoiser) -> Levels:
    """Noise levels of all grids."""
    return round_config(spec).levels(teacher)


def require_levels_known(
    spec: PromotionSpec, known: Mapping[str, Any], teacher: NetworkDenoiser
) -> None:
    """Refuse a teacher that is a student of other steps or levels than the chain begins with.

    Args:
        spec: The promotion.
        known: The teacher's metadata.
        teacher: Itself.

    Raises:
        InputError: It is one; a student knows the levels that it was distilled for alone.
    """
    try:
        Progressive().check(round_config(spec), teacher, known)
    except InputError as error:
        raise InputError(f"teacher.checkpoint {spec.teacher.checkpoint}: {error}") from error


def chain_weights(arm: Arm, substeps: int) -> Tensor:
    """[num_branches] float64 of an arm, rescaled to sum 1: clipped gradients see the scale."""
    method = arm.params.get("method")
    if method == "pd":
        return torch.ones(1, dtype=torch.float64)
    if method == "uniform":
        return sum_to_one(uniform_weights()(substeps))
    return sum_to_one(given_weights(arm.params, substeps)(substeps))
