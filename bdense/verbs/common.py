"""What verbs do alike when they run: settle the hardware, check the output, show progress."""

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
    """Set the process's threads, and say where to compute.

    Raises:
        InputError: torch sees no GPU, and one was asked for.
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
        InputError: The device does not compute so.
    """
    device, execution = chosen_device(options), from_options(Execution, options)
    execution.require(device)
    return device, execution


def require_file_name(path: Path) -> None:
    """Refuse before hours of work what could not be written after them."""
    if path.is_dir():
        raise InputError(f"--out {path} is a folder; give the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    _require_writable(path, path.parent)


def require_folder_name(path: Path) -> None:
    """Make the folder, or refuse before hours of work what could not be written after them."""
    if path.exists() and not path.is_dir():
        raise InputError(f"--out {path} is a file; give the name of a folder")
    path.mkdir(parents=True, exist_ok=True)
    _require_writable(path, path)


def _require_writable(path: Path, folder: Path) -> None:
    if not os.access(folder, os.W_OK):
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
        # An earlier run did what is done at the first call.
        self._first = self._first or (done, now)
        first, since = self._first
        if done < total and (done == first or now - self._shown < SHOW_SECONDS):
            return
        self._shown = now
        left = (now - since) / max(1, done - first) * (total - done)
        sys.stderr.write(f"{done}/{total}, {remark}, about {left:.0f} s left\n")
