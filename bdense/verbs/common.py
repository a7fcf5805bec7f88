"""What the verbs share: options that mean the same in all of them, checks, progress."""

import argparse
import os
import sys
import time
from pathlib import Path

import torch

from bdense.command import Run, Verbs, add_verb
from bdense.errors import InputError
from bdense.execution import PRECISIONS, Execution

SHOW_SECONDS = 2.0


def computing_verb(
    verbs: Verbs, name: str, what: str, example: str, run: Run, *, draws: bool = True
) -> argparse.ArgumentParser:
    """A verb that computes somewhere, and from a seed if it ``draws``."""
    parser = add_verb(verbs, name, what, example, run, argparse.ArgumentDefaultsHelpFormatter)
    if draws:
        parser.add_argument(
            "--seed", metavar="N", type=int, default=0, help="seed of every random draw"
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
        help="where to compute; auto: on a GPU where there is one",
    )
    return parser


def use_device(options: argparse.Namespace) -> None:
    """Settle threads and device of the process, for every verb alike."""
    threads = getattr(options, "threads", torch.get_num_threads())
    if threads < 1:
        raise InputError(f"--threads must be at least 1, got {threads}")
    torch.set_num_threads(threads)
    available = torch.cuda.is_available()
    if options.device == "cuda" and not available:
        raise InputError("--device cuda: torch sees no GPU here; use --device cpu")
    if options.device == "auto":
        options.device = "cuda" if available else "cpu"


def add_model(parser: argparse.ArgumentParser, name: str) -> None:
    """The positional argument that names a model."""
    parser.add_argument(
        name,
        metavar=name.upper(),
        help="a safetensors file, a pickle of EDM or SFD, a folder or hub id in diffusers' "
        "format, or the name of a public checkpoint, which is downloaded (`bdense convert --help` "
        "lists the names)",
    )


def add_out(parser: argparse.ArgumentParser, what: str) -> None:
    """--out, which every verb that writes needs."""
    # No default to show: the option is required.
    parser.add_argument(
        "--out", metavar="FILE", type=Path, required=True, default=argparse.SUPPRESS, help=what
    )


def add_execution_options(parser: argparse.ArgumentParser) -> None:
    """How the network is computed: number format, compilation, memory layout."""
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="float32",
        help="number format of the network's calls; weights stay float32; tf32 and float16 need a "
        "GPU",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the network: takes minutes, pays off in long runs",
    )
    parser.add_argument(
        "--channels-last",
        action="store_true",
        help="keep tensors in NHWC order, which a GPU's cores prefer",
    )


def chosen_execution(options: argparse.Namespace) -> Execution:
    """What ``add_execution_options`` was told.

    Raises:
        InputError: The device does not compute so.
    """
    execution = Execution(
        precision=options.precision, compile=options.compile, channels_last=options.channels_last
    )
    execution.require(torch.device(options.device))
    return execution


def image_count(kimg: float) -> int:
    """Images of a training that is given in thousands of them."""
    if not 0.001 <= kimg < float("inf"):
        raise InputError(f"--kimg must be a finite number, at least 0.001, got {kimg}")
    return round(kimg * 1000)


def require_file_name(path: Path) -> None:
    """Refuse before hours of work what could not be written after them."""
    if path.is_dir():
        raise InputError(f"--out {path} is a folder; give the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"--out {path}: the folder cannot be written; choose another")


def unfinished(out: Path) -> Path:
    """Where a training is kept until its result is written."""
    return out.with_suffix(".training.safetensors")


class Progress:
    """A line on stderr every two seconds."""

    def __init__(self) -> None:
        self._shown = time.monotonic()
        self._first: tuple[int, float] | None = None

    def __call__(self, done: int, total: int, remark: str) -> None:
        """Say how far it is, if it is time for that or the end."""
        now = time.monotonic()
        # What was done before is of an earlier run, which this one goes on from.
        self._first = self._first or (done, now)
        first, since = self._first
        if done < total and (done == first or now - self._shown < SHOW_SECONDS):
            return
        self._shown = now
        left = (now - since) / max(1, done - first) * (total - done)
        sys.stderr.write(f"{done}/{total}, {remark}, about {left:.0f} s left\n")
