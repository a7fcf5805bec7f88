"""Shared by the verbs when they run: hardware, output paths, progress."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch

from bdense.errors import InputError, StoppedError
from bdense.execution import Execution
from bdense.files import require_output
from bdense.models.card import no_card
from bdense.verbs.options import Hardware

SHOW_SECONDS = 2.0
WEIGHTS = ".safetensors"


def chosen_device(hardware: Hardware) -> torch.device:
    """Set the process's threads; returns the device to compute on.

    Raises:
        InputError: A GPU was asked for, and torch sees none of that kind.
    """
    if hardware.threads is not None:
        torch.set_num_threads(hardware.threads)
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(hardware.device, True):
        kind = {"cuda": "GPU", "mps": "Apple GPU"}[hardware.device]
        raise InputError(
            f"--device {hardware.device}: torch sees no {kind} here; use --device cpu"
        )
    if hardware.device == "auto":
        return torch.device("cuda" if available["cuda"] else "cpu")
    return torch.device(hardware.device)


def chosen_hardware(execution: Execution, hardware: Hardware) -> torch.device:
    """``chosen_device``, if it can compute a network as asked.

    Raises:
        InputError: It cannot.
    """
    device = chosen_device(hardware)
    execution.require(device)
    return device


def say_ignored(source: str, metadata: Mapping[str, Any]) -> None:
    """Tell which parts of a teacher's pipeline are never loaded."""
    for part in metadata.get("ignored", ()):
        sys.stderr.write(f"{source}: its {part} is not loaded\n")


def require_model_out(
    out: Path,
    *,
    force: bool,
    problem: Callable[[Path], str] = lambda _: "",
    inputs: Iterable[str | Path] = (),
) -> None:
    """Check an --out of weights, and the card beside it; arguments as in ``require_output``.

    Raises:
        InputError: As ``require_output``, or the file has another ending than .safetensors.
    """
    if out.suffix != WEIGHTS and not out.is_dir():
        raise InputError(f"--out {out} must end in {WEIGHTS}, the format that is written")
    require_output(out, problem=problem, inputs=inputs, force=force)
    require_output(out.with_suffix(".md"), problem=no_card, force=force)


class Interrupt(contextlib.AbstractContextManager["Interrupt"]):
    """Ctrl-C and SIGTERM while work is under way: it ends at its next report of progress.

    So a training ends between two iterations, with its state saved. A second signal ends it at
    once.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # Not by sys.stderr: a buffer that is being written to may not be entered again.
        with contextlib.suppress(OSError):
            os.write(2, b"interrupted: ending this iteration (once more ends at once)\n")


class Progress:
    """A line on stderr every two seconds.

    Args:
        interrupt: Ends the work where it was requested.
        kept: What is kept then, for people.
    """

    def __init__(
        self, interrupt: Interrupt | None = None, kept: str = "nothing was saved"
    ) -> None:
        self._interrupt, self._kept = interrupt, kept
        self._shown = time.monotonic()
        self._first: tuple[int, float] | None = None

    def __call__(self, done: int, total: int, remark: str) -> None:
        """Report progress, if two seconds have passed or this is the end.

        Raises:
            StoppedError: An interrupt was requested.
        """
        if self._interrupt is not None and self._interrupt.requested:
            raise StoppedError(f"interrupted at {done}/{total}; {self._kept}")
        now = time.monotonic()
        # An earlier run did what is done at the first call.
        self._first = self._first or (done, now)
        first, since = self._first
        if done < total and (done == first or now - self._shown < SHOW_SECONDS):
            return
        self._shown = now
        left = (now - since) / max(1, done - first) * (total - done)
        sys.stderr.write(f"{done}/{total}, {remark}, about {left:.0f} s left\n")

    def counting(self, total: int, what: str) -> Callable[[int], None]:
        """A function that takes the number of things done."""
        return lambda done: self(done, total, what)
