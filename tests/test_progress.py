"""Progress of a launch: a bar on a terminal, lines elsewhere."""

import contextlib
import io
import os
import re
import termios
from typing import TextIO

from search.run.progress import Display, Snapshot
from search.storage.queries import Running
from search.study.progress_text import in_stage, training
from search.worker.trainer import Preparation

COUNTS = "trials 1/2, baselines 2/6, best FID 2.310 (a 0.532, ab 1.125), plain 3.123"


def follow(stream: TextIO) -> None:
    """A teacher that is trained, then two rows, the second of them halfway, then two more."""
    ended, total = iter((0, 1, 1)), iter((2, 2, 4))
    text = in_stage(2, 2, training(0, 50, 1.0))
    half = Running(number=1, owner="host:1", attempt=1, seconds=1.0, progress=text)

    def snapshot() -> Snapshot:
        return Snapshot(text=COUNTS, ended=next(ended), total=next(total), running=[half])

    display = Display(snapshot, stream)
    for done in (0, 4):
        display.preparing(Preparation(what="teacher", done=done, total=4))
    for _ in range(3):
        display.running()
    display.close()


def on_terminal(columns: int) -> str:
    """What ``follow`` writes to a terminal of that width."""
    reader, writer = os.openpty()
    termios.tcsetwinsize(writer, (24, columns))
    with os.fdopen(writer, "w") as stream:
        follow(stream)
    parts = []
    with contextlib.suppress(OSError), os.fdopen(reader, "rb", buffering=0) as file:
        while part := file.read(2**16):  # EIO ends it, as the writer is closed
            parts.append(part)
    return b"".join(parts).decode()


def test_on_a_terminal_each_step_has_a_bar():
    shown = on_terminal(100)
    first, rows, rest = ([part for part in each.split("\r") if part] for each in shown.split("\n"))
    assert (first[0][:4], first[-1][:4], rest) == ("  0%", "100%", [])
    assert "training the teacher 4/4" in first[-1]
    assert (rows[0][:4], rows[-1][:4]) == (" 25%", " 38%")
    assert " 75%" in [row[:4] for row in rows]


def test_a_usual_terminal_shows_a_bar_the_time_left_and_the_running_rows():
    rows = [row for row in on_terminal(80).split("\n")[1].split("\r") if row]
    assert max(map(len, rows)) <= 80
    percent, bar, text = rows[-1].split("|")
    assert (percent, len(bar)) == (" 38%", 10)
    assert re.match(r"\[0 s\] about \d+ s left, 1 running, trials 1/2, ", text.strip())


def test_elsewhere_there_are_lines():
    stream = io.StringIO()
    follow(stream)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[0].endswith("training the teacher 0/4")
    assert "stage 2/2" in lines[3]
    assert "|" not in stream.getvalue()
