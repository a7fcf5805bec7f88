"""``bdense``: train a small teacher, distil a student, draw from it, measure it."""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bdense.branches import export_branch
from bdense.cards import inherited, write_card
from bdense.checkpoints import denoiser_sha256, save_denoiser
from bdense.command import Run, Verbs, add_verb, new_parser, run_verb
from bdense.convert import convert
from bdense.data import DATA_SETS, Dataset, load_dataset
from bdense.errors import InputError
from bdense.extractors import load_extractor
from bdense.grid_options import (
    add_grid_options,
    add_solver_options,
    chosen_sampler,
    chosen_solver,
    student_sampler,
)
from bdense.intervals import IntervalGrid
from bdense.metrics import METRICS, MetricSettings, measure_images, require_measurable
from bdense.public import CHECKPOINTS, REFERENCES, resolve_reference
from bdense.references import dataset_reference, read_reference, write_reference
from bdense.sampling import draw_images, save_grid
from bdense.sfd import IterationReport, SFDConfig, distill
from bdense.sources import load_model
from bdense.teachers import TeacherConfig, train_teacher
from bdense.trajectories import LiveTrajectories
from bdense.weights import LogLinearWeights

SHOW_SECONDS = 2.0
TEACHER_SOLVER = "dpmpp"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; 0 done, 1 failed, 2 a mistake of the user's, 130 interrupted."""
    options = _parser().parse_args(arguments)

    def call() -> None:
        _use_device(options)
        options.run(options)

    return run_verb(
        "bdense",
        call,
        on_interrupt="interrupted; the same command carries on from the last checkpoint",
    )


def _use_device(options: argparse.Namespace) -> None:
    threads = getattr(options, "threads", torch.get_num_threads())
    if threads < 1:
        raise InputError(f"--threads must be at least 1, got {threads}")
    torch.set_num_threads(threads)
    available = torch.cuda.is_available()
    if options.device == "cuda" and not available:
        raise InputError("--device cuda: torch sees no GPU here; use --device cpu")
    if options.device == "auto":
        options.device = "cuda" if available else "cpu"


def _parser() -> argparse.ArgumentParser:
    parser, verbs = new_parser(
        "bdense",
        "Few-step students of diffusion teachers, plain or with B-DENSE.",
        "bdense teacher --data digits --kimg 250 --out teacher.safetensors",
    )
    for add in (_add_teacher, _add_distill, _add_sample, _add_fid, _add_reference, _add_convert):
        add(verbs)
    return parser


def _verb(
    verbs: Verbs, name: str, what: str, example: str, run: Run, *, draws: bool = True
) -> argparse.ArgumentParser:
    parser = add_verb(verbs, name, what, example, run, argparse.ArgumentDefaultsHelpFormatter)
    if draws:
        parser.add_argument(
            "--seed", metavar="N", type=int, default=0, help="of every random draw"
        )
    parser.add_argument(
        "--threads",
        metavar="N",
        type=int,
        default=argparse.SUPPRESS,
        help="CPU threads (default: one for each core)",
    )
    parser.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda"),
        help="where to compute; auto is a GPU where there is one",
    )
    return parser


def _add_teacher(verbs: Verbs) -> None:
    parser = _verb(
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
    _add_out(parser, "safetensors file to write")


def _add_distill(verbs: Verbs) -> None:
    parser = _verb(
        verbs,
        "distill",
        "distil a few-step student with SFD, plain or B-DENSE",
        "bdense distill teacher.safetensors --nfe 2 --a 1.386 --out student.safetensors",
        _distill,
    )
    _add_model(parser, "teacher")
    parser.add_argument(
        "--method", choices=("sfd", "sfd-bdense"), default="sfd-bdense", help="plain or branched"
    )
    parser.add_argument("--a", type=float, default=0.0, help="log w_k = a k + b")
    parser.add_argument("--b", type=float, default=0.0, help="log w_k = a k + b")
    add_grid_options(parser)
    parser.add_argument("--substeps", metavar="K", type=int, default=4, help="teacher sub-steps")
    add_solver_options(parser, default=TEACHER_SOLVER, what="what the teacher walks with")
    parser.add_argument("--kimg", type=float, default=200, help="training length, 1000 images")
    parser.add_argument("--batch", metavar="N", type=int, default=128, help="images an iteration")
    parser.add_argument("--lr", type=float, default=5e-5, help="Adam's step size; later a tenth")
    _add_out(parser, "safetensors file to write")


def _add_model(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument(
        name,
        metavar=name.upper(),
        help="safetensors, pickle of EDM or SFD, folder or hub id in diffusers' format, or a "
        "public name, which is downloaded (`bdense convert --help` lists them)",
    )


def _add_out(parser: argparse.ArgumentParser, what: str) -> None:
    # No default to show: the option is required.
    parser.add_argument(
        "--out", metavar="FILE", type=Path, required=True, default=argparse.SUPPRESS, help=what
    )


def _add_sample(verbs: Verbs) -> None:
    parser = _verb(
        verbs,
        "sample",
        "draw images from a student (or a teacher, with --nfe and so on) as one PNG",
        "bdense sample student.safetensors --images 64 --out samples.png",
        _sample,
    )
    _add_model(parser, "model")
    parser.add_argument("--images", metavar="N", type=int, default=64, help="how many")
    parser.add_argument("--columns", metavar="N", type=int, default=16, help="of the grid")
    parser.add_argument("--batch", metavar="N", type=int, default=128, help="images at a time")
    _add_out(parser, "PNG file to write")
    add_grid_options(parser)
    add_solver_options(parser, default="euler", what="what a teacher draws with")


def _add_fid(verbs: Verbs) -> None:
    parser = _verb(
        verbs,
        "fid",
        "measure a model's FID, and more, and print it with its conditions as JSON",
        "bdense fid student.safetensors --data digits --extractor digits-classifier --images 4096",
        _fid,
    )
    _add_model(parser, "model")
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
        help="EDM's .npz of reference statistics (mu, sigma) instead, for fid alone; a file, or "
        f"one of EDM's by name: {', '.join(REFERENCES)}",
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=METRICS,
        default=["fid"],
        help="fid always; kid: kernel distance; prc: precision and recall",
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
        "--neighbours", metavar="K", type=int, default=settings.neighbours, help="of prc"
    )
    parser.add_argument("--images", metavar="N", type=int, default=50_000, help="how many to draw")
    parser.add_argument("--batch", metavar="N", type=int, default=128, help="images at a time")
    _add_extractor(parser)
    add_grid_options(parser)
    add_solver_options(parser, default="euler", what="what a teacher draws with")


def _add_reference(verbs: Verbs) -> None:
    parser = _verb(
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
    _add_extractor(parser)
    _add_out(parser, "npz file to write")


def _add_convert(verbs: Verbs) -> None:
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
        help="pickle of EDM or SFD, folder or hub id (OWNER/NAME) of a UNet2DModel in diffusers' "
        f"format, or a public name, which is downloaded: {', '.join(CHECKPOINTS)}",
    )
    _add_out(parser, "safetensors file to write; .json and .md are written beside it")


def _add_extractor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--extractor",
        default="inception",
        help="inception[:FILE], dinov2[:FILE], torchscript:FILE (uint8 [B,3,H,W] to [B,d]), "
        "digits-classifier or fashion-mnist-classifier",
    )
    parser.add_argument(
        "--cache",
        metavar="DIR",
        type=Path,
        default=Path("runs/cache"),
        help="of what is seen of reference sets",
    )


def _teacher(options: argparse.Namespace) -> None:
    _require_file_name(options.out)
    dataset = load_dataset(options.data)
    config = TeacherConfig(
        images=_image_count(options.kimg),
        batch=options.batch,
        lr=options.lr,
        seed=options.seed,
        network=_teacher_network(options, dataset),
    )
    show = _Progress()
    unfinished = options.out.with_suffix(".training.safetensors")
    teacher = train_teacher(
        dataset,
        config,
        device=torch.device(options.device),
        checkpoint=unfinished,
        on_iteration=lambda done, total, loss: show(done, total, f"loss {loss:.3f}"),
    )
    metadata = {"kind": "teacher", "data": dataset.name, "training": asdict(config)}
    save_denoiser(options.out, teacher, metadata)
    unfinished.unlink(missing_ok=True)
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


def _distill(options: argparse.Namespace) -> None:
    _require_file_name(options.out)
    teacher, known = load_model(options.teacher)
    teacher.to(options.device)
    sampler = student_sampler(options)
    grid = IntervalGrid(
        num_intervals=sampler.num_intervals,
        substeps=options.substeps,
        afs=sampler.afs,
        schedule=sampler.schedule,
    )
    num_branches = 1 if options.method == "sfd" else options.substeps
    weights = LogLinearWeights(a=options.a, b=options.b)(num_branches)
    if options.method == "sfd" and (options.a or options.b):
        raise InputError(
            f"--method sfd has one output and no branch weights, got --a {options.a} "
            f"--b {options.b}; drop them or use --method sfd-bdense"
        )
    config = SFDConfig(
        num_branches=num_branches,
        images=_image_count(options.kimg),
        lr=options.lr,
        seed=options.seed,
    )
    trajectories = LiveTrajectories(
        teacher=teacher,
        grid=grid,
        solver=chosen_solver(options, TEACHER_SOLVER),
        batch=options.batch,
        count=config.iterations(options.batch),
        seed=options.seed,
    )
    show = _Progress()

    def on_iteration(done: IterationReport) -> None:
        show(done.iteration + 1, done.iterations, f"loss {done.loss:.4g}")

    unfinished = options.out.with_suffix(".training.safetensors")
    branched = distill(
        teacher, trajectories, config, weights, checkpoint=unfinished, on_iteration=on_iteration
    )
    metadata = {
        "kind": "student",
        "method": options.method,
        "weights": weights.tolist(),
        "training": asdict(config),
        "teacher_sha256": denoiser_sha256(teacher),
        **inherited(known, Path(options.teacher).name),
        "sampler": sampler.describe(),
    }
    student = export_branch(branched)
    save_denoiser(options.out, student, metadata)
    write_card(options.out, student, metadata)
    unfinished.unlink(missing_ok=True)
    print(f"{options.out} NFE {sampler.nfe}")


def _sample(options: argparse.Namespace) -> None:
    _require_file_name(options.out)
    model, metadata = load_model(options.model)
    images = draw_images(
        model.to(options.device),
        chosen_sampler(options, metadata.get("sampler")),
        options.images,
        seed=options.seed,
        batch=options.batch,
    )
    save_grid(images, options.out, options.columns)
    print(options.out)


def _fid(options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    model, metadata = load_model(options.model)
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
    sampler, show = chosen_sampler(options, metadata.get("sampler")), _Progress()
    images = draw_images(
        model.to(device),
        sampler,
        options.images,
        seed=options.seed,
        batch=options.batch,
        on_image=lambda done: show(done, options.images, "images drawn"),
    )
    measured = measure_images(
        images,
        extractor,
        reference,
        metrics=options.metrics,
        settings=settings,
        nfe=sampler.nfe,
        seeds={"evaluation": options.seed},
    ).as_dict()
    print(json.dumps(measured.pop("fid") | measured))


def _reference(options: argparse.Namespace) -> None:
    _require_file_name(options.out)
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
    _require_file_name(options.out)
    for line in convert(options.source, options.out).lines():
        print(line)


def _image_count(kimg: float) -> int:
    if not 0.001 <= kimg < float("inf"):
        raise InputError(f"--kimg must be a finite number, at least 0.001, got {kimg}")
    return round(kimg * 1000)


def _require_file_name(path: Path) -> None:
    """Refuse before hours of work what could not be written after them."""
    if path.is_dir():
        raise InputError(f"--out {path} is a folder; give the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"--out {path}: the folder cannot be written; choose another")


class _Progress:
    """A line on stderr every two seconds."""

    def __init__(self) -> None:
        self._started = self._shown = time.monotonic()

    def __call__(self, done: int, total: int, remark: str) -> None:
        now = time.monotonic()
        if now - self._shown < SHOW_SECONDS and done < total:
            return
        self._shown = now
        left = (now - self._started) / done * (total - done)
        sys.stderr.write(f"{done}/{total}, {remark}, about {left:.0f} s left\n")


if __name__ == "__main__":
    sys.exit(main())
