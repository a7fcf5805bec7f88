"""Specs checked against the engine: the one module of ``search.spec`` that imports torch.

It fills in the method's defaults, and the facts that others need without torch.
"""

import contextlib
import functools
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bdense.data.datasets import image_shape
from bdense.data.prompts import read_prompts
from bdense.diffusion.denoiser import NetworkDenoiser, build_denoiser
from bdense.diffusion.guidance import no_null
from bdense.errors import InputError
from bdense.execution import Execution
from bdense.knobs import KnobError, knobs_of
from bdense.methods import METHODS
from bdense.methods.method import Method, MethodConfig
from bdense.methods.one_shot import Coordinates, OneShot
from bdense.metrics.classifiers import RECIPES, Classifier
from bdense.metrics.extractors import require_known
from bdense.metrics.metrics import require_enough
from bdense.metrics.settings import MetricSettings
from bdense.models.diffusers_files import MODEL_FILE
from bdense.models.diffusers_teacher import codec_config, read_diffusers
from bdense.models.latents import (
    TEXT_ENCODER,
    TOKENIZER,
    drawn_shape,
    draws_latents,
)
from bdense.models.store import load_stored
from bdense.models.zoo import PROMPT_SETS, PUBLIC_MODELS
from bdense.training import TRACKERS, latent_digits
from bdense.training.lora import require_adaptable
from bdense.training.teacher import TeacherConfig, new_denoiser
from bdense.training.teacher_knobs import TeacherKnobs
from bdense.weights import space_of
from bdense.weights.space import BASELINE, UNIFORM
from search.errors import SpecError, under
from search.redaction import redact
from search.spec.sections import Facts, TeacherTraining
from search.spec.space import check_plan
from search.spec.study import StudySpec


def resolve(spec: StudySpec, source: str = "") -> StudySpec:
    """A parsed spec with the method's defaults and its facts.

    Raises:
        SpecError: There is no such method, data set or extractor, a setting is wrong, the teacher
            makes other images than the data set's, no weights are within the bound, or there is
            nothing to search. ``source`` is named in front.
    """
    source = source or f"study {spec.name}"
    resolved, problems = spec, list[str]()  # of single sections, to be told at once
    with _noting(problems):
        if spec.data is not None and spec.uses_data:
            _data_shape(spec.data)
    with _noting(problems, "weights"):
        _ = spec.space
    with _noting(problems):
        resolved = _with_facts(_with_usual(spec))
    with _noting(problems, "resources"):
        execution(spec).require_compatible()
    with _noting(problems, "evaluation.extractor"):
        require_known(spec.evaluation.extractor)
    with _noting(problems):
        _check_log(spec.resources.log)
    if problems:
        raise SpecError.of_lines(source, problems)
    try:
        _check_weights(resolved)
        _check_batch(resolved)
        check_plan(resolved, functools.partial(_check_arm, resolved))
        if spec.resources.gpus == 0:
            execution(spec).require(torch.device("cpu"))
        resolved = _with_teacher(resolved)
        _check_intermediate(resolved)
        return resolved
    except InputError as error:
        raise SpecError(f"{source}: {error}") from error


@contextlib.contextmanager
def _noting(problems: list[str], key: str = "") -> Iterator[None]:
    """Note an error, with its section's key in front, and go on."""
    try:
        yield
    except InputError as error:
        problems += str(SpecError.under(key, error) if key else error).splitlines()


def filled_in(spec: StudySpec) -> StudySpec:
    """The spec with the method's defaults and its facts, and no other checks.

    A method that may convert its teacher first is taken to do so where the teacher is not here.

    Raises:
        InputError: There is no such method, or it refuses a setting.
    """
    found = _with_facts(spec)
    if all(stage.branched for stage in found.resolved.stages):
        return found
    try:
        return _with_teacher(found)
    except InputError:
        return found


def describe_teacher(spec: StudySpec) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """The teacher's network as ``build_denoiser`` takes it, and its metadata, without a download.

    Raises:
        InputError: The teacher's file cannot be read, or the network does not fit the data.
    """
    name = spec.teacher.checkpoint
    if spec.teacher.recipe is not None:
        return dict(latent_digits.ARCHITECTURE), latent_digits.KNOWN
    if name is None:
        return _untrained(spec).describe(), {}
    if (published := PUBLIC_MODELS.get(name)) is not None:
        return dict(published.architecture), getattr(published, "known", {})
    if Path(name).is_dir() and not (Path(name) / MODEL_FILE).is_file():
        teacher, known = read_diffusers(name, weights=False)
    else:
        teacher, known = load_stored(name)
    return teacher.describe(), known


def meta_teacher(spec: StudySpec) -> tuple[NetworkDenoiser, Mapping[str, Any]]:
    """The teacher on the meta device and its metadata; raises as ``describe_teacher``."""
    described, known = describe_teacher(spec)
    with torch.device("meta"):
        return build_denoiser(described), known


def method_of(spec: StudySpec) -> tuple[Method, MethodConfig]:
    """The study's method and its config.

    Raises:
        InputError: There is no such method, or it refuses a setting.
    """
    method = METHODS[spec.method.name]()
    return method, method.Config.read(spec.method.options, "method")


def _untrained(spec: StudySpec) -> NetworkDenoiser:
    """The teacher that the study would train, on the meta device."""
    training = spec.teacher.train
    assert training is not None
    assert spec.data is not None  # a spec that trains a teacher names its data
    with under("teacher.train"):
        config = teacher_config(training)
    shape = torch.Size(_data_shape(spec.data))
    try:
        # Building is what finds a wrong type.
        with torch.device("meta"):
            return new_denoiser(config, shape)
    except KnobError as error:
        raise SpecError.under("teacher.train", error) from error
    except (InputError, TypeError, ValueError, RuntimeError) as error:
        raise SpecError.under(f"teacher.train.network {training.network}", error) from error


def variant(spec: StudySpec, changes: Mapping[str, Any], where: str = "method") -> StudySpec:
    """A resolved spec with some of the method's settings replaced; ``where`` is their key.

    Raises:
        InputError: The method has no such setting, or refuses the value.
    """
    if not changes:
        return spec
    if "epd_table" in changes:
        raise InputError(
            f"{where}.epd_table {changes['epd_table']} is the whole study's; give it in method"
        )
    return _with_facts(replace(spec, method=spec.method.with_options(changes)), where=where)


def execution(spec: StudySpec) -> Execution:
    """How teacher and students compute their network."""
    names = ("compile", "compile_mode", "channels_last", "gradient_checkpointing")
    own = {name: getattr(spec.resources, name) for name in names}
    return Execution(precision=spec.precision, **own)


def teacher_config(training: TeacherTraining) -> TeacherConfig:
    """How the study's own teacher is trained."""
    return TeacherConfig(**{name: getattr(training, name) for name in knobs_of(TeacherKnobs)})


def _with_usual(spec: StudySpec) -> StudySpec:
    """The spec with those of the method's settings that a checkpoint settles, if not given."""
    if spec.teacher.train is not None or spec.method.name not in METHODS:
        return spec
    teacher, known = meta_teacher(spec)
    with torch.device("meta"):
        usual = METHODS[spec.method.name].Config.usual(known, teacher)
    return replace(spec, method=spec.method.with_options({**usual, **spec.method.options}))


def _with_teacher(spec: StudySpec) -> StudySpec:
    """The facts, given the teacher's network, which the method may refuse."""
    teacher, known = meta_teacher(spec)
    with torch.device("meta"):
        teacher.execution = execution(spec)
        _check_pipeline(spec, teacher, known)
        _check_images(spec, teacher, known)
        _check_prompts(spec, teacher)
        _check_guidance(spec, teacher, known)
        method, config = method_of(spec)
        with under("method"):
            method.check(config, teacher, known)
            require_adaptable(teacher.model, config)
        if spec.plan.one_shot is not None:
            _check_one_shot(spec, teacher, known)
        return _with_facts(spec, teacher)


def _with_facts(
    spec: StudySpec, teacher: NetworkDenoiser | None = None, *, where: str = "method"
) -> StudySpec:
    with under(where):
        method = METHODS[spec.method.name]()
        config = method.Config.read_all(spec.method.options, where)
        plans = method.plan(config, teacher)
    facts = Facts(
        title=method.title,
        num_branches=config.num_branches,
        num_intervals=config.num_intervals,
        batch=config.batch,
        needs_data=method.needs_data,
        stages=plans,
    )
    chosen = spec.method.with_options(config.as_dict())
    return replace(spec, method=chosen, facts=facts)


_HIDDEN = (
    "weights by the branches' gradients read the features inside the network, which "
    "resources.compile and precision fast hide; drop one of the two"
)


def _check_weights(spec: StudySpec) -> None:
    """What the surrogate decides needs coordinates; stop also needs uniform weights as a point."""
    if not spec.is_search:
        return
    plan, space = spec.search, spec.weight_space
    space.check(spec.resolved.num_branches)
    if execution(spec).is_compiled and space.needs_gradients:
        raise InputError(f"weights: {_HIDDEN}")
    asked = {"race": plan.race, "stop": plan.stop, "short": plan.short is not None}
    if not space.axes and any(asked.values()):
        name = next(name for name, is_asked in asked.items() if is_asked)
        raise InputError(
            f"plan.{name}: {space.name} weights have no coordinates to compare points by; drop "
            f"plan.{name}, or search another space, such as normalised"
        )
    if plan.stop and space.coordinates({BASELINE: UNIFORM}) is None:
        raise InputError(
            f"plan.stop: uniform weights are no point of {space.name} weights, so what is left to "
            "gain is not known; drop plan.stop, or search another space, such as normalised"
        )


def _check_batch(spec: StudySpec) -> None:
    """Refuse missing data, and a batch that its GPUs cannot share."""
    facts = spec.resolved
    if spec.data is None and spec.uses_data:
        if facts.needs_data:
            raise InputError("data is missing; name the data set whose images are learned from")
        missing = "teacher.checkpoint" if spec.teacher.train else "evaluation.reference"
        raise InputError(
            "data is missing; name a data set, or leave it out and give both teacher.checkpoint "
            f"and evaluation.reference (missing: {missing})"
        )
    parts = spec.method.options.get("accumulate", 1)
    if facts.batch % (spec.resources.team * parts):
        each = f", each in method.accumulate {parts} parts" if parts > 1 else ""
        raise InputError(
            f"method.batch {facts.batch} cannot be shared equally by resources.gpus "
            f"{spec.resources.team}{each}; choose a multiple, or other gpus"
        )


def _check_intermediate(spec: StudySpec) -> None:
    """Check at, images and pruner against the stages, of which one may convert the teacher."""
    facts, plan = spec.resolved, spec.plan
    if len(facts.stages) > 1 and plan.at:
        raise InputError(
            f"plan.at {list(plan.at)}: a method of {len(facts.stages)} stages is measured "
            "after each of them; leave it out"
        )
    if len(facts.stages) == 1 and plan.pruner is not None and not plan.at:
        raise InputError(
            f"plan.pruner {plan.pruner} is asked at intermediate FIDs, of which there are "
            "none; give plan.at: [...], or drop plan.pruner"
        )
    if (images := plan.images or 0) > (most := spec.evaluation.num_images):
        raise InputError(
            f"plan.images {images} is above evaluation.images {most}; lower it, "
            "or leave it out for as many"
        )
    total = facts.stages[0].num_updates
    after = [round(fraction * total) for fraction in plan.at]
    if after and (after[0] < 1 or after[-1] >= total or len(set(after)) < len(after)):
        raise InputError(
            f"plan.at {list(plan.at)} of {total} updates are evaluations after {after} of "
            "them, which must be different and lie inside the training; choose other fractions"
        )


def _check_one_shot(spec: StudySpec, teacher: NetworkDenoiser, known: Mapping[str, Any]) -> None:
    method, config = method_of(spec)
    try:
        space = spec.weight_space
        coordinates = Coordinates(space, spec.resolved.num_branches, space.box)
        OneShot(method, coordinates).check(config.for_one_shot(1.0), teacher, known)
    except InputError as error:  # whose knobs, if any, are the method's
        raise InputError(f"plan.one_shot: {error}") from error


def _check_arm(spec: StudySpec, params: Mapping[str, Any]) -> None:
    weighting = space_of(params).weighting(params, spec.resolved.num_branches)
    if BASELINE not in params:
        spec.require_fitting(params)
    if execution(spec).is_compiled and weighting.needs_gradients:
        raise InputError(_HIDDEN)


def _check_pipeline(spec: StudySpec, teacher: NetworkDenoiser, known: Mapping[str, Any]) -> None:
    """Refuse a teacher of latents without the rest of its pipeline."""
    if not draws_latents(teacher, known):
        return
    if (name := spec.teacher.checkpoint) is None or name in PUBLIC_MODELS:
        return
    parts = [TEXT_ENCODER, TOKENIZER] if teacher.model.text_dim else []
    missing = [part for part in parts if not Path(name, part).is_dir()]
    if not Path(name).is_dir() or codec_config(Path(name)) is None or missing:
        raise InputError(
            f"teacher.checkpoint: {name} draws latents, and has no "
            f"{' or '.join(missing) or 'autoencoder'} beside it; give the folder of its whole "
            "pipeline in diffusers' format"
        )


def _check_prompts(spec: StudySpec, teacher: NetworkDenoiser) -> None:
    """Refuse prompts that the teacher does not read, and one that lacks them."""
    files = {"prompts": spec.prompts, "evaluation.prompts": spec.evaluation.prompts}
    if (scorer := spec.evaluation.clip_score) is not None and not teacher.model.text_dim:
        raise InputError(
            f"evaluation.clip_score {scorer} compares images with prompts, and the teacher takes "
            "none; leave it out"
        )
    if teacher.model.text_dim and spec.prompts is None:
        raise InputError("prompts: the teacher is conditioned on text; give a file of prompts")
    for key, file in files.items():
        if file is None:
            continue
        if not teacher.model.text_dim:
            raise InputError(f"{key}: the teacher takes no text; leave {key} out")
        if file in PROMPT_SETS and not PROMPT_SETS[file].is_here:
            continue
        with under(key):
            read_prompts(file)


def _check_guidance(spec: StudySpec, teacher: NetworkDenoiser, known: Mapping[str, Any]) -> None:
    """Refuse guidance when sampling of students that have learned it, or cannot have it."""
    options, scale = spec.method.options, spec.evaluation.guidance
    guides = known.get("guidance", teacher.model.has_null_class)
    if scale is None:
        return
    learned = options.get("guidance_teacher", 1.0)
    if learned != options.get("guidance_student", 1.0):
        raise InputError(
            f"evaluation.guidance {scale:g} is for students that were distilled without it, and "
            f"these learn their teacher's, method.guidance_teacher {learned:g}; drop one of them"
        )
    if scale != 1 and not guides:
        with under("evaluation"):
            raise no_null(scale)


def _check_images(spec: StudySpec, teacher: NetworkDenoiser, known: Mapping[str, Any]) -> None:
    """Refuse a teacher of other images than the data's, or than the extractor takes."""
    with under("teacher.checkpoint"):
        made = drawn_shape(teacher, known)
    if spec.data is not None and spec.uses_data:
        shape = _data_shape(spec.data)
        if made != shape:
            name = spec.teacher.checkpoint or spec.teacher.recipe
            raise SpecError(
                f"teacher: {name} makes images of {made} (channels, height, width) and "
                f"data {spec.data} holds {shape}; choose another of the two"
            )
    evaluation = spec.evaluation
    with under("evaluation"):
        require_enough(evaluation.metrics, MetricSettings(), evaluation.num_images)
        kind = evaluation.extractor.partition(":")[0]
        if (recipe := RECIPES.get(kind)) is not None:
            # On the meta device: only the shapes are looked at.
            classifier = Classifier(kind, recipe.side, num_classes=2)
            classifier(torch.zeros(2, *made, dtype=torch.uint8))


def _data_shape(data: str) -> tuple[int, int, int]:
    with under("data"):
        return image_shape(data)


def _check_log(places: Sequence[str]) -> None:
    for place in places:
        name, _, where = place.partition(":")
        if name not in TRACKERS:
            known = ", ".join(TRACKERS)
            raise SpecError(f"resources.log: {place!r} names none of {known}, but {name}")
        if "://" in where and (shown := redact(where)) != where:
            raise SpecError(
                f"resources.log: {name}:{shown} has a password, which the study would keep; leave "
                "it out, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or all of "
                "MLFLOW_TRACKING_URI) for the workers"
            )
        package = getattr(TRACKERS[name], "package", None)
        if package is not None and importlib.util.find_spec(package) is None:
            raise SpecError(
                f"resources.log: {place} needs the package {package}, here and where workers run; "
                f"pip install 'bdense[{name}]', or leave it out"
            )
        with under("resources.log"):
            TRACKERS[name](where)  # refuses a place that it cannot use
