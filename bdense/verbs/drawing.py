"""``bdense sample`` and ``bdense fid``: draw from a model, look at it, measure it."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdense import NUMERICS
from bdense.command import Verbs
from bdense.data.datasets import DATA_SETS, Dataset, load_dataset
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.sampling import Sampler, draw_images, require_class, save_grid
from bdense.files import atomic_write
from bdense.metrics.extractors import Extractor, load_extractor
from bdense.metrics.metrics import METRICS, MetricSettings, measure_images, require_measurable
from bdense.metrics.references import Reference, dataset_reference, read_reference
from bdense.models.public import REFERENCES, resolve_reference
from bdense.models.sources import load_model
from bdense.models.store import denoiser_sha256
from bdense.verbs.common import (
    Progress,
    add_execution_options,
    add_model,
    add_out,
    chosen_execution,
    computing_verb,
    require_file_name,
)
from bdense.verbs.grid_options import (
    NATIVE,
    add_clip_option,
    add_grid_options,
    add_solver_options,
    chosen_sampler,
)


def add_sample(verbs: Verbs) -> None:
    """``sample`` and its options."""
    parser = computing_verb(
        verbs,
        "sample",
        "draw images from a student (or a teacher, with --nfe and so on) as one PNG",
        "bdense sample student.safetensors --images 64 --out samples.png",
        _sample,
    )
    add_model(parser, "model")
    parser.add_argument("--images", metavar="N", type=int, default=64, help="images to draw")
    parser.add_argument("--columns", metavar="N", type=int, default=16, help="columns of the grid")
    _add_drawing_options(parser)
    add_out(parser, "PNG file to write")


def add_fid(verbs: Verbs) -> None:
    """``fid`` and its options."""
    parser = computing_verb(
        verbs,
        "fid",
        "measure a model's FID, and more, and print it with its conditions as JSON",
        "bdense fid student.safetensors --data digits --extractor digits-classifier --images 4096",
        _fid,
    )
    add_model(parser, "model")
    against = parser.add_mutually_exclusive_group()
    # Absent, not "digits", unless it is given: argparse knows them apart by identity alone.
    against.add_argument(
        "--data",
        metavar="NAME",
        default=argparse.SUPPRESS,
        help=f"reference data set: {DATA_SETS} (default: digits)",
    )
    against.add_argument(
        "--reference",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="reference statistics (mu, sigma) in place of a data set, for fid alone: an .npz "
        f"file like EDM's, or one of EDM's by name: {', '.join(REFERENCES)}",
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=METRICS,
        default=["fid"],
        help="what to measure: fid always; kid: kernel distance; prc: precision and recall",
    )
    settings = MetricSettings()
    parser.add_argument(
        "--kid-subset-size",
        metavar="N",
        type=int,
        default=settings.kid_subset_size,
        help=f"images in each of kid's {settings.kid_subsets} subsets",
    )
    parser.add_argument(
        "--neighbours",
        metavar="K",
        type=int,
        default=settings.neighbours,
        help="nearest neighbours in prc",
    )
    parser.add_argument("--images", metavar="N", type=int, default=50_000, help="images to draw")
    add_extractor_options(parser)
    _add_drawing_options(parser)


def _add_drawing_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch", metavar="N", type=int, default=128, help="images drawn at a time"
    )
    parser.add_argument(
        "--class",
        dest="class_index",
        metavar="N",
        type=int,
        default=argparse.SUPPRESS,
        help="class of all images, counted from 0, of a conditional model (default: a random one "
        "for each)",
    )
    add_grid_options(parser)
    add_solver_options(
        parser,
        default=f"euler; ddim with --schedule {NATIVE}",
        what="solver that a teacher draws with",
    )
    add_clip_option(parser)
    add_execution_options(parser)


def add_extractor_options(
    parser: argparse.ArgumentParser, *, default: str = "inception", what: str = ""
) -> None:
    """--extractor and --cache; ``what`` goes in front of the extractors' names."""
    parser.add_argument(
        "--extractor",
        default=default,
        help=(what or "feature extractor: ")
        + "inception[:FILE], dinov2[:FILE], torchscript:FILE (uint8 [B,3,H,W] to "
        "[B,d]), digits-classifier, fashion-mnist-classifier or cifar10-classifier",
    )
    parser.add_argument(
        "--cache",
        metavar="DIR",
        type=Path,
        default=Path("runs/cache"),
        help="folder where statistics of reference sets and small classifiers are cached",
    )


def _sample(options: argparse.Namespace) -> None:
    require_file_name(options.out)
    model, sampler = _chosen_model(options)
    images = _drawn(options, model, sampler)
    save_grid(images, options.out, options.columns)
    print(options.out)


def _chosen_model(options: argparse.Namespace) -> tuple[NetworkDenoiser, Sampler]:
    """The model on its device, with all that is refused refused."""
    execution = chosen_execution(options)
    model, metadata = load_model(options.model)
    sampler = chosen_sampler(options, metadata, model.precond)
    require_class(model, _class_index(options))
    return model.to(options.device).execute(execution), sampler


def _drawn(
    options: argparse.Namespace,
    model: NetworkDenoiser,
    sampler: Sampler,
    show: Progress | None = None,
) -> Tensor:
    """[N, C, H, W] uint8."""

    def on_image(done: int) -> None:
        if show is not None:
            show(done, options.images, "images drawn")

    return draw_images(
        model,
        sampler,
        options.images,
        seed=options.seed,
        batch=options.batch,
        class_index=_class_index(options),
        on_image=on_image,
    )


def _class_index(options: argparse.Namespace) -> int | None:
    index: int | None = vars(options).get("class_index")
    return index


def _fid(options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    model, sampler = _chosen_model(options)
    file = getattr(options, "reference", None)
    named = getattr(options, "data", "digits")
    against = load_dataset(named) if file is None else resolve_reference(file)
    extractor = load_extractor(options.extractor, cache=options.cache, device=device)
    if isinstance(against, Dataset):
        with_features = set(options.metrics) != {"fid"}
        reference = dataset_reference(
            against, extractor, cache=options.cache, with_features=with_features
        )
    else:
        reference = read_reference(against, extractor)
    settings = MetricSettings(
        kid_subset_size=options.kid_subset_size, neighbours=options.neighbours
    )
    require_measurable(options.metrics, settings, options.images, reference)
    images = _drawn(options, model, sampler, Progress())
    measured = measure_images(
        images,
        extractor,
        reference,
        metrics=options.metrics,
        settings=settings,
        nfe=sampler.nfe,
        seeds={"evaluation": options.seed},
    ).as_dict()
    print(json.dumps(measured.pop("fid") | measured | _unusual(options)))


@dataclass(frozen=True, kw_only=True)
class Judge:
    """FIDs of several models under the same conditions.

    Attributes:
        folder: Where each is kept when it is measured.
        dataset: What the images are compared with.
        conditions: Those beyond what every FID has.
    """

    folder: Path
    dataset: Dataset
    extractor: Extractor
    reference: Reference
    images: int
    seed: int
    conditions: dict[str, Any]

    def fid(self, name: str, model: NetworkDenoiser, sampler: Sampler) -> dict[str, Any]:
        """What ``bdense fid`` says of it, from its file or measured now."""
        path = self.folder / f"{name}.fid.json"
        of = {
            "numerics": NUMERICS,
            "model": denoiser_sha256(model),
            "sampler": sampler.describe(),
            "images": self.images,
            "seed": self.seed,
            "data": self.dataset.sha256,
            "extractor": self.extractor.sha256,
            **self.conditions,
        }
        kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        if kept.get("of") != of:
            kept = {"fid": self._measured(model, sampler), "of": of}
            with atomic_write(path) as scratch:
                scratch.write_text(json.dumps(kept))
        fid: dict[str, Any] = kept["fid"]
        return fid

    def _measured(self, model: NetworkDenoiser, sampler: Sampler) -> dict[str, Any]:
        show = Progress()
        images = draw_images(
            model,
            sampler,
            self.images,
            seed=self.seed,
            on_image=lambda done: show(done, self.images, "images drawn"),
        )
        seeds = {"evaluation": self.seed}
        measured = measure_images(
            images, self.extractor, self.reference, nfe=sampler.nfe, seeds=seeds
        )
        return measured.fid.as_dict() | self.conditions


def make_judge(options: argparse.Namespace, dataset: Dataset, images: int, folder: Path) -> Judge:
    """By the extractor that the options name.

    Raises:
        InputError: There is no such extractor, or too few images.
    """
    device = torch.device(options.device)
    extractor = load_extractor(options.extractor, cache=options.cache, device=device)
    reference = dataset_reference(dataset, extractor, cache=options.cache)
    require_measurable(["fid"], MetricSettings(), images, reference)
    return Judge(
        folder=folder,
        dataset=dataset,
        extractor=extractor,
        reference=reference,
        images=images,
        seed=options.seed,
        conditions=_unusual(options),
    )


def _unusual(options: argparse.Namespace) -> dict[str, Any]:
    """Conditions of a FID beyond those that every one has."""
    conditions: dict[str, Any] = {}
    if _class_index(options) is not None:
        conditions["class"] = options.class_index
    if options.precision != "float32":
        conditions["precision"] = options.precision
    return conditions
