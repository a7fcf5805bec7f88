"""``bdense``: train a small teacher, distil a student, draw from it, measure it."""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from bdense.branches import export_branch
from bdense.checkpoints import denoiser_sha256, load_denoiser, save_denoiser
from bdense.command import Run, Verbs, add_verb, new_parser, run_verb
from bdense.data import load_dataset
from bdense.errors import InputError
from bdense.extractors import load_extractor
from bdense.fid import FID, feature_statistics, frechet_distance, reference_statistics
from bdense.grid_options import add_grid_options, chosen_sampler
from bdense.sampling import draw_images, save_grid
from bdense.sfd import IterationReport, SFDConfig, distill
from bdense.solvers import SOLVERS, make_solver
from bdense.teachers import TeacherConfig, train_teacher
from bdense.trajectories import IntervalGrid, LiveTrajectories
from bdense.weights import LogLinearWeights

SHOW_SECONDS = 2.0


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
    for add in (_add_teacher, _add_distill, _add_sample, _add_fid):
        add(verbs)
    return parser


def _verb(verbs: Verbs, name: str, what: str, example: str, run: Run) -> argparse.ArgumentParser:
    parser = add_verb(verbs, name, what, example, run, argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of every random draw")
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
    parser.add_argument("--data", metavar="NAME", default="digits", help="data set")
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
    _add_out(parser, "safetensors file to write")


def _add_distill(verbs: Verbs) -> None:
    parser = _verb(
        verbs,
        "distill",
        "distil a few-step student with SFD, plain or B-DENSE",
        "bdense distill teacher.safetensors --nfe 2 --a 1.386 --out student.safetensors",
        _distill,
    )
    parser.add_argument("teacher", metavar="TEACHER", type=Path, help="safetensors or EDM pickle")
    parser.add_argument(
        "--method", choices=("sfd", "sfd-bdense"), default="sfd-bdense", help="plain or branched"
    )
    parser.add_argument("--a", type=float, default=0.0, help="log w_k = a k + b")
    parser.add_argument("--b", type=float, default=0.0, help="log w_k = a k + b")
    add_grid_options(parser)
    parser.add_argument("--substeps", metavar="K", type=int, default=4, help="teacher sub-steps")
    parser.add_argument("--solver", choices=SOLVERS, default="dpmpp", help="the teacher's")
    parser.add_argument("--order", metavar="N", type=int, default=3, help="of dpmpp, 1 to 3")
    parser.add_argument("--kimg", type=float, default=200, help="training length, 1000 images")
    parser.add_argument("--batch", metavar="N", type=int, default=128, help="images an iteration")
    parser.add_argument("--lr", type=float, default=5e-5, help="Adam's step size; later a tenth")
    _add_out(parser, "safetensors file to write")


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
    parser.add_argument("model", metavar="MODEL", type=Path, help="safetensors or EDM pickle")
    parser.add_argument("--images", metavar="N", type=int, default=64, help="how many")
    parser.add_argument("--columns", metavar="N", type=int, default=16, help="of the grid")
    parser.add_argument("--batch", metavar="N", type=int, default=128, help="images at a time")
    _add_out(parser, "PNG file to write")
    add_grid_options(parser)


def _add_fid(verbs: Verbs) -> None:
    parser = _verb(
        verbs,
        "fid",
        "measure a model's FID and print it with its conditions as JSON",
        "bdense fid student.safetensors --data digits --extractor digits-classifier --images 4096",
        _fid,
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="safetensors or EDM pickle")
    parser.add_argument("--data", metavar="NAME", default="digits", help="reference data set")
    parser.add_argument("--images", metavar="N", type=int, default=50_000, help="how many to draw")
    parser.add_argument("--batch", metavar="N", type=int, default=128, help="images at a time")
    parser.add_argument(
        "--extractor",
        default="inception",
        help="inception, torchscript:FILE (uint8 [B,3,H,W] to [B,d]) or digits-classifier",
    )
    parser.add_argument(
        "--cache", metavar="DIR", type=Path, default=Path("runs/cache"), help="of statistics"
    )
    add_grid_options(parser)


def _teacher(options: argparse.Namespace) -> None:
    _require_file_name(options.out)
    dataset = load_dataset(options.data)
    config = TeacherConfig(
        images=_image_count(options.kimg),
        batch=options.batch,
        lr=options.lr,
        seed=options.seed,
        network={
            "model_channels": options.channels,
            "channel_mult": tuple(options.mult),
            "num_blocks": options.blocks,
            "attn_resolutions": (),
            "dropout": 0.0,
        },
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


def _distill(options: argparse.Namespace) -> None:
    _require_file_name(options.out)
    teacher = load_denoiser(options.teacher)[0].to(options.device)
    sampler = chosen_sampler(options)
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
        solver=make_solver(options.solver, order=options.order),
        batch=options.batch,
        count=config.iterations(options.batch),
        seed=options.seed,
    )
    show = _Progress()

    def on_iteration(done: IterationReport) -> None:
        show(done.iteration + 1, done.iterations, f"loss {done.loss(weights):.4g}")

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
        "sampler": sampler.describe(),
    }
    save_denoiser(options.out, export_branch(branched), metadata)
    unfinished.unlink(missing_ok=True)
    print(f"{options.out} NFE {sampler.nfe}")


def _sample(options: argparse.Namespace) -> None:
    _require_file_name(options.out)
    model, metadata = load_denoiser(options.model)
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
    model, metadata = load_denoiser(options.model)
    dataset = load_dataset(options.data)
    extractor = load_extractor(options.extractor, cache=options.cache, device=device)
    reference = reference_statistics(dataset, extractor, cache=options.cache)
    sampler, show = chosen_sampler(options, metadata.get("sampler")), _Progress()
    images = draw_images(
        model.to(device),
        sampler,
        options.images,
        seed=options.seed,
        batch=options.batch,
        on_image=lambda done: show(done, options.images, "images drawn"),
    )
    fid = FID(
        value=frechet_distance(feature_statistics(images, extractor), reference),
        images=len(images),
        reference=dataset.name,
        reference_images=reference.count,
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
        nfe=sampler.nfe,
        seeds={"evaluation": options.seed},
    )
    print(json.dumps(fid.as_dict()))


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
