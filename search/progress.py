"""A launch as it goes, on stderr: a changing line on a terminal, else a line now and then."""

import re
import sys
import time
from typing import TextIO

from search.ledger import Running
from search.report import duration, in_short, standing
from search.slots import Progress
from search.study import Study

LINE_SECONDS = 10.0
STEPS = {
    "waiting": "waiting for a free worker",
    "features": "feature extractor",
    "teacher": "training the teacher",
    "trajectories": "recording trajectories",
}


class Display:
    """What the launch does now, trials done, best so far, time left.

    Args:
        study: What is launched.
        stream: Where lines go.
    """

    def __init__(self, study: Study, stream: TextIO | None = None) -> None:
        self._study = study
        self._stream = stream or sys.stderr
        self._started = time.monotonic()
        self._step_started: dict[str, tuple[float, int]] = {}
        self._done_at_start: int | None = None
        self._trials_started = 0.0
        self._last_line = ""
        self._last_time = -LINE_SECONDS
        self._last_step = ""

    def preparing(self, message: Progress) -> None:
        """A message from a preparing task."""
        now = time.monotonic()
        begun, first = self._step_started.setdefault(message.what, (now, message.done))
        text = STEPS[message.what]
        if message.total > 1:
            text += f" {message.done}/{message.total}"
        if message.remark:
            text += f", {message.remark}"
        if message.done > first:
            left = (now - begun) / (message.done - first) * (message.total - message.done)
            text += f", about {duration(left)} left for this step"
        self._show(text, message.what, is_last=message.done == message.total)

    def searching(self) -> None:
        """A look at the database."""
        now = standing(self._study)
        assert self._study.baselines is not None  # a launch plans them
        base = self._study.baselines.counts()
        done = sum(c.complete + c.pruned + c.failed for c in (now.counts, base))
        total = now.counts.planned + base.planned
        running = [*self._study.baselines.running(), *self._study.trials.running()]
        if self._done_at_start is None:
            self._done_at_start, self._trials_started = done, time.monotonic()
        finished = now.counts.complete + now.counts.pruned + now.counts.failed
        text = f"trials {finished}/{now.counts.planned}"
        if base.complete + base.failed < base.planned:
            text += f", baselines {base.complete}/{base.planned}"
        if now.counts.failed:
            text += f", {now.counts.failed} failed"
        if now.best is not None:
            text += f", best FID {now.best['fid']:.3f} ({in_short(now.best)})"
        elif now.baselines:
            text += f", plain SFD {next(iter(now.baselines.values()))['fid']:.3f}"
        partly = sum(_share_done(row) for row in running)
        if (progress := done - self._done_at_start + partly) > 0:
            spent = time.monotonic() - self._trials_started
            text += f", about {duration(spent / progress * (total - done - partly))} left"
        if running:
            text += f"; {len(running)} running: {running[0].progress or 'starting'}"
        self._show(text, f"trials {done}", is_last=False)

    def close(self) -> None:
        """End a line that changes."""
        if self._stream.isatty() and self._last_line:
            self._stream.write("\n")
            self._stream.flush()
        self._last_line = ""

    def _show(self, text: str, step: str, *, is_last: bool) -> None:
        line = f"[{duration(time.monotonic() - self._started):>12}] {text}"
        if self._stream.isatty():
            padding = " " * max(0, len(self._last_line) - len(line))
            self._stream.write(f"\r{line}{padding}" + ("\n" if is_last else ""))
            self._stream.flush()
            self._last_line = "" if is_last else line
            return
        is_due = time.monotonic() - self._last_time >= LINE_SECONDS
        if is_due or is_last or step != self._last_step:
            self._stream.write(line + "\n")
            self._stream.flush()
            self._last_time, self._last_step = time.monotonic(), step


def _share_done(row: Running) -> float:
    """How much of a running trial is done, by its own words; evaluation is the last tenth."""
    found = re.match(r"(training|evaluating) (\d+)/(\d+)", row.progress)
    if found is None:
        return 0.0
    share = int(found[2]) / int(found[3])
    return 0.9 * share if found[1] == "training" else 0.9 + 0.1 * share
