"""``bdense teacher``: train a small teacher."""

import argparse
from typing import Any

import torch

from bdense.command import Verbs
from bdense.data.datasets import DATA_SETS, Dataset, load_dataset
from bdense.diffusion.preconditioning import PREDICTIONS
from bdense.diffusion.snr_weights import LOSSES
from bdense.errors import InputError
from bdense.models.cards import write_card
from bdense.models.store import denoiser_sha256, save_denoiser
from bdense.training.teacher import TeacherConfig, train_teacher
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
        "train a small teacher",
        "bdense teacher --data digits --kimg 250 --out teacher.safetensors",
        _teacher,
    )
    parser.add_argument("--data", metavar="NAME", default="digits", help=f"data set: {DATA_SETS}")
    parser.add_argument(
        "--conditional", action="store_true", help="teach it the classes of the data set"
    )
    parser.add_argument(
        "--kimg", type=float, default=250, help="training length in thousands of images"
    )
    parser.add_argument(
        "--batch", metavar="N", type=int, default=256, help="images in each iteration"
    )
    parser.add_argument("--lr", type=float, default=2e-3, help="Adam's step size")
    parser.add_argument(
        "--channels", metavar="N", type=int, default=24, help="channels at full resolution"
    )
    parser.add_argument(
        "--mult",
        metavar="N",
        type=int,
        nargs="+",
        default=[1, 2],
        help="channels of each level, from full resolution down, in multiples of --channels",
    )
    parser.add_argument(
        "--blocks", metavar="N", type=int, default=1, help="residual blocks in each level"
    )
    parser.add_argument(
        "--attention",
        metavar="SIDE",
        type=int,
        nargs="+",
        default=[],
        help="sides in pixels of the levels whose blocks have self-attention; the lowest level "
        "has it anyway",
    )
    parser.add_argument(
        "--dropout",
        metavar="P",
        type=float,
        default=0.0,
        help="dropout probability, in training only",
    )
    parser.add_argument(
        "--precond",
        choices=("edm", "cosine", "ddpm"),
        default="edm",
        help="noise that it is trained on: EDM's levels, or a variance-preserving process, which "
        "progressive distillation needs: the cosine, or DDPM's of T discrete times",
    )
    parser.add_argument(
        "--prediction",
        choices=PREDICTIONS,
        default=argparse.SUPPRESS,
        help="what the network predicts, with --precond cosine or ddpm: noise, image or v "
        "(default: v_prediction with cosine, epsilon with ddpm)",
    )
    parser.add_argument(
        "--timesteps",
        metavar="T",
        type=int,
        default=argparse.SUPPRESS,
        help="number of ddpm's times, above 20; its betas, 0.0001 to 0.02, are scaled by "
        "1000 / T, so that any T ends in noise (default: 1000)",
    )
    parser.add_argument(
        "--loss",
        choices=LOSSES,
        default=argparse.SUPPRESS,
        help="weight of each noise level, with --precond cosine or ddpm: the image's squared "
        "error counts times 1, SNR, max(SNR, 1) or SNR + 1 (default: snr for epsilon, snr_trunc "
        "for sample, v for v_prediction)",
    )
    parser.add_argument(
        "--flip", action="store_true", help="mirror each image with probability 1/2"
    )
    parser.add_argument(
        "--clip",
        metavar="NORM",
        type=float,
        default=argparse.SUPPRESS,
        help="largest norm of the gradient, which is scaled down to it (default: no limit)",
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
        precond=_process(options),
        loss=getattr(options, "loss", None),
        flip=options.flip,
        clip=getattr(options, "clip", None),
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
        "training": config.as_dict() | {"precision": execution.precision},
    }
    save_denoiser(options.out, teacher, metadata)
    write_card(options.out, teacher, metadata)
    scratch.unlink(missing_ok=True)
    print(f"{options.out} sha256 {denoiser_sha256(teacher)[:16]}")


def _process(options: argparse.Namespace) -> dict[str, Any] | None:
    """The preconditioning of a process; None is EDM's.

    Raises:
        InputError: An option is for another one.
    """
    name, given = options.precond, vars(options)
    needed = {"prediction": ("cosine", "ddpm"), "loss": ("cosine", "ddpm"), "timesteps": ("ddpm",)}
    for option, names in needed.items():
        if option in given and name not in names:
            raise InputError(
                f"--{option} {given[option]} does nothing with --precond {name}; drop it, or add "
                f"--precond {' or '.join(names)}"
            )
    if name == "edm":
        return None
    process = {"name": name}
    if "prediction" in given:
        process["prediction_type"] = options.prediction
    if name == "ddpm":
        process |= _scaled_betas(given.get("timesteps", 1000))
    return process


def _scaled_betas(timesteps: int) -> dict[str, Any]:
    """DDPM's process, whose T = 1000 betas are 1e-4..0.02, in T steps."""
    if timesteps <= 20:
        raise InputError(
            f"--timesteps must be above 20, got {timesteps}: the last beta is 20 / T and "
            "must be below 1"
        )
    return {
        "num_train_timesteps": timesteps,
        "beta_start": 0.1 / timesteps,
        "beta_end": 20 / timesteps,
    }


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
