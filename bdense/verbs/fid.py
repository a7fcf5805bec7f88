"""``bdense fid`` measures a model's images, ``bdense reference`` what they are compared with."""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bdense import NUMERICS
from bdense.data.datasets import Dataset, load_dataset
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.sampling import Sampler, draw_images
from bdense.errors import InputError
from bdense.execution import Execution
from bdense.files import atomic_write
from bdense.knobs import from_options
from bdense.metrics.extractors import Extractor, load_extractor
from bdense.metrics.metrics import measure_images, require_measurable
from bdense.metrics.references import (
    Reference,
    dataset_reference,
    read_reference,
    write_reference,
)
from bdense.metrics.settings import MetricSettings
from bdense.models.store import denoiser_sha256
from bdense.models.zoo import resolve_reference
from bdense.verbs.common import Progress, chosen_device, chosen_hardware, require_file_name
from bdense.verbs.options import Drawing, Features, FidOptions, ReferenceOptions
from bdense.verbs.sample import model_and_sampler


def fid(options: argparse.Namespace) -> None:
    """Run ``fid``."""
    own, features = from_options(FidOptions, options), from_options(Features, options)
    settings, drawing = from_options(MetricSettings, options), from_options(Drawing, options)
    if own.data is not None and own.reference is not None:
        raise InputError(
            f"--reference {own.reference} takes the place of a data set, got --data {own.data}; "
            "drop one"
        )
    device, execution = chosen_hardware(options)
    model, sampler = model_and_sampler(options.model, drawing, device, execution)
    file = None if own.reference is None else resolve_reference(own.reference)
    dataset = load_dataset(own.data or "digits") if file is None else None
    extractor = load_extractor(features.extractor, cache=features.cache, device=device)
    if file is not None:
        reference = read_reference(file, extractor)
    else:
        assert dataset is not None
        with_features = set(own.metrics) != {"fid"}
        reference = dataset_reference(
            dataset, extractor, cache=features.cache, with_features=with_features
        )
    require_measurable(own.metrics, settings, own.images, reference)
    images = draw_images(
        model,
        sampler,
        own.images,
        seed=own.seed,
        batch=drawing.batch,
        class_index=drawing.class_,
        on_image=_show_drawn(own.images),
    )
    measured = measure_images(
        images,
        extractor,
        reference,
        metrics=own.metrics,
        settings=settings,
        nfe=sampler.nfe,
        seeds={"evaluation": own.seed},
    ).as_dict()
    of_class = {} if drawing.class_ is None else {"class": drawing.class_}
    unusual = {**of_class, **_unusual_precision(execution)}
    print(json.dumps(measured.pop("fid") | measured | unusual))


def reference(options: argparse.Namespace) -> None:
    """Run ``reference``."""
    own, features = from_options(ReferenceOptions, options), from_options(Features, options)
    device = chosen_device(options)
    require_file_name(own.out)
    dataset = load_dataset(own.data)
    extractor = load_extractor(features.extractor, cache=features.cache, device=device)
    statistics = dataset_reference(dataset, extractor, cache=features.cache).statistics
    write_reference(own.out, statistics, dataset.name, extractor)
    print(
        f"{own.out} {statistics.count} images of {dataset.name}, {extractor.dim} features of "
        f"{extractor.name} {extractor.sha256[:16]}"
    )


@dataclass(frozen=True, kw_only=True)
class KeptFIDs:
    """FIDs of several models under the same conditions, each measured once.

    Attributes:
        folder: Where each is kept when it is measured.
        dataset: What the images are compared with.
        images: Images drawn for each.
        seed: Of their latents.
    """

    folder: Path
    dataset: Dataset
    extractor: Extractor
    reference: Reference
    images: int
    seed: int

    @classmethod
    def of(
        cls,
        extractor_name: str,
        cache: Path,
        dataset: Dataset,
        device: torch.device,
        *,
        folder: Path,
        images: int,
        seed: int,
    ) -> "KeptFIDs":
        """With the extractor's features of the data set.

        Raises:
            InputError: There is no such extractor, or too few images.
        """
        extractor = load_extractor(extractor_name, cache=cache, device=device)
        reference = dataset_reference(dataset, extractor, cache=cache)
        require_measurable(["fid"], MetricSettings(), images, reference)
        return cls(
            folder=folder,
            dataset=dataset,
            extractor=extractor,
            reference=reference,
            images=images,
            seed=seed,
        )

    def fid(self, name: str, model: NetworkDenoiser, sampler: Sampler) -> dict[str, Any]:
        """What ``bdense fid`` prints of the model, from its file or measured now."""
        path = self.folder / f"{name}.fid.json"
        precision = _unusual_precision(model.execution)
        of = {
            "numerics": NUMERICS,
            "model": denoiser_sha256(model),
            "sampler": sampler.describe(),
            "images": self.images,
            "seed": self.seed,
            "data": self.dataset.sha256,
            "extractor": self.extractor.sha256,
            **precision,
        }
        kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        if kept.get("of") != of:
            kept = {"fid": self._measured(model, sampler) | precision, "of": of}
            with atomic_write(path) as scratch:
                scratch.write_text(json.dumps(kept))
        found: dict[str, Any] = kept["fid"]
        return found

    def _measured(self, model: NetworkDenoiser, sampler: Sampler) -> dict[str, Any]:
        images = draw_images(
            model, sampler, self.images, seed=self.seed, on_image=_show_drawn(self.images)
        )
        seeds = {"evaluation": self.seed}
        measured = measure_images(
            images, self.extractor, self.reference, nfe=sampler.nfe, seeds=seeds
        )
        return measured.fid.as_dict()


def _show_drawn(images: int) -> Callable[[int], None]:
    show = Progress()
    return lambda done: show(done, images, "images drawn")


def _unusual_precision(execution: Execution) -> dict[str, str]:
    """A condition of a FID that is not float32's."""
    precision = execution.precision
    return {} if precision == "float32" else {"precision": precision}
