"""Progress of a launch: a bar on a terminal, lines elsewhere."""

import io
import os
import termios
from collections.abc import Iterator
from typing import TextIO

import pytest

from search.run.progress import Display, Snapshot
from search.storage.queries import Running
from search.study.progress_text import in_stage, training
from search.worker.ray_tasks import Preparation


def follow(stream: TextIO) -> None:
    """A teacher that is trained, then two rows, the second of them halfway."""
    ended = iter((0, 1))
    text = in_stage(2, 2, training(0, 50, 1.0))
    half = Running(number=1, owner="host:1", attempt=1, seconds=1.0, progress=text)

    def snapshot() -> Snapshot:
        return Snapshot(text="rows", ended=next(ended), total=2, running=[half])

    display = Display(snapshot, stream)
    for done in (0, 4):
        display.preparing(Preparation(what="teacher", done=done, total=4))
    for _ in range(2):
        display.running()
    display.close()


@pytest.fixture
def terminal() -> Iterator[tuple[TextIO, int]]:
    """A terminal to write to, and what reads it."""
    reader, writer = os.openpty()
    termios.tcsetwinsize(writer, (24, 100))
    with os.fdopen(writer, "w") as stream:
        yield stream, reader
    os.close(reader)


def test_on_a_terminal_each_step_has_a_bar(terminal):
    stream, reader = terminal
    follow(stream)
    shown = os.read(reader, 2**16).decode()
    first, rows, rest = ([part for part in each.split("\r") if part] for each in shown.split("\n"))
    assert (first[0][:4], first[-1][:4], rest) == ("  0%", "100%", [])
    assert "training the teacher 4/4" in first[-1]
    assert (rows[0][:4], rows[-1][:4]) == (" 25%", " 75%")


def test_elsewhere_there_are_lines():
    stream = io.StringIO()
    follow(stream)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[0].endswith("training the teacher 0/4")
    assert "stage 2/2" in lines[3]
    assert "|" not in stream.getvalue()
