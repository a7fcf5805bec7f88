"""Writes a study's note in the dashboard, while it runs and at its end.

Errors here are logged and never end a launch: notes can be written again.
"""

import threading
import time
from collections.abc import Sequence

from search.report.document import Picture, as_markdown
from search.report.overview import overview_of
from search.report.pages import study_page
from search.storage.engine import retrying
from search.storage.ledger import Ledger
from search.study.artifacts import attached
from search.study.folders import GRID
from search.study.notes import address, errors_logged, save_note
from search.study.study import Study

LEAST_SECONDS = 20.0
# Between two writings pass at least so many times the seconds that the last one took.
_SHARE = 20.0


class NoteWriter:
    """Writes a study's note when trials have ended since, and not too often."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._shown: Sequence[int] | None = None
        self._not_before = 0.0
        self._writing = threading.Lock()

    def refresh(self) -> None:
        """Write it if it is time."""
        if time.monotonic() >= self._not_before:
            self._write()

    def finish(self) -> None:
        """Write the final note, and anew the note of the search that this study confirms."""
        self._write()
        if of := self._study.of:
            with errors_logged("the search's note", reraise=()):
                write_note(Study.open(self._study.url, of))

    def _write(self) -> None:
        with self._writing:
            started = time.monotonic()
            with errors_logged("the study's note", reraise=()):
                ended = [ledger.counts().ended for ledger in self._study.ledgers]
                if ended != self._shown:
                    write_note(self._study)
                    self._shown = ended
            took = time.monotonic() - started
            self._not_before = time.monotonic() + max(LEAST_SECONDS, _SHARE * took)


def write_note(study: Study) -> None:
    """Write a study's note.

    Raises:
        StorageError: The database stayed away.
    """
    overview = overview_of(study)
    grids = []
    for title, ledger, number, _ in () if overview.now is None else overview.shown():
        if (grid := _grid_address(ledger, number)) is not None:
            grids.append(Picture(title, grid))
    note = as_markdown(study.name, study_page(overview, grids))
    save_note(study.main.storage, study.main.key, note)


def _grid_address(ledger: Ledger, number: int) -> str | None:
    """Where the dashboard serves a trial's sample grid; None where it has none."""
    storage, key = ledger.storage, ledger.key
    trial_id = retrying(lambda: storage.get_trial_id_from_study_id_trial_number(key, number))
    stored = attached(storage, retrying(lambda: storage.get_trial(trial_id)))
    # One of each stage, whose name begins with its steps: the last stage has the fewest.
    grids = sorted((m.filename, m.artifact_id) for m in stored if m.filename.endswith(GRID))
    return address(ledger, trial_id, grids[0][1]) if grids else None
