"""``bdense teacher``: train a small teacher."""

import argparse
from dataclasses import asdict
from typing import Any

import torch

from bdense.cards import write_card
from bdense.checkpoints import denoiser_sha256, save_denoiser
from bdense.command import Verbs
from bdense.data import DATA_SETS, Dataset, load_dataset
from bdense.errors import InputError
from bdense.teachers import TeacherConfig, train_teacher
from bdense.verbs.common import (
    Progress,
    add_execution_options,
    add_out,
    chosen_execution,
    computing_verb,
    image_count,
    require_file_name,
    unfinished,
)


def add_teacher(verbs: Verbs) -> None:
    """The verb and its options."""
    parser = computing_verb(
        verbs,
        "teacher",
        "train a small EDM teacher",
        "bdense teacher --data digits --kimg 250 --out teacher.safetensors",
        _teacher,
    )
    parser.add_argument("--data", metavar="NAME", default="digits", help=f"data set: {DATA_SETS}")
    parser.add_argument(
        "--conditional", action="store_true", help="teach it the classes of the data set"
    )
    parser.add_argument("--kimg", type=float, default=250, help="training length, 1000 images")
    parser.add_argument("--batch", metavar="N", type=int, default=256, help="images an iteration")
    parser.add_argument("--lr", type=float, default=2e-3, help="Adam's step size")
    parser.add_argument(
        "--channels", metavar="N", type=int, default=24, help="channels at full resolution"
    )
    parser.add_argument(
        "--mult", metavar="N", type=int, nargs="+", default=[1, 2], help="multiplier of each level"
    )
    parser.add_argument("--blocks", metavar="N", type=int, default=1, help="blocks a level")
    parser.add_argument(
        "--attention",
        metavar="SIDE",
        type=int,
        nargs="+",
        default=[],
        help="levels, by their side in pixels, whose blocks attend; the lowest does once anyway",
    )
    parser.add_argument(
        "--dropout", metavar="P", type=float, default=0.0, help="probability, in training only"
    )
    add_execution_options(parser)
    add_out(parser, "safetensors file to write")


def _teacher(options: argparse.Namespace) -> None:
    execution = chosen_execution(options)
    require_file_name(options.out)
    dataset = load_dataset(options.data)
    config = TeacherConfig(
        images=image_count(options.kimg),
        batch=options.batch,
        lr=options.lr,
        seed=options.seed,
        network=_teacher_network(options, dataset),
    )
    show, scratch = Progress(), unfinished(options.out)
    teacher = train_teacher(
        dataset,
        config,
        device=torch.device(options.device),
        execution=execution,
        checkpoint=scratch,
        on_iteration=lambda done, total, loss: show(done, total, f"loss {loss:.3f}"),
    )
    metadata = {
        "kind": "teacher",
        "data": dataset.name,
        "training": asdict(config) | {"precision": execution.precision},
    }
    save_denoiser(options.out, teacher, metadata)
    write_card(options.out, teacher, metadata)
    scratch.unlink(missing_ok=True)
    print(f"{options.out} sha256 {denoiser_sha256(teacher)[:16]}")


def _teacher_network(options: argparse.Namespace, dataset: Dataset) -> dict[str, Any]:
    """Options of the network that fit the data set."""
    side = dataset.images.shape[-1]
    sides = [side >> level for level in range(len(options.mult))]
    if unknown := sorted(set(options.attention) - set(sides)):
        raise InputError(
            f"--attention {' '.join(map(str, unknown))}: with {len(sides)} numbers in --mult the "
            f"levels of {dataset.name} have sides of {', '.join(map(str, sides))}; choose of these"
        )
    network = {
        "model_channels": options.channels,
        "channel_mult": tuple(options.mult),
        "num_blocks": options.blocks,
        "attn_resolutions": tuple(options.attention),
        "dropout": options.dropout,
    }
    if options.conditional:
        if not dataset.num_classes:
            raise InputError(
                f"--conditional: data set {dataset.name} has no labels; choose one that has, or "
                "drop --conditional"
            )
        network["label_dim"] = dataset.num_classes
    return network
