"""``bdense progressive``: students of ever fewer steps, each distilled from the one before."""

import argparse
import json
import os
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from bdense.command import Verbs
from bdense.data.datasets import DATA_SETS, Dataset, load_dataset
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.preconditioning import PREDICTIONS
from bdense.diffusion.sampling import Sampler
from bdense.diffusion.snr_weights import LOSSES
from bdense.errors import InputError
from bdense.knobs import knobs_of
from bdense.methods.distill import distill
from bdense.methods.method import Inputs, StagePlan
from bdense.methods.progressive import PDConfig, Progressive, WeightsSpace
from bdense.models.cards import inherited
from bdense.models.sources import load_model
from bdense.training.loop import IterationReport
from bdense.training.optimisation import OPTIMIZERS
from bdense.verbs.common import (
    Progress,
    add_execution_options,
    add_model,
    chosen_execution,
    computing_verb,
)
from bdense.verbs.drawing import Judge, add_extractor_options, make_judge
from bdense.verbs.grid_options import NATIVE, add_level_options
from bdense.weights.spaces import LogLinearWeights
from bdense.weights.weighting import FixedWeights

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
    usual = PDConfig(steps=2, until=1)
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
        choices=OPTIMIZERS,
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
    teacher, known = load_model(options.teacher)
    method = Progressive()
    config = PDConfig.read(method.usual(known) | _given(options))
    weights = _weights(options)
    dataset = load_dataset(options.data)
    teacher.to(device).execute(execution)
    rounds = distill(
        method,
        teacher,
        config,
        lambda: FixedWeights(weights),
        Inputs(dataset=dataset, seed=options.seed, known=known),
        folder=options.out,
        metadata={"data": dataset.name, **inherited(known, Path(options.teacher).name)},
        on_iteration=_Rounds(),
    )
    judge = _judge(options, dataset)
    _require_folder(options.out)

    def tell(name: str, where: object, model: NetworkDenoiser, sampler: Sampler) -> None:
        print(f"{sampler.nfe} steps: {where}", flush=True)
        if judge is not None:
            print(json.dumps(judge.fid(name, model, sampler)), flush=True)

    if judge is not None:
        first = method.teacher_sampler(config, teacher)
        assert first is not None
        tell("teacher", options.teacher, teacher, first)
    for done in rounds:
        assert done.path is not None
        tell(done.path.stem, done.path, done.student, done.sampler)
    print(done.path)


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """The knobs that the command line gives."""
    given = {name: value for name, value in vars(options).items() if name in knobs_of(PDConfig)}
    if options.clip_norm == float("inf"):
        given["clip_norm"] = None
    if options.constant_lr:
        given["lr_schedule"] = "constant"
    if "prediction" in vars(options):
        given["prediction_type"] = options.prediction
    return given


def _weights(options: argparse.Namespace) -> Tensor:
    """[num_branches] for the method."""
    given = {name: value for name, value in vars(options).items() if name in ("a", "b")}
    if options.method == "pd-bdense":
        a, b = given.get("a", 0.0), given.get("b", 0.0)
        return LogLinearWeights(a=a, b=b)(options.substeps)
    if options.weights_space != "clean":
        given["weights-space"] = options.weights_space
    if any(given.values()):
        spelt = " ".join(f"--{name} {value}" for name, value in given.items())
        raise InputError(
            f"--method pd has one output and no branch weights, got {spelt}; drop that or use "
            "--method pd-bdense"
        )
    return torch.ones(1, dtype=torch.float64)


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

    def __call__(self, plan: StagePlan, done: IterationReport) -> None:
        """Say how far the round is."""
        steps = plan.nfe
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
