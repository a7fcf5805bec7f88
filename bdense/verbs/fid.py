"""``bdense fid`` measures a model's images, ``bdense reference`` what they are compared with."""

import json
from collections.abc import Mapping
from typing import Any

from bdense.command import Force
from bdense.data.datasets import load_dataset
from bdense.data.names import split_format
from bdense.diffusion.sampling import drawn_with
from bdense.errors import InputError
from bdense.execution import Execution
from bdense.files import require_output
from bdense.knobs import KnobError
from bdense.metrics.clip_score import load_clip_scorer
from bdense.metrics.extractors import load_extractor
from bdense.metrics.metrics import measure_images, require_measurable
from bdense.metrics.records import PromptFile
from bdense.metrics.references import (
    dataset_reference,
    no_statistics,
    read_reference,
    write_reference,
)
from bdense.metrics.settings import MetricSettings
from bdense.models.zoo import resolve_reference
from bdense.verbs.common import Progress, chosen_device, chosen_hardware
from bdense.verbs.evaluation import sequential, unusual_precision
from bdense.verbs.options import Drawing, Features, FidOptions, Hardware, ReferenceOptions
from bdense.verbs.sample import chosen_drawer, chosen_prompts


def fid(
    own: FidOptions,
    features: Features,
    settings: MetricSettings,
    drawing: Drawing,
    execution: Execution,
    hardware: Hardware,
) -> None:
    """Run ``fid``."""
    if own.data is not None and own.reference is not None:
        raise InputError(
            f"--reference {own.reference} takes the place of a data set, got --data {own.data}; "
            "drop one"
        )
    device = chosen_hardware(execution, hardware)
    texts = chosen_prompts(drawing.prompts)
    drawer = chosen_drawer(own.model, drawing, texts, device, execution, cache=features.cache)
    clip = None
    if own.clip_score is not None:
        if not texts:
            raise KnobError("clip_score", "compares images with prompts; give `prompts`, too")
        clip = load_clip_scorer(own.clip_score, texts, device)
    if own.reference is not None:
        file = resolve_reference(own.reference)
        extractor = load_extractor(features.extractor, cache=features.cache, device=device)
        reference = read_reference(file, extractor)
    else:
        dataset = load_dataset(own.data or _own_data(own.model, drawer.metadata))
        extractor = load_extractor(features.extractor, cache=features.cache, device=device)
        reference = dataset_reference(
            dataset, extractor, cache=features.cache, with_features=set(own.metrics) != {"fid"}
        )
    shape = drawer.image_shape
    require_measurable(own.metrics, settings, own.images, reference, shape, extractor)
    measured = measure_images(
        drawer.draw(own.images, own.seed, Progress().counting(own.images, "images drawn")),
        extractor,
        reference,
        metrics=own.metrics,
        settings=settings,
        **drawn_with(drawer.sampler, drawer.codec),
        seeds={"evaluation": own.seed},
        prompts=None if drawing.prompts is None else PromptFile.of(drawing.prompts, texts),
        clip=clip,
    ).as_dict()
    conditions: dict[str, Any] = {} if drawing.class_ is None else {"class": drawing.class_}
    conditions |= {"negative_prompt": drawing.negative_prompt} if drawing.negative_prompt else {}
    unusual = sequential(drawer.sampler) | conditions | unusual_precision(execution)
    print(json.dumps(measured.pop("fid") | measured | unusual))


def _own_data(model: str, known: Mapping[str, Any]) -> str:
    """The data set that a model was trained on, by its metadata."""
    data = known.get("data")
    if isinstance(data, str) and split_format(data) is None:
        return data
    said = "does not say what it was trained on" if data is None else f"was trained on {data}"
    raise KnobError(
        "data",
        f"is missing: {model} {said}; give `data`, for files with their path, or `reference`",
    )


def reference(
    own: ReferenceOptions, replacing: Force, features: Features, hardware: Hardware
) -> None:
    """Run ``reference``."""
    device = chosen_device(hardware)
    require_output(own.out, problem=no_statistics, force=replacing.force)
    dataset = load_dataset(own.data)
    extractor = load_extractor(features.extractor, cache=features.cache, device=device)
    require_output(
        own.out,
        problem=lambda path: no_statistics(path, dataset.name, extractor),
        force=replacing.force,
    )
    statistics = dataset_reference(dataset, extractor, cache=features.cache).statistics
    shape = dataset.images.shape[1:]
    write_reference(own.out, statistics, dataset.name, extractor, shape)
    print(
        f"{own.out} {statistics.count} images of {dataset.name}, {extractor.dim} features of "
        f"{extractor.name} {extractor.sha256[:16]}"
    )
