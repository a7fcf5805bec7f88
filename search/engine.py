"""The one place where a study file meets the engine: spec in, ``bdense`` objects out."""

from collections.abc import Mapping
from typing import Any

import torch

from bdense.errors import InputError
from bdense.intervals import IntervalGrid
from bdense.networks import SongUNet, SongUNetConfig
from bdense.sampling import Sampler
from bdense.schedules import Schedule
from bdense.sfd import SFDConfig
from bdense.solvers import Solver, make_solver
from bdense.teachers import TeacherConfig
from bdense.weights import LogLinearWeights, normalised_weights, uniform_weights
from search.errors import SpecError
from search.spec import StudySpec, TeacherTraining


def check(spec: StudySpec) -> None:
    """Refuse what only the engine can see, before anything is spent.

    Raises:
        SpecError: Network options do not fit together, or no weights are within the bound.
    """
    try:
        student_grid(spec)
        training_config(spec, spec.student.substeps)
    except InputError as error:
        raise SpecError(f"study {spec.name}: {error}") from error
    if spec.teacher.train is not None:
        _check_network(spec.teacher.train)
    if spec.weights.largest is not None:
        least = _smallest_largest_weight(spec)
        if least > spec.weights.largest:
            raise SpecError(
                f"study {spec.name}: weights.largest {spec.weights.largest} rules out the whole "
                f"space, whose smallest largest weight is {least:.4g}; raise weights.largest or "
                "lower the bounds"
            )


def _check_network(training: TeacherTraining) -> None:
    # The images' size is not known yet; 64 pixels can be halved as often as anybody asks.
    options = {"img_resolution": 64, "img_channels": 1, **training.network}
    try:
        # Without memory or numbers: building is what finds a wrong type.
        with torch.device("meta"):
            SongUNet(SongUNetConfig(**options))
    except (InputError, TypeError, ValueError, RuntimeError) as error:
        raise SpecError(f"teacher.train.network {training.network}: {error}") from error


def teacher_config(training: TeacherTraining) -> TeacherConfig:
    """How the study's own teacher is trained."""
    return TeacherConfig(
        images=round(training.kimg * 1000),
        batch=training.batch,
        lr=training.lr,
        warmup_images=round(training.warmup_kimg * 1000),
        ema_halflife_images=round(training.ema_halflife_kimg * 1000),
        seed=training.seed,
        network=training.network,
    )


def teacher_solver(spec: StudySpec) -> Solver:
    """The solver that the teacher walks with."""
    solver = spec.student.solver
    return make_solver(solver.name, order=solver.order, thresholding=solver.thresholding)


def student_grid(spec: StudySpec) -> IntervalGrid:
    """N intervals (NFE, or NFE + 1 with AFS) of K sub-steps."""
    student = spec.student
    return IntervalGrid(
        num_intervals=student.nfe + (1 if student.afs else 0),
        substeps=student.substeps,
        afs=student.afs,
        schedule=Schedule(**student.schedule.model_dump()),
    )


def student_sampler(spec: StudySpec) -> Sampler:
    """How a student of this study draws images."""
    grid = student_grid(spec)
    return Sampler(num_intervals=grid.num_intervals, afs=grid.afs, schedule=grid.schedule)


def training_config(spec: StudySpec, num_branches: int) -> SFDConfig:
    """How a student of this study learns."""
    return SFDConfig(
        num_branches=num_branches,
        images=spec.budget.images,
        lr=spec.budget.lr,
        seed=spec.seeds.training,
    )


def branch_weights(spec: StudySpec, params: Mapping[str, Any]) -> LogLinearWeights:
    """(a, b) of a trial's parameters."""
    if spec.weights.parameterisation == "normalised":
        return normalised_weights(params["a"], spec.student.substeps)
    return LogLinearWeights(a=params["a"], b=params["b"])


def branches_and_weights(
    spec: StudySpec, params: Mapping[str, Any]
) -> tuple[int, LogLinearWeights]:
    """num_branches and weights of a row: a trial's (a, b), or a baseline's method."""
    if params.get("method") == "sfd":
        return 1, uniform_weights()
    if params.get("method") == "uniform":
        return spec.student.substeps, uniform_weights()
    return spec.student.substeps, branch_weights(spec, params)


def excess_weight(spec: StudySpec, params: Mapping[str, Any]) -> float:
    """max_k w_k minus ``weights.largest``: above 0 the suggestion is not trained."""
    if spec.weights.largest is None:
        return 0.0
    values = branch_weights(spec, params)(spec.student.substeps)
    return float(values.max()) - spec.weights.largest


def _smallest_largest_weight(spec: StudySpec) -> float:
    """The least max_k w_k that the space offers."""
    space = spec.weights
    if space.parameterisation == "normalised":
        params = {"a": min(max(0.0, space.a.low), space.a.high)}
    else:
        assert space.b is not None
        params = {"a": space.a.low, "b": space.b.low}
    return float(branch_weights(spec, params)(spec.student.substeps).max())
