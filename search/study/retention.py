"""Which files of a row are kept once it has ended.

Its result, log and pictures are, some 0.3 MB. Students are large: a search keeps its best and
those that are named. Checkpoints are deleted.
"""

import logging
import re
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from bdense.files import UNFINISHED
from search.storage.ledger import Ledger
from search.study.folders import row_folder, study_folder

IDENTITY, RESULT = "trial.json", "result.json"
INTERMEDIATE_FILE = "intermediate.json"
STUDENT, CHECKPOINT = "student.safetensors", "checkpoint.safetensors"
KEPT = "kept_students"  # the study's attribute: numbers of trials

_log = logging.getLogger(__name__)

_ASIDE = re.compile(r"\d{5,}\.[0-9a-f]{8}")  # as search.worker.result moves folders aside
UNFINISHED_FILE = ".*.partial"  # as bdense.files names it
ABANDONED_SECONDS = 3600.0
# Ranks after the best that are cleaned when a trial ends: more than trials that end at once.
_MARGIN = 64


def keep_best_students(ledger: Ledger, keep: int, ended: int) -> None:
    """At the end of a trial of a search, delete students behind the best ``keep``."""
    beyond = ledger.ranked_after(keep, _MARGIN, also=ended)
    for number in set(beyond) - named_students(ledger):
        _delete(student_files(row_folder(ledger.name, number)))


def keep_too(ledger: Ledger, numbers: Iterable[int]) -> None:
    """Never delete these trials' students."""
    named = set(numbers)
    ledger.change(KEPT, lambda old: sorted({*(old or []), *named}))


def named_students(ledger: Ledger) -> set[int]:
    """The trials that ``keep_too`` named."""
    return set(ledger.attribute(KEPT) or [])


def clean_students(ledger: Ledger, keep: int) -> int:
    """Delete every student of a search that is not to be kept; bytes freed."""
    complete = ledger.complete_values().keys()
    gone = complete - best_numbers(ledger, keep) - named_students(ledger)
    return sum(_delete(student_files(row_folder(ledger.name, number))) for number in gone)


def best_numbers(ledger: Ledger, keep: int) -> set[int]:
    """The best ``keep`` trials; each has its student, which a named one may have lost before."""
    return set(ledger.ranked_after(0, keep, also=-1))


def drop_checkpoints(folder: Path) -> int:
    """Delete the checkpoint of a row that has ended; bytes freed."""
    return _delete(checkpoints(folder))


def checkpoints(folder: Path) -> list[Path]:
    """A row's checkpoints: of its training, and of a round that is not finished."""
    return [*folder.glob(CHECKPOINT), *folder.glob(f"*{UNFINISHED}")]


def is_abandoned(path: Path) -> bool:
    """Whether an unfinished file is so old that its worker must be dead."""
    try:
        return path.is_file() and time.time() - path.stat().st_mtime > ABANDONED_SECONDS
    except FileNotFoundError:  # it was finished meanwhile
        return False


def clean_checkpoints(ledger: Ledger) -> int:
    """Delete checkpoints of ended rows, folders moved aside, and unfinished files; bytes freed."""
    name = ledger.name
    freed = sum(drop_checkpoints(row_folder(name, number)) for number in ledger.ended())
    study = study_folder(name)
    for folder in study.iterdir() if study.is_dir() else ():
        if not folder.is_dir():
            continue
        if _ASIDE.fullmatch(folder.name):
            freed += sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            shutil.rmtree(folder)
        else:
            freed += _delete(filter(is_abandoned, folder.glob(UNFINISHED_FILE)))
    return freed


def student_files(folder: Path) -> list[Path]:
    """A row's students with their cards: one, or one of each stage."""
    models = [
        path
        for path in folder.glob("*.safetensors")
        if path.name != CHECKPOINT and not path.name.endswith(UNFINISHED)
    ]
    return models + [path.with_suffix(".md") for path in models]


def _delete(paths: Iterable[Path]) -> int:
    """Bytes freed; a file that cannot be deleted is only worth a warning."""
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
