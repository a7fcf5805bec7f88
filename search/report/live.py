"""The dashboard's notes and plots of a study, kept up to date while it runs and at its end.

Whatever goes wrong here is logged and ends nothing: what is shown can be written again.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from search.errors import LeaseLostError, StorageError
from search.report.dashboard_texts import save_texts
from search.report.notes import planned_note, study_note, trial_note
from search.report.overview import overview_of, planned_overview_of
from search.report.render import interactive
from search.storage.engine import one_line, retrying
from search.storage.ledger import Claim, Ledger
from search.study.arms import Planned
from search.study.artifacts import artifact_store, attach, attached
from search.study.folders import GRID, pictures
from search.study.opening import open_record
from search.study.study import Study
from search.study.summary import TITLES

_log = logging.getLogger(__name__)

LEAST_SECONDS = 20.0
# Of the time that passes, at most a share of one in so many goes into showing.
_SHARE = 20.0


class Showing:
    """Writes a study's note and plots, when trials have ended since and not too often.

    Args:
        record: The study.
    """

    def __init__(self, record: Study | Planned) -> None:
        self._record = record
        self._shown: Sequence[int] | None = None
        self._not_before = 0.0
        self._writing = threading.Lock()

    def refresh(self) -> None:
        """Write them if it is time; call it as often as you like."""
        if time.monotonic() >= self._not_before:
            self._write()

    def finish(self) -> None:
        """Write them as they are at the end, and those of the search that this one confirms."""
        self._write()
        if isinstance(self._record, Planned) and (of := self._record.facts.get("of")):
            url = self._record.url
            _never_in_the_way("the search's note", lambda: show(open_record(url, str(of))))

    def _write(self) -> None:
        with self._writing:
            started = time.monotonic()
            _never_in_the_way("the study's note and plots", self._write_if_changed)
            took = time.monotonic() - started
            self._not_before = time.monotonic() + max(LEAST_SECONDS, _SHARE * took)

    def _write_if_changed(self) -> None:
        ended = [ledger.counts().ended for ledger in self._record.ledgers]
        if ended != self._shown:
            show(self._record)
            self._shown = ended


def show(record: Study | Planned) -> None:
    """Write a study's note and plots as they should be now.

    Raises:
        StorageError: The database stayed away.
    """
    if isinstance(record, Planned):
        rows = planned_overview_of(record)
        ledger, note, charts = record.ledger, planned_note(rows), rows.charts()
    else:
        overview = overview_of(record)
        best = None if overview.now.best is None else overview.now.best["number"]
        grids = _grids(record, overview.now.baselines, best)
        ledger, note, charts = record.trials, study_note(overview, grids), overview.charts()
    plots = {chart.key: str(interactive(chart).to_json()) for chart in charts}
    save_texts(ledger.storage, _study_id(ledger), note, plots=plots)


def attach_pictures(
    ledger: Ledger, claim: Claim, folder: Path, value: float | None, attrs: Mapping[str, Any]
) -> None:
    """Make a trial's pictures its artifacts and write its note, before it is finished.

    A store that cannot be written to costs the pictures, never the FID.

    Args:
        ledger: The study's.
        claim: The trial.
        folder: Its files.
        value: Its FID, None of one that is pruned.
        attrs: What its row stores.

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
    addresses = [(name, address(ledger, claim.trial_id, each)) for name, each in ids.items()]

    def write() -> None:
        note = trial_note(_title(claim, attrs), value, attrs, addresses)
        save_texts(ledger.storage, _study_id(ledger), note, trial_id=claim.trial_id)

    _harmless(f"note of trial {claim.number}", write)


def _title(claim: Claim, attrs: Mapping[str, Any]) -> str:
    if "arm" in attrs:
        return f"{attrs['arm']}, seed {claim.params.get('seed')}"
    return TITLES.get(claim.params.get("method", ""), f"trial {claim.number}")


def address(ledger: Ledger, trial_id: int, artifact_id: str) -> str:
    """Where the dashboard serves an artifact."""
    study_id = _study_id(ledger)
    return f"/artifacts/{study_id}/{trial_id}/{artifact_id}"


def _grids(
    study: Study, baselines: Mapping[str, Mapping[str, Any]], best: int | None
) -> list[tuple[str, str]]:
    """(title, address) of the sample grids of baselines and best."""
    wanted = [(TITLES[m], study.baselines, found["number"]) for m, found in baselines.items()]
    if best is not None:
        wanted.append((f"best: trial {best}", study.trials, best))
    found = []
    for title, ledger, number in wanted:
        assert ledger is not None  # it has a result
        grid = grid_address(ledger, number)
        if grid is not None:
            found.append((title, grid))
    return found


def grid_address(ledger: Ledger, number: int) -> str | None:
    """Where the dashboard serves a trial's sample grid; None where it has none."""
    storage, study_id = ledger.storage, _study_id(ledger)
    trial_id = retrying(lambda: storage.get_trial_id_from_study_id_trial_number(study_id, number))
    for meta in attached(storage, retrying(lambda: storage.get_trial(trial_id))):
        if meta.filename == GRID:
            return address(ledger, trial_id, meta.artifact_id)
    return None


def _study_id(ledger: Ledger) -> int:
    return retrying(lambda: ledger.storage.get_study_id_from_name(ledger.study.study_name))


def _harmless(what: str, call: Callable[[], None]) -> None:
    """Call; of what goes wrong only the loss of the database or of the lease is not harmless."""
    try:
        call()
    except (LeaseLostError, StorageError):
        raise
    except Exception as error:  # noqa: BLE001  what is shown must not cost what was measured
        _log.warning("%s could not be stored: %s", what, one_line(error))


def _never_in_the_way(what: str, call: Callable[[], None]) -> None:
    """Call; a launch goes on without."""
    try:
        _harmless(what, call)
    except (LeaseLostError, StorageError) as error:
        _log.warning("%s could not be stored: %s", what, error)
