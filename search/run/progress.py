"""Progress of a launch on stderr: a bar on a terminal or in a notebook, else lines."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from bdense.progress import is_live, progress_bar
from search.log import say
from search.storage.leases import RunningRow
from search.study.progress_text import share_done
from search.study.study import Study
from search.study.summary import summary_of
from search.study.wording import duration
from search.worker.trainer import Preparation, Step

if TYPE_CHECKING:
    from tqdm import tqdm

LINE_SECONDS = 10.0
_ROWS = "rows"  # the step after the preparations
# On a terminal the bar is narrow: the text takes the rest of the line, and its end is cut.
_ON_TERMINAL = "{percentage:3.0f}%|{bar:10}| {desc}"
_IN_NOTEBOOK = "{percentage:3.0f}%|{bar}| {desc}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The progress of rows at one moment.

    Attributes:
        text: Progress and best so far.
        ended, total: Numbers of rows.
        running: Running rows.
    """

    text: str
    ended: int
    total: int
    running: Sequence[RunningRow]


def snapshot_of(study: Study) -> Snapshot:
    """The current progress of a study's rows."""
    counts = [ledger.counts() for ledger in study.ledgers]
    main, base = counts[0], counts[-1]
    text = f"{study.noun}s {main.ended}/{main.planned}"
    if base is not main and base.complete + base.failed < base.planned:
        text += f", {study.given_noun} {base.complete}/{base.planned}"
    if main.failed:
        text += f", {main.failed} failed"
    if study.is_search:
        now = summary_of(study)
        metric = now.spec.metric
        if now.best is not None:
            text += f", best {metric.name} {metric.text(now.best.value)} ({now.best.label})"
        elif (reference := now.reference) is not None:
            text += f", {reference.label} {metric.text(reference.value)}"
    return Snapshot(
        text=text,
        ended=sum(each.ended for each in counts),
        total=sum(each.planned for each in counts),
        running=[row for ledger in reversed(study.ledgers) for row in ledger.running()],
    )


class Display:
    """Shows progress on a stream (None: stderr): rows done, best so far, time left."""

    def __init__(self, snapshot: Callable[[], Snapshot], stream: TextIO | None = None) -> None:
        self._snapshot = snapshot
        self._given = stream
        self._bar: tqdm[Any] | None = None
        self._bar_stream: TextIO | None = None
        self._started = time.monotonic()
        self._step_started: dict[Step, tuple[float, int]] = {}
        self._done_at_start: int | None = None
        self._rows_started = 0.0
        self._last_time = -LINE_SECONDS
        self._last_step: tuple[str, int] = ("", 0)

    @property
    def _stream(self) -> TextIO:
        # Looked up each time: an end by a signal replaces sys.stderr.
        return self._given or sys.stderr

    def preparing(self, message: Preparation) -> None:
        """Show a message of a preparing task."""
        now = time.monotonic()
        begun, first = self._step_started.setdefault(message.step, (now, message.done))
        text = message.counted
        if message.done > first:
            left = (now - begun) / (message.done - first) * (message.total - message.done)
            text += f", about {duration(left)} left for this step"
        if message.remark:
            text += f", {message.remark}"
        if message.done == message.total:
            # The step may come again for another seed.
            del self._step_started[message.step]
        self._show(text, message.step, message.done, message.total)

    def running(self) -> None:
        """Show the progress of running rows."""
        snapshot = self._snapshot()
        if self._done_at_start is None:
            self._done_at_start, self._rows_started = snapshot.ended, time.monotonic()
        # What matters comes first: a terminal may be narrow.
        text, partly = "", sum(share_done(row.progress) for row in snapshot.running)
        if (progress := snapshot.ended - self._done_at_start + partly) > 0:
            spent = time.monotonic() - self._rows_started
            left = spent / progress * (snapshot.total - snapshot.ended - partly)
            text += f"about {duration(left)} left, "
        if snapshot.running:
            text += f"{len(snapshot.running)} running, "
        text += snapshot.text
        if snapshot.running:
            text += f"; {snapshot.running[0].progress or 'starting'}"
        self._show(text, _ROWS, snapshot.ended + partly, snapshot.total, ended=snapshot.ended)

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None

    def _show(self, text: str, step: str, done: float, total: int, *, ended: int = 0) -> None:
        spent = duration(time.monotonic() - self._started)
        is_last = step != _ROWS and done == total
        if is_live(self._stream):
            self._move(f"[{spent}] {text}", step, done, total)
            if is_last:
                self.close()
            return
        is_due = time.monotonic() - self._last_time >= LINE_SECONDS
        if is_due or is_last or (step, ended) != self._last_step:
            say(f"[{spent:>12}] {text}", self._stream)
            self._last_time, self._last_step = time.monotonic(), (step, ended)

    def _move(self, line: str, step: str, done: float, total: int) -> None:
        if step != self._last_step[0] or self._bar_stream is not self._stream:
            self.close()
        self._last_step = (step, 0)
        if self._bar is None:
            form = _ON_TERMINAL if self._stream.isatty() else _IN_NOTEBOOK
            now = {"initial": done, "total": total, "desc": line}
            self._bar_stream = self._stream
            self._bar = progress_bar(self._stream, bar_format=form, dynamic_ncols=True, **now)
        elif total != self._bar.total:
            self._bar.reset(total)  # a notebook's widget keeps the total that it was told last
        self._bar.n = done
        self._bar.set_description_str(line)
