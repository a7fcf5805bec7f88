"""The commands as tests call them."""

import contextlib
import io
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from bdense.cli import main
from bdense.data.datasets import load_dataset
from bdense.methods import METHODS
from bdense.methods.distill import distill as distill_stages
from bdense.methods.method import Inputs
from bdense.models.store import denoiser_sha256, load_denoiser
from bdense.weights.weighting import BranchWeighting

TINY = ("--channels", 8, "--mult", 1, 2, "--batch", 32, "--kimg", 0.128)
DIGITS = ("--extractor", "digits-classifier")
SHORT = ("--kimg", 0.064, "--batch", 32, "--lr", 1e-3)
# The config that SHORT asks for.
SHORT_CONFIG = {"kimg": 0.064, "batch": 32, "lr": 1e-3}


class Answer(NamedTuple):
    """Exit status and output of a command."""

    status: int
    out: str
    err: str


def answered(main: Callable[[list[str]], int], *arguments: object) -> Answer:
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    before = signal.getsignal(signal.SIGTERM)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as usage:
            status = int(usage.code or 0)
        finally:
            signal.signal(signal.SIGTERM, before)
    return Answer(status, out.getvalue(), err.getvalue())


def bdense(*arguments: object) -> Answer:
    """Run ``bdense`` in this process."""
    return answered(main, *arguments)


def done(*arguments: object) -> str:
    """Run it, and expect it to succeed: what it printed."""
    answer = bdense(*arguments)
    assert answer.status == 0, answer.err
    return answer.out


def refused(answer: Answer) -> str:
    """The one line of a mistake: exit status 2, nothing on stdout."""
    assert (answer.status, answer.out) == (2, ""), answer
    (line,) = answer.err.splitlines()
    command, _, problem = line.partition(": ")
    assert command.split()[0] in ("bdense", "bdense-search")
    return problem


def distill(teacher: Path, path: Path, *options: object) -> str:
    """Hash of a student made anew."""
    path.unlink(missing_ok=True)
    done("distill", teacher, *SHORT, *options, "--out", path)
    return denoiser_sha256(load_denoiser(path)[0])


def drawn(path: Path, model: Path, *options: object) -> torch.Tensor:
    """The first two images of a picture of a model's, [2, 8, 8]."""
    done("sample", model, "--images", 2, *options, "--out", path)
    with Image.open(path) as picture:
        pixels = torch.from_numpy(np.array(picture))
    # Every pixel is a square of 4; 2 lie between two images.
    return torch.stack([pixels[0:32:4, left : left + 32 : 4] for left in (0, 34)])


def distilled(
    method: str,
    teacher: Path,
    weighting: Callable[[], BranchWeighting],
    *,
    folder: Path | None = None,
    seed: int = 0,
    **config: object,
) -> list[str]:
    """Hashes of the students of each stage, by the library."""
    made, (model, known) = METHODS[method](), load_denoiser(teacher)
    dataset = load_dataset("digits") if made.needs_data else None
    stages = distill_stages(
        made,
        model,
        made.Config.read(config),
        weighting,
        Inputs(dataset=dataset, seed=seed, metadata=known),
        folder=folder,
    )
    return [denoiser_sha256(each.student) for each in stages]
