"""A row's log in its own folder: a line of JSON for each event, appended only.

Several attempts, on several machines, follow each other in one file. A worker that died may leave
half a last line, which readers skip.
"""

import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, Self

from search.log import FIELDS, current_context, json_line, timestamp

LOG_FILE = "log.jsonl"
TRAINING_LINES = 100  # at most, of one training; resuming may repeat a few
_DIGITS = 6

_log = logging.getLogger(__name__)


class Note(Protocol):
    """A function that logs an event."""

    def __call__(self, event: str, /, *, level: int = ..., **fields: object) -> None: ...


def worker_name() -> str:
    """This process among all that work on a study's rows: host:pid."""
    return f"{platform.node()}:{os.getpid()}"


def unnoted(event: str, /, *, level: int = logging.INFO, **fields: object) -> None:
    """Logs nothing."""


class TrialLog:
    """One attempt's part of a row's log.

    Events before ``open`` are written by it: only a worker that has checked that the folder is
    its row's may write there. A log that cannot be written is no reason to fail.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOG_FILE
        self._early: list[str] | None = []

    def __call__(self, event: str, /, *, level: int = logging.INFO, **fields: object) -> None:
        """Append an event, and pass it to the service's log."""
        _log.log(level, event, extra={FIELDS: fields})
        entry = {
            "time": timestamp(time.time()),
            "level": logging.getLevelName(level).lower(),
            **current_context(),
            "worker": worker_name(),
            "event": event,
        }
        line = json_line(entry, fields) + "\n"
        if self._early is not None:
            self._early.append(line)
        else:
            self._append(line)

    def open(self) -> Self:
        """Write to the folder from now on."""
        if self._early is None:
            return self
        text, self._early = "".join(self._early), None
        try:
            whole = not self._path.exists() or self._path.read_bytes()[-1:] in (b"", b"\n")
        except OSError:
            whole = True
        self._append(text if whole else "\n" + text)
        return self

    def _append(self, text: str) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(text)  # one write: a reader sees whole lines
        except OSError as error:
            _log.warning("%s cannot be written: %s", self._path, error)


def is_noted(iteration: int, iterations: int) -> bool:
    """Whether an iteration, from 0, is logged: every hundredth part, and the last."""
    every = max(1, iterations // TRAINING_LINES)
    return iteration % every == 0 or iteration == iterations - 1


def shortened(values: Any) -> Any:  # noqa: ANN401  numbers, nested lists of them, tensors
    """Numbers rounded to six digits."""
    if hasattr(values, "tolist"):
        values = values.tolist()
    if isinstance(values, list):
        return [shortened(value) for value in values]
    return float(f"{values:.{_DIGITS}g}")


def read_log(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Events from a byte on, and the byte to go on from: half a last line is left for later.

    The file may be missing.
    """
    if not path.exists():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        text = file.read()
    whole = text[: text.rfind(b"\n") + 1]
    return list(_events(whole)), offset + len(whole)


def _events(lines: bytes) -> Iterator[dict[str, Any]]:
    for line in lines.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue  # its writer died in the middle
        if isinstance(event, dict) and "event" in event:
            yield event
