"""The one place where a study file meets the engine: spec in, ``bdense`` objects out."""

from collections.abc import Mapping
from typing import Any

import torch

from bdense.data.datasets import image_shape
from bdense.data.names import split_format, split_side
from bdense.diffusion.denoiser import build_denoiser
from bdense.diffusion.intervals import IntervalGrid, VariableGrid
from bdense.diffusion.sampling import Sampler
from bdense.diffusion.solvers import Solver
from bdense.errors import InputError
from bdense.execution import Execution
from bdense.methods.sfd import SFDConfig
from bdense.metrics.classifiers import RECIPES
from bdense.metrics.dinov2 import SIZES
from bdense.metrics.extractors import SPECS
from bdense.models.public import published_architecture
from bdense.models.sources import load_model
from bdense.networks import SongUNet, SongUNetConfig
from bdense.training.teacher import TeacherConfig, new_denoiser
from bdense.weights.spaces import LogLinearWeights, normalised_weights, uniform_weights
from search.errors import SpecError
from search.spec.model_spec import ModelSpec, TeacherTraining
from search.spec.study_spec import LearnedSpace, NormalisedSpace, StudySpec
from search.worker.traced_weights import TracedWeights


def check(spec: StudySpec) -> None:
    """Refuse what only the engine can see, before anything is spent.

    Raises:
        SpecError: There is no such data set or extractor, the teacher makes other images than the
            data set's, network options do not fit together, no weights are within the bound, or
            there is nothing to search.
    """
    try:
        student_grid(spec)
        training_config(spec)
        if spec.resources.gpus == 0:
            execution(spec).require(torch.device("cpu"))
    except InputError as error:
        raise SpecError(f"study {spec.name}: {error}") from error
    check_models(spec)
    if isinstance(spec.weights, LearnedSpace):
        _check_learned(spec, spec.weights)
    elif spec.weights.largest is not None:
        least = _smallest_largest_weight(spec)
        if least > spec.weights.largest:
            raise SpecError(
                f"study {spec.name}: weights.largest {spec.weights.largest} rules out the whole "
                f"space, whose smallest largest weight is {least:.4g}; raise weights.largest or "
                "lower the bounds"
            )


def check_models(spec: ModelSpec) -> None:
    """Refuse what only the engine can see of data, extractor and teacher.

    Raises:
        SpecError: As of ``check``.
    """
    _check_data(spec)
    _check_extractor(spec)
    if spec.teacher.train is not None:
        _check_network(spec.teacher.train)


def _check_data(spec: ModelSpec) -> None:
    # Files are looked into once they are read, which may take long.
    if spec.data is None or split_format(split_side(spec.data)[0]) is not None:
        return
    try:
        shape = image_shape(spec.data)
    except InputError as error:
        raise SpecError(f"study {spec.name}: data: {error}") from error
    name = spec.teacher.checkpoint
    published = published_architecture(name)
    if published is None or not spec.uses_data:
        return
    with torch.device("meta"):
        made = tuple(build_denoiser(dict(published)).image_shape)
    if made != shape:
        raise SpecError(
            f"study {spec.name}: teacher.checkpoint: {name} makes images of {made} "
            f"(channels, height, width) and data {spec.data} holds {shape}; choose another of the "
            "two"
        )


def _check_extractor(spec: ModelSpec) -> None:
    name = spec.evaluation.extractor
    kind, _, file = name.partition(":")
    of_a_file = kind == "torchscript" and file
    if not (of_a_file or kind in ("inception", "dinov2", *SIZES) or name in RECIPES):
        raise SpecError(
            f"study {spec.name}: evaluation.extractor: there is no {name!r}; known are {SPECS}"
        )


def _check_learned(spec: StudySpec, space: LearnedSpace) -> None:
    try:
        for strength in (space.strength.low, space.strength.high):
            branches_and_weights(spec, {"rule": space.rules[0], "strength": strength})
    except InputError as error:
        raise SpecError(f"study {spec.name}: weights.strength: {error}") from error
    if spec.resources.compile and "gradient-norm" in space.rules:
        raise SpecError(
            f"study {spec.name}: rule gradient-norm looks into the network, which "
            "resources.compile closes; drop one of the two"
        )
    if space.is_one_point and spec.budget.trials > 1:
        raise SpecError(
            f"study {spec.name}: {spec.budget.trials} trials (budget.trials or --trials) would "
            f"all be the same, rule {space.rules[0]} at strength {space.strength.low:g}; run 1, "
            "or give weights.rules or weights.strength more than one value"
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
    try:
        teacher_config(training)
    except InputError as error:
        raise SpecError(f"teacher.train: {error}") from error


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
        precond=training.precond,
        loss=training.loss,
        flip=training.flip,
        clip=training.clip,
    )


def teacher_solver(spec: StudySpec) -> Solver:
    """The solver that the teacher walks with."""
    return training_config(spec).make_solver()


def student_grid(spec: StudySpec) -> IntervalGrid:
    """N intervals (NFE, or NFE + 1 with AFS) of K sub-steps."""
    grid = training_config(spec).grid
    assert not isinstance(grid, VariableGrid)  # a study is of one NFE
    return grid


def student_sampler(spec: StudySpec) -> Sampler:
    """How a student of this study draws images."""
    return training_config(spec).samplers[0]


def training_config(spec: StudySpec) -> SFDConfig:
    """How a student of this study learns."""
    student, budget = spec.student, spec.budget
    levels = student.schedule.model_dump()
    return SFDConfig(
        nfe=student.nfe,
        substeps=student.substeps,
        afs=student.afs,
        solver=student.solver.name,
        order=student.solver.order,
        thresholding=student.solver.thresholding,
        schedule=levels.pop("kind"),
        **levels,
        kimg=budget.kimg,
        batch=budget.batch,
        lr=budget.lr,
    )


def execution(spec: ModelSpec) -> Execution:
    """How teacher and students compute their network."""
    resources = spec.resources
    return Execution(
        precision=spec.precision,
        compile=resources.compile,
        channels_last=resources.channels_last,
    )


def architecture(spec: ModelSpec) -> dict[str, Any]:
    """The teacher's network as ``build_denoiser`` takes it; nothing is downloaded for it.

    Raises:
        InputError: The teacher's file cannot be read, or the network does not fit the data.
    """
    name = spec.teacher.checkpoint
    if name is not None:
        published = published_architecture(name)
        return dict(published) if published is not None else load_model(name)[0].describe()
    assert spec.teacher.train is not None
    assert spec.data is not None  # a spec that trains a teacher names its data
    shape = torch.Size(image_shape(spec.data))
    with torch.device("meta"):
        return new_denoiser(teacher_config(spec.teacher.train), shape).describe()


def branches_and_weights(
    spec: StudySpec, params: Mapping[str, Any]
) -> tuple[int, LogLinearWeights | TracedWeights]:
    """num_branches and weights of a row: a trial's, given or learned, or a baseline's method.

    The parameters alone say which, whatever space the study searches: they may come from another.
    """
    if params.get("method") == "sfd":
        return 1, uniform_weights()
    substeps = spec.student.substeps
    if params.get("method") == "uniform":
        return substeps, uniform_weights()
    if "rule" in params:
        memory = params["memory"] if "memory" in params else updates_remembered(spec)
        rule, strength = params["rule"], params["strength"]
        return substeps, TracedWeights(substeps, rule=rule, strength=strength, memory=memory)
    return substeps, given_weights(params, substeps)


def updates_remembered(spec: StudySpec) -> int:
    """Updates that learned weights of this study remember."""
    assert isinstance(spec.weights, LearnedSpace)
    return spec.weights.memory


def excess_weight(spec: StudySpec, params: Mapping[str, Any]) -> float:
    """max_k w_k minus ``weights.largest``: above 0 the suggestion is not trained."""
    if isinstance(spec.weights, LearnedSpace) or spec.weights.largest is None:
        return 0.0
    values = given_weights(params, spec.student.substeps)(spec.student.substeps)
    return float(values.max()) - spec.weights.largest


def given_weights(params: Mapping[str, Any], substeps: int) -> LogLinearWeights:
    """(a, b) of parameters; without b the sum of w_k is K."""
    if "b" in params:
        return LogLinearWeights(a=params["a"], b=params["b"])
    return normalised_weights(params["a"], substeps)


def _smallest_largest_weight(spec: StudySpec) -> float:
    """The least max_k w_k that a space of given weights offers."""
    space = spec.weights
    assert not isinstance(space, LearnedSpace)
    if isinstance(space, NormalisedSpace):
        params = {"a": min(max(0.0, space.a.low), space.a.high)}
    else:
        params = {"a": space.a.low, "b": space.b.low}
    return float(given_weights(params, spec.student.substeps)(spec.student.substeps).max())
