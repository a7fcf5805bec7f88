"""What a launch prepares before its rows run, kept in the study for ``status``."""

import contextlib
import time
from datetime import UTC, datetime

from search.storage.ledger import Ledger
from search.study.wording import duration

PREPARING = "preparing"  # the attribute of the study
_SECONDS = 10.0  # between two texts of one step


class PreparationNote:
    """Keeps the progress of a launch's preparations in the study's main ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._step, self._last = "", 0.0
        self._is_clear = False  # a launch that was killed may have left its own

    def tell(self, step: str, text: str) -> None:
        """Keep a text of a step, unless the step's last one is younger than ten seconds."""
        if step == self._step and time.monotonic() - self._last < _SECONDS:
            return
        self._step, self._last, self._is_clear = step, time.monotonic(), False
        at = datetime.now(UTC).isoformat(timespec="seconds")
        self._ledger.store({PREPARING: {"text": text, "at": at}})

    def clear(self) -> None:
        """The preparations are over."""
        if not self._is_clear:
            if self._ledger.attribute(PREPARING) is not None:
                self._ledger.store({PREPARING: None})
            self._step, self._is_clear = "", True


def preparing_line(ledger: Ledger) -> str | None:
    """What is prepared, and how long ago that was kept; None where nothing is."""
    found = ledger.attribute(PREPARING)
    with contextlib.suppress(KeyError, TypeError, ValueError):
        past = datetime.now(UTC) - datetime.fromisoformat(found["at"])
        return f"preparing, {duration(max(0.0, past.total_seconds()))} ago: {found['text']}"
    return None
