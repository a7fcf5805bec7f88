"""What stays of a row on the disk, and what goes once the row has ended.

Kept for good are a row's result, log and pictures, some 0.3 MB. Large are students, of which a
search keeps its best and those that are named, and checkpoints, which serve running rows alone.
"""

import logging
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from search.storage.ledger import Ledger
from search.study.folders import row_folder

IDENTITY, RESULT = "trial.json", "result.json"
INTERMEDIATE_FILE = "intermediate.json"
STUDENT, CHECKPOINT = "student.safetensors", "checkpoint.safetensors"
UNFINISHED_ROUND = ".training.safetensors"  # as bdense.methods.distill names it
KEPT = "kept_students"  # the study's attribute: numbers of trials

_log = logging.getLogger(__name__)

_ASIDE = re.compile(r"\d{5,}\.[0-9a-f]{8}")  # as search.worker.result moves folders aside
_CARD = Path(STUDENT).with_suffix(".md").name
# A worker that is alive writes one file for less time than this.
ABANDONED_SECONDS = 3600.0
# Ranks after the best that are looked at when a trial ends: more than trials that end at once.
_MARGIN = 64


def keep_best_students(ledger: Ledger, keep: int, ended: int) -> None:
    """Delete what the end of a trial leaves behind the best ``keep``.

    Args:
        ledger: A search's trials.
        keep: Students to keep, beside those that were named.
        ended: Number of the trial.
    """
    beyond = ledger.ranked_after(keep, _MARGIN, also=ended)
    for number in set(beyond) - _named(ledger):
        _delete(_student_files(row_folder(ledger.study.study_name, number)))


def keep_too(ledger: Ledger, numbers: Iterable[int]) -> list[int]:
    """Never delete these trials' students: all that were named so far."""
    named = set(numbers)
    ledger.change(KEPT, lambda old: sorted({*(old or []), *named}))
    return list(ledger.attribute(KEPT))


def clean_students(ledger: Ledger, keep: int) -> int:
    """Delete every student of a search that is not to be kept; bytes freed."""
    name = ledger.study.study_name
    files = (_student_files(row_folder(name, number)) for number in _beyond(ledger, keep))
    return sum(map(_delete, files))


def drop_checkpoints(folder: Path) -> int:
    """Delete the checkpoint of a row that has ended; bytes freed."""
    return _delete([folder / CHECKPOINT, *folder.glob(f"*{UNFINISHED_ROUND}")])


def clean_checkpoints(ledger: Ledger) -> int:
    """Delete checkpoints of ended rows and leftovers; returns the bytes freed.

    Leftovers are folders of other studies that were moved aside, and unfinished files of dead
    workers.
    """
    name = ledger.study.study_name
    freed = sum(drop_checkpoints(row_folder(name, number)) for number in ledger.ended())
    study = row_folder(name, 0).parent
    for folder in study.iterdir() if study.is_dir() else ():
        if not folder.is_dir():
            continue
        if _ASIDE.fullmatch(folder.name):
            freed += sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            shutil.rmtree(folder)
        else:
            freed += _delete(_abandoned(folder))
    return freed


def _beyond(ledger: Ledger, keep: int) -> list[int]:
    """Complete trials whose students go, best first."""
    values, named = ledger.complete_values(), _named(ledger)
    ranked = sorted(values, key=lambda number: (values[number], number))
    return [number for number in ranked[keep:] if number not in named]


def _named(ledger: Ledger) -> set[int]:
    return set(ledger.attribute(KEPT) or [])


def _student_files(folder: Path) -> Sequence[Path]:
    return [folder / STUDENT, folder / _CARD]


def _abandoned(folder: Path) -> Iterator[Path]:
    old = time.time() - ABANDONED_SECONDS
    for path in folder.glob(".*.partial"):
        if path.is_file() and path.stat().st_mtime < old:
            yield path


def _delete(paths: Iterable[Path]) -> int:
    """Bytes freed; another process may delete the same meanwhile.

    What cannot be deleted stays, with a warning: it costs room and no result.
    """
    freed = 0
    for path in paths:
        try:
            size = path.stat().st_size
            path.unlink()
        except FileNotFoundError:
            continue
        except OSError as error:
            _log.warning("%s cannot be deleted: %s", path, error)
            continue
        freed += size
    return freed
