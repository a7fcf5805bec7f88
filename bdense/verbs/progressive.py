"""``bdense progressive``: students of ever fewer steps, each distilled from the one before."""

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from bdense.command import Verbs
from bdense.data.datasets import DATA_SETS, Dataset, load_dataset
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.preconditioning import PREDICTIONS
from bdense.diffusion.sampling import samplers_from
from bdense.diffusion.schedules import Levels
from bdense.diffusion.snr_weights import LOSSES
from bdense.diffusion.solvers import DDIM
from bdense.errors import InputError
from bdense.methods.chain import Chain, distill_chain, pd_sampler
from bdense.methods.progressive import (
    DataBatches,
    Optimizer,
    PDConfig,
    UpdateReport,
    WeightsSpace,
)
from bdense.models.cards import inherited
from bdense.models.sources import load_model
from bdense.models.store import denoiser_sha256
from bdense.verbs.common import (
    Progress,
    add_execution_options,
    add_model,
    chosen_execution,
    computing_verb,
)
from bdense.verbs.drawing import Judge, add_extractor_options, make_judge
from bdense.verbs.grid_options import LEVELS, NATIVE, add_level_options, chosen_schedule
from bdense.weights.spaces import LogLinearWeights, sum_to_one

# Of the reference, each round.
UPDATES = 50_000
IMAGES = 50_000


def add_progressive(verbs: Verbs) -> None:
    """The verb and its options."""
    parser = computing_verb(
        verbs,
        "progressive",
        "distil students of ever fewer steps, plain or B-DENSE, by progressive distillation",
        "bdense progressive teacher.safetensors --data digits --steps 64 --until 4 --out chain",
        _progressive,
    )
    add_model(parser, "teacher")
    parser.add_argument(
        "--data",
        metavar="NAME",
        default="digits",
        help=f"data set to learn from, and the FID's reference: {DATA_SETS}",
    )
    # No default to show: both are required.
    for flag, what in (("--steps", "of the teacher"), ("--until", "of the last student")):
        parser.add_argument(
            flag,
            metavar="N",
            type=int,
            required=True,
            default=argparse.SUPPRESS,
            help=f"steps {what}",
        )
    parser.add_argument(
        "--substeps",
        metavar="K",
        type=int,
        default=2,
        help="teacher's steps in each of the student's: every round divides their number by K",
    )
    _add_weights_options(parser)
    _add_round_options(parser)
    parser.add_argument(
        "--prediction",
        choices=PREDICTIONS,
        default=argparse.SUPPRESS,
        help="what the students' networks predict: noise, image or v; a teacher that predicts "
        "another is converted first, by a round that keeps its number of steps (default: what "
        "the teacher's predicts)",
    )
    add_level_options(parser, default=f"{NATIVE}, or a student's own")
    parser.add_argument(
        "--clip-samples",
        action="store_true",
        help="clamp predictions to [-1, 1] when students draw",
    )
    add_extractor_options(
        parser,
        default=argparse.SUPPRESS,
        what="measure the FID of the teacher and of each student with ",
    )
    parser.add_argument(
        "--images",
        metavar="N",
        type=int,
        default=argparse.SUPPRESS,
        help=f"images to draw for each FID (default: {IMAGES})",
    )
    add_execution_options(parser)
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        type=Path,
        required=True,
        default=argparse.SUPPRESS,
        help="folder to write, with one safetensors file for each student",
    )


def _add_weights_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--method",
        choices=("pd", "pd-bdense"),
        default="pd-bdense",
        help="plain PD, or with branches",
    )
    rescaled = "rescaled to sum 1, as clipped gradients see their scale"
    for flag, what in (
        ("--a", f"slope of the branch weights, log w_k = a k + b, which are {rescaled}"),
        ("--b", "offset of the branch weights, which does nothing, as they are rescaled to sum 1"),
    ):
        parser.add_argument(
            flag,
            type=float,
            default=argparse.SUPPRESS,
            help=f"{what} (default: 0)",
        )
    parser.add_argument(
        "--weights-space",
        choices=get_args(WeightsSpace),
        default="clean",
        help="clean: take w_k as they are; state: multiply them by 1 - t_k / t_0 of each step, as "
        "SFD's loss does by itself, and keep their sum",
    )


def _add_round_options(parser: argparse.ArgumentParser) -> None:
    usual = PDConfig(updates=UPDATES)
    parser.add_argument(
        "--updates", metavar="N", type=int, default=usual.updates, help="updates in each round"
    )
    parser.add_argument(
        "--batch", metavar="N", type=int, default=usual.batch, help="images in each update"
    )
    parser.add_argument(
        "--lr",
        type=float,
        default=usual.lr,
        help="step size at the start of each round, falling to 0 along it",
    )
    parser.add_argument("--constant-lr", action="store_true", help="keep the step size as it is")
    parser.add_argument(
        "--optimizer",
        choices=get_args(Optimizer),
        default=usual.optimizer,
        help="optimiser; adamw has a weight decay, sgd no momentum",
    )
    parser.add_argument(
        "--weight-decay",
        type=float,
        default=usual.weight_decay,
        help="decoupled weight decay, with adamw",
    )
    parser.add_argument(
        "--clip-norm",
        metavar="NORM",
        type=float,
        default=usual.clip_norm,
        help="largest norm of the gradient, which is scaled down to it; inf: no limit",
    )
    parser.add_argument(
        "--loss",
        choices=LOSSES,
        default=usual.loss,
        help="weight of each noise level: the image's squared error counts times 1, SNR, "
        "max(SNR, 1) or SNR + 1",
    )
    parser.add_argument(
        "--clip-targets",
        action="store_true",
        help="clamp the teacher's predictions to [-1, 1] in training",
    )
    parser.add_argument(
        "--dropout", action="store_true", help="train with the teacher's own dropout"
    )
    parser.add_argument(
        "--flip", action="store_true", help="mirror each image with probability 1/2"
    )


def _progressive(options: argparse.Namespace) -> None:
    device, execution = torch.device(options.device), chosen_execution(options)
    chain = Chain(first=options.steps, last=options.until, substeps=options.substeps)
    weights = _weights(options)
    config = _config(options, len(weights))
    dataset = load_dataset(options.data)
    teacher, known = load_model(options.teacher)
    schedule = _schedule(options, teacher, known)
    _require_images(options, dataset, teacher)
    teacher.to(device).execute(execution)
    batches = DataBatches(
        dataset,
        config.batch,
        config.seed,
        device,
        flip=config.flip,
        label_dim=teacher.label_dim,
    )
    rounds = distill_chain(
        teacher,
        batches,
        schedule,
        chain,
        config,
        weights,
        options.out,
        prediction_type=vars(options).get("prediction"),
        clip_samples=options.clip_samples,
        metadata={
            "teacher_sha256": denoiser_sha256(teacher),
            "data": dataset.name,
            "precision": execution.precision,
            **inherited(known, Path(options.teacher).name),
        },
        on_update=_Rounds(),
    )
    judge = _judge(options, dataset)
    _require_folder(options.out)

    def tell(name: str, where: object, model: NetworkDenoiser, steps: int) -> None:
        print(f"{steps} steps: {where}", flush=True)
        if judge is not None:
            sampler = pd_sampler(schedule, steps, clip=options.clip_samples)
            print(json.dumps(judge.fid(name, model, sampler)), flush=True)

    if judge is not None:
        tell("teacher", options.teacher, teacher, chain.first)
    for done in rounds:
        tell(done.path.stem, done.path, done.student, done.steps)
    print(done.path)


def _weights(options: argparse.Namespace) -> Tensor:
    """[num_branches] for the method, of sum 1."""
    given = {name: value for name, value in vars(options).items() if name in ("a", "b")}
    if options.method == "pd-bdense":
        a, b = given.get("a", 0.0), given.get("b", 0.0)
        return sum_to_one(LogLinearWeights(a=a, b=b)(options.substeps))
    if options.weights_space != "clean":
        given["weights-space"] = options.weights_space
    if any(given.values()):
        spelt = " ".join(f"--{name} {value}" for name, value in given.items())
        raise InputError(
            f"--method pd has one output and no branch weights, got {spelt}; drop that or use "
            "--method pd-bdense"
        )
    return torch.ones(1, dtype=torch.float64)


def _config(options: argparse.Namespace, num_branches: int) -> PDConfig:
    return PDConfig(
        updates=options.updates,
        substeps=options.substeps,
        num_branches=num_branches,
        batch=options.batch,
        lr=options.lr,
        anneal=not options.constant_lr,
        optimizer=options.optimizer,
        weight_decay=options.weight_decay,
        clip_norm=None if options.clip_norm == float("inf") else options.clip_norm,
        loss=options.loss,
        clip_targets=options.clip_targets,
        weights_space=options.weights_space,
        dropout=options.dropout,
        flip=options.flip,
        seed=options.seed,
    )


def _schedule(
    options: argparse.Namespace, teacher: NetworkDenoiser, known: Mapping[str, Any]
) -> Levels:
    """A student's own noise levels, which it alone knows; else those asked for.

    Raises:
        InputError: A student was not made by progressive distillation, or for other steps.
    """
    served = samplers_from(known)
    if not served:
        return chosen_schedule(options, teacher.precond, NATIVE)
    own = served[0]
    if not isinstance(own.solver, DDIM):
        raise InputError(
            f"{options.teacher} is a student of SFD, whose steps are distilled further with "
            "bdense distill --second-stage; give that, or its teacher here"
        )
    if own.num_intervals != options.steps:
        raise InputError(
            f"{options.teacher} is a student of {own.num_intervals} steps, which knows their "
            f"levels alone, and --steps {options.steps} asks for others; give --steps "
            f"{own.num_intervals}, or its teacher"
        )
    asked = any(name in vars(options) for name in LEVELS)
    if asked and chosen_schedule(options, teacher.precond, NATIVE) != own.schedule:
        raise InputError(
            f"{options.teacher} is a student that knows {own.schedule.text()} alone, and "
            "--schedule asks for others; drop it and what belongs to it"
        )
    return own.schedule


def _require_images(
    options: argparse.Namespace, dataset: Dataset, teacher: NetworkDenoiser
) -> None:
    """Refuse a data set of other images than the teacher's."""
    theirs, own = (
        " x ".join(map(str, shape)) for shape in (dataset.images.shape[1:], teacher.image_shape)
    )
    if theirs != own:
        raise InputError(
            f"--data {options.data} has images of {theirs}, and {options.teacher} is a network "
            f"for {own}; give the data set that it was trained on, padded alike"
        )


def _require_folder(path: Path) -> None:
    """Make the folder, or refuse before hours of work what could not be written after them."""
    if path.exists() and not path.is_dir():
        raise InputError(f"--out {path} is a file; give the name of a folder")
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise InputError(f"--out {path}: the folder cannot be written; choose another")


class _Rounds:
    """Progress of one round after the other."""

    def __init__(self) -> None:
        self._steps, self._show = 0, Progress()

    def __call__(self, steps: int, done: UpdateReport) -> None:
        """Say how far the round to that many steps is."""
        if steps != self._steps:
            self._steps, self._show = steps, Progress()
        self._show(done.iteration + 1, done.iterations, f"{steps} steps, loss {done.loss:.4g}")


def _judge(options: argparse.Namespace, dataset: Dataset) -> Judge | None:
    """What --extractor asks for; None without it."""
    given = vars(options)
    if "extractor" in given:
        return make_judge(options, dataset, given.get("images", IMAGES), options.out)
    if "images" in given:
        raise InputError(
            f"--images {options.images} is of the FID, which is not measured without "
            "--extractor; add that or drop it"
        )
    return None
