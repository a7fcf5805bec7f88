"""``bdense fid`` measures a model's images, ``bdense reference`` what they are compared with."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdense import NUMERICS
from bdense.command import Force
from bdense.data.datasets import Dataset, load_dataset
from bdense.data.names import split_format
from bdense.diffusion import BATCH
from bdense.diffusion.codecs import Codec
from bdense.diffusion.conditions import Prompts
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.sampling import SETUP, Sampler, draw_images
from bdense.errors import InputError
from bdense.execution import Execution
from bdense.files import plain_json, require_output, write_json
from bdense.knobs import KnobError
from bdense.metrics.clip_score import load_clip_scorer
from bdense.metrics.extractors import Extractor, load_extractor
from bdense.metrics.metrics import measure_images, require_measurable
from bdense.metrics.records import PromptFile
from bdense.metrics.references import (
    Reference,
    dataset_reference,
    no_statistics,
    read_reference,
    write_reference,
)
from bdense.metrics.settings import MetricSettings
from bdense.metrics.setup import Setup
from bdense.models.store import denoiser_sha256
from bdense.models.zoo import resolve_reference
from bdense.verbs.common import Interrupt, Progress, chosen_device, chosen_hardware
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
    texts = chosen_prompts(None, drawing.prompts)
    drawer = chosen_drawer(own.model, drawing, texts, device, execution)
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
        drawer.draw(own.images, own.seed, _show_drawn(own.images)),
        extractor,
        reference,
        metrics=own.metrics,
        settings=settings,
        nfe=drawer.sampler.nfe,
        seeds={"evaluation": own.seed},
        prompts=None if drawing.prompts is None else PromptFile.of(drawing.prompts, texts),
        clip=clip,
    ).as_dict()
    told: dict[str, Any] = {} if drawing.class_ is None else {"class": drawing.class_}
    told |= {"negative_prompt": drawing.negative_prompt} if drawing.negative_prompt else {}
    unusual = _sequential(drawer.sampler) | told | _unusual_precision(execution)
    print(json.dumps(measured.pop("fid") | measured | unusual))


def _own_data(model: str, known: Mapping[str, Any]) -> str:
    """The data set that a model was trained on, by its metadata.

    Raises:
        KnobError: They do not name one that can be found again.
    """
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


@dataclass(frozen=True, kw_only=True)
class KeptFIDs:
    """FIDs of several models under the same conditions, each measured once.

    Attributes:
        folder: Where each is kept when it is measured.
        dataset: The data set that ``reference`` was made of.
        image_shape: (C, H, W) of the models' images.
        conditions, codec: See ``draw_images``.
        prompts: The prompts of the conditions.
        images: Images drawn for each.
        seed: Seed of their latents.
        interrupt: Ends the drawing of images.

    Raises:
        InputError: See ``require_measurable``.
    """

    folder: Path
    dataset: Dataset
    extractor: Extractor
    reference: Reference
    image_shape: tuple[int, ...]
    images: int
    seed: int
    interrupt: Interrupt
    conditions: Prompts | None = None
    prompts: PromptFile | None = None
    codec: Codec | None = None

    def __post_init__(self) -> None:
        require_measurable(
            ["fid"],
            MetricSettings(),
            self.images,
            self.reference,
            self.image_shape,
            self.extractor,
        )

    def fid(self, name: str, model: NetworkDenoiser, sampler: Sampler) -> dict[str, Any]:
        """Metadata with the model's FID, from its file or measured now.

        ``fid`` is what ``bdense fid`` prints.
        """
        path = self.folder / f"{name}.fid.json"
        precision = _unusual_precision(model.execution)
        conditions = plain_json(
            {
                "numerics": NUMERICS,
                "model": denoiser_sha256(model),
                "sampler": sampler.describe(),
                "images": self.images,
                "seed": self.seed,
                "data": self.dataset.sha256,
                "extractor": self.extractor.sha256,
                **({} if self.conditions is None else self.conditions.describe()),
                **({} if self.codec is None else {"codec": self.codec.describe()}),
                **precision,
            }
        )
        kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        if kept.get("of") != conditions:
            show = _show_drawn(self.images, self.interrupt)
            images = draw_images(
                model,
                sampler,
                self.images,
                seed=self.seed,
                conditions=self.conditions,
                codec=self.codec,
                on_image=show,
            )
            seeds = {"evaluation": self.seed}
            measured = measure_images(
                images,
                self.extractor,
                self.reference,
                nfe=sampler.nfe,
                seeds=seeds,
                prompts=self.prompts,
            )
            unusual = _sequential(sampler) | precision
            setup = Setup.of(model, self.reference, BATCH, NUMERICS).as_dict()
            kept = {"fid": measured.fid.as_dict() | unusual, SETUP: setup, "of": conditions}
            write_json(path, kept)
        return {key: kept[key] for key in ("fid", SETUP) if key in kept}


def _show_drawn(images: int, interrupt: Interrupt | None = None) -> Callable[[int], None]:
    show = Progress(interrupt, "this FID was not measured; finished students are kept")
    return show.counting(images, "images drawn")


def _sequential(sampler: Sampler) -> dict[str, int]:
    """Network calls one after another, where they are fewer than the evaluations."""
    calls = sampler.sequential_nfe
    return {} if calls == sampler.nfe else {"sequential_nfe": calls}


def _unusual_precision(execution: Execution) -> dict[str, str]:
    """A FID's condition if the model was not computed in float32."""
    precision = execution.precision
    return {} if precision == "float32" else {"precision": precision}
