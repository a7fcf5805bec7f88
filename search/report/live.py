"""The dashboard's notes of a study, kept up to date while it runs and at its end.

Errors here are logged and never end a launch: notes can be written again.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from search.errors import LeaseLostError, StorageError
from search.report.dashboard_texts import save_texts
from search.report.notes import study_note, trial_note
from search.report.overview import overview_of
from search.storage.engine import one_line, retrying
from search.storage.ledger import Claim, Ledger
from search.study.artifacts import artifact_store, attach, attached
from search.study.folders import GRID, pictures
from search.study.results import TrialResult
from search.study.study import Study

_log = logging.getLogger(__name__)

LEAST_SECONDS = 20.0
# Between two writings pass at least so many times the seconds that the last one took.
_SHARE = 20.0


class Showing:
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
        """Write it as it is at the end, and that of the search that this study confirms."""
        self._write()
        if of := self._study.facts.get("of"):
            url = self._study.url
            _never_in_the_way("the search's note", lambda: show(Study.open(url, str(of))))

    def _write(self) -> None:
        with self._writing:
            started = time.monotonic()
            _never_in_the_way("the study's note", self._write_if_changed)
            took = time.monotonic() - started
            self._not_before = time.monotonic() + max(LEAST_SECONDS, _SHARE * took)

    def _write_if_changed(self) -> None:
        ended = [ledger.counts().ended for ledger in self._study.ledgers]
        if ended != self._shown:
            show(self._study)
            self._shown = ended


def show(study: Study) -> None:
    """Write a study's note.

    Raises:
        StorageError: The database stayed away.
    """
    overview = overview_of(study)
    grids = []
    for title, ledger, number, _ in overview.shown() if study.is_search else ():
        if (grid := _grid_address(ledger, number)) is not None:
            grids.append((title, grid))
    save_texts(study.main.storage, _study_id(study.main), study_note(overview, grids))


def attach_pictures(ledger: Ledger, claim: Claim, folder: Path, result: TrialResult) -> None:
    """Make a trial's pictures its artifacts and write its note, before it is finished.

    A store that cannot be written to costs the pictures, never the FID.

    Raises:
        LeaseLostError: Another worker took it over.
        StorageError: The database stayed away.
    """
    files = pictures(folder)
    ids: dict[str, str] = {}
    if files:
        _harmless(
            f"pictures of trial {claim.number}",
            lambda: ids.update(attach(ledger.storage, claim.trial_id, files, artifact_store())),
        )
    addresses = [(name, _address(ledger, claim.trial_id, each)) for name, each in ids.items()]

    def write() -> None:
        arm = result.arm
        title = f"trial {claim.number}" if arm is None else f"{arm}, seed {claim.params['seed']}"
        note = trial_note(title, result, addresses)
        save_texts(ledger.storage, _study_id(ledger), note, trial_id=claim.trial_id)

    _harmless(f"note of trial {claim.number}", write)


def _address(ledger: Ledger, trial_id: int, artifact_id: str) -> str:
    """Where the dashboard serves an artifact."""
    return f"/artifacts/{_study_id(ledger)}/{trial_id}/{artifact_id}"


def _grid_address(ledger: Ledger, number: int) -> str | None:
    """Where the dashboard serves a trial's sample grid; None where it has none."""
    storage, study_id = ledger.storage, _study_id(ledger)
    trial_id = retrying(lambda: storage.get_trial_id_from_study_id_trial_number(study_id, number))
    stored = attached(storage, retrying(lambda: storage.get_trial(trial_id)))
    # One of each stage, whose name begins with its steps: the last stage has the fewest.
    grids = sorted((m.filename, m.artifact_id) for m in stored if m.filename.endswith(GRID))
    return _address(ledger, trial_id, grids[0][1]) if grids else None


def _study_id(ledger: Ledger) -> int:
    return retrying(lambda: ledger.storage.get_study_id_from_name(ledger.study.study_name))


def _harmless(what: str, call: Callable[[], None]) -> None:
    """Call; log every error but the loss of the database or of the lease."""
    try:
        call()
    except (LeaseLostError, StorageError):
        raise
    except Exception as error:  # noqa: BLE001  a picture must not cost a FID
        _log.warning("%s could not be stored: %s", what, one_line(error))


def _never_in_the_way(what: str, call: Callable[[], None]) -> None:
    """Call and log every error."""
    try:
        _harmless(what, call)
    except (LeaseLostError, StorageError) as error:
        _log.warning("%s could not be stored: %s", what, error)
