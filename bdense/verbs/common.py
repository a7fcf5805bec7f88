"""Shared by the verbs when they run: hardware, output paths, progress."""

import argparse
import os
import sys
import time
from pathlib import Path

import torch

from bdense.errors import InputError
from bdense.execution import Execution
from bdense.knobs import from_options
from bdense.verbs.options import Hardware

SHOW_SECONDS = 2.0


def chosen_device(options: argparse.Namespace) -> torch.device:
    """Set the process's threads; returns the device to compute on.

    Raises:
        InputError: A GPU was asked for, and torch sees none.
    """
    hardware = from_options(Hardware, options)
    if hardware.threads is not None:
        torch.set_num_threads(hardware.threads)
    available = torch.cuda.is_available()
    if hardware.device == "cuda" and not available:
        raise InputError("--device cuda: torch sees no GPU here; use --device cpu")
    if hardware.device == "auto":
        return torch.device("cuda" if available else "cpu")
    return torch.device(hardware.device)


def chosen_hardware(options: argparse.Namespace) -> tuple[torch.device, Execution]:
    """``chosen_device``, and how it computes a network.

    Raises:
        InputError: The device does not support that.
    """
    device, execution = chosen_device(options), from_options(Execution, options)
    execution.require(device)
    return device, execution


def require_writable(out: Path, *, folder: bool = False) -> None:
    """Make the folder of an output file, or the output folder itself, before hours of work.

    Raises:
        InputError: It cannot be written, or is a folder where a file is expected or vice versa.
    """
    if folder and out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; give the name of a folder")
    if not folder and out.is_dir():
        raise InputError(f"--out {out} is a folder; give the name of a file")
    place = out if folder else out.parent
    place.mkdir(parents=True, exist_ok=True)
    if not os.access(place, os.W_OK):
        raise InputError(f"--out {out}: the folder cannot be written; choose another")


def unfinished(out: Path) -> Path:
    """Where a training is kept until its result is written."""
    return out.with_suffix(".training.safetensors")


class Progress:
    """A line on stderr every two seconds."""

    def __init__(self) -> None:
        self._shown = time.monotonic()
        self._first: tuple[int, float] | None = None

    def __call__(self, done: int, total: int, remark: str) -> None:
        """Report progress, if two seconds have passed or this is the end."""
        now = time.monotonic()
        # An earlier run did what is done at the first call.
        self._first = self._first or (done, now)
        first, since = self._first
        if done < total and (done == first or now - self._shown < SHOW_SECONDS):
            return
        self._shown = now
        left = (now - since) / max(1, done - first) * (total - done)
        sys.stderr.write(f"{done}/{total}, {remark}, about {left:.0f} s left\n")
