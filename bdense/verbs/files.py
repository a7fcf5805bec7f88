"""``bdense reference`` and ``bdense convert``: files that others make or read."""

import argparse

import torch

from bdense.command import Verbs, add_verb
from bdense.data.datasets import DATA_SETS, load_dataset
from bdense.metrics.extractors import load_extractor
from bdense.metrics.references import dataset_reference, write_reference
from bdense.models.convert import convert
from bdense.models.public import CHECKPOINTS
from bdense.verbs.common import add_out, computing_verb, require_file_name
from bdense.verbs.drawing import add_extractor_options


def add_reference(verbs: Verbs) -> None:
    """``reference`` and its options."""
    parser = computing_verb(
        verbs,
        "reference",
        "write a data set's statistics as EDM's .npz (mu, sigma)",
        "bdense reference --data digits --extractor digits-classifier --out digits.npz",
        _reference,
        draws=False,
    )
    parser.add_argument(
        "--data", metavar="NAME", default="digits", help=f"reference data set: {DATA_SETS}"
    )
    add_extractor_options(parser)
    add_out(parser, "npz file to write")


def add_convert(verbs: Verbs) -> None:
    """``convert`` and its options."""
    parser = add_verb(
        verbs,
        "convert",
        "write a foreign checkpoint as safetensors, with readable JSON and a model card beside it",
        "bdense convert edm-cifar10-32x32-uncond-vp --out teacher.safetensors",
        _convert,
    )
    # Nothing is computed with it.
    parser.set_defaults(device="cpu")
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a pickle of EDM or SFD, a folder or hub id (OWNER/NAME) of a UNet2DModel in "
        "diffusers' format, or the name of a public checkpoint, which is downloaded: "
        f"{', '.join(CHECKPOINTS)}",
    )
    add_out(parser, "safetensors file to write; .json and .md are written beside it")


def _reference(options: argparse.Namespace) -> None:
    require_file_name(options.out)
    dataset = load_dataset(options.data)
    extractor = load_extractor(
        options.extractor, cache=options.cache, device=torch.device(options.device)
    )
    statistics = dataset_reference(dataset, extractor, cache=options.cache).statistics
    write_reference(options.out, statistics, dataset.name, extractor)
    print(
        f"{options.out} {statistics.count} images of {dataset.name}, {extractor.dim} features of "
        f"{extractor.name} {extractor.sha256[:16]}"
    )


def _convert(options: argparse.Namespace) -> None:
    require_file_name(options.out)
    for line in convert(options.source, options.out).lines():
        print(line)
