"""What the doctor looks at under the runs folder: does each row have the files it should have.

It deletes what a finished row left behind of its training, never a result or a student, and
nothing in a folder that another database's row has.
"""

import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from optuna.trial import TrialState

from bdense.errors import InputError
from search.doctor.finding import Finding, first_of, problem, warning
from search.doctor.rows import Subject
from search.storage.engine import cache_folder, runs_folder
from search.storage.leases import STATE, TRIALS, USER_ATTRIBUTES
from search.storage.rows import VALUES, Rows
from search.study.folders import GRID, row_folder
from search.study.retention import (
    ABANDONED_SECONDS,
    CHECKPOINT,
    IDENTITY,
    KEPT,
    RESULT,
    UNFINISHED_ROUND,
)
from search.study.study import ARMS, FINGERPRINT

_CHECKPOINT = re.compile(rf"{re.escape(CHECKPOINT)}$|.*{re.escape(UNFINISHED_ROUND)}$")
_PARTIAL = re.compile(r"\..*\.partial$")
_ROW = re.compile(r"(\d{5,})(\.[0-9a-f]{8})?$")
_ENDED = {TrialState.COMPLETE.name, TrialState.PRUNED.name, TrialState.FAIL.name}


@dataclass
class _Seen:
    """Numbers of rows by what is wrong with their files."""

    without_result: list[int] = field(default_factory=list)
    other_value: list[int] = field(default_factory=list)
    without_student: list[int] = field(default_factory=list)
    without_pictures: list[int] = field(default_factory=list)
    checkpoints: dict[int, list[Path]] = field(default_factory=dict)
    abandoned: list[Path] = field(default_factory=list)


def check_files(engine: sa.Engine, of: Subject) -> Iterator[Finding]:
    """Everything about one study that its folder tells."""
    try:
        folder = row_folder(of.name, 0).parent
    except InputError as error:
        yield problem("files", str(error))
        return
    rows = _rows(engine, of)
    complete = [row.number for row in rows if row.state == TrialState.COMPLETE.name]
    if complete and not folder.is_dir():
        yield problem(
            "files",
            f"none of its {len(complete)} complete rows has files here: there is no folder "
            f"{folder.resolve()}",
            "set BDENSE_RUNS to the folder that its workers wrote to, or restore it",
        )
        return
    if not folder.is_dir():
        return
    there = {entry.name: Path(entry) for entry in os.scandir(folder) if entry.is_dir()}
    kept, seen = _kept(of, rows), _Seen()
    for row in rows:
        if row.state in _ENDED and (place := there.get(f"{row.number:05d}")) is not None:
            names = set(os.listdir(place))  # noqa: PTH208  10,000 folders: no Path for each file
            _check_row(row, place, names, of, seen, has_student=row.number in kept)
        elif row.state == TrialState.COMPLETE.name:
            seen.without_result.append(row.number)
    yield from _missing(seen)
    own = _own(engine, of, seen.checkpoints) if seen.checkpoints else {}
    yield from _leftovers([*(path for paths in own.values() for path in paths), *seen.abandoned])
    yield from _taken(sorted(seen.checkpoints.keys() - own.keys()))
    yield from _strangers(there, {row.number for row in rows})


def check_cache() -> Iterator[Finding]:
    """Files that were begun and never became whole, under the cache folder."""
    cache = cache_folder()
    if cache.is_dir():
        yield from _leftovers(list(filter(_is_abandoned, cache.rglob(".*.partial"))))


def _is_abandoned(path: Path) -> bool:
    try:
        age = time.time() - path.stat().st_mtime
    except FileNotFoundError:  # it has become whole
        return False
    return path.is_file() and age > ABANDONED_SECONDS


def _rows(engine: sa.Engine, of: Subject) -> list[sa.Row[tuple[int, str, float, str]]]:
    value = sa.and_(VALUES.c.trial_id == TRIALS.c.trial_id, VALUES.c.objective == 0)
    student = sa.and_(
        USER_ATTRIBUTES.c.trial_id == TRIALS.c.trial_id, USER_ATTRIBUTES.c.key == "student"
    )
    query = (
        sa.select(
            TRIALS.c.number,
            STATE.label("state"),
            VALUES.c.value,
            USER_ATTRIBUTES.c.value_json.label("student"),
        )
        .select_from(TRIALS.outerjoin(VALUES, value).outerjoin(USER_ATTRIBUTES, student))
        .where(TRIALS.c.study_id == of.key)
        .order_by(TRIALS.c.number)
    )
    with engine.connect() as connection:
        return list(connection.execute(query))


def _kept(of: Subject, rows: list[sa.Row[tuple[int, str, float, str]]]) -> set[int]:
    """Rows whose students are to be there: of a search its best and those that were named."""
    values = {row.number: row.value for row in rows if row.state == TrialState.COMPLETE.name}
    keep = len(values) if of.is_planned else of.spec.get("keep_students", 0)
    named = set(of.attributes.get(KEPT) or ()) & values.keys()
    return {*sorted(values, key=lambda number: (values[number], number))[:keep], *named}


def _check_row(
    row: sa.Row[tuple[int, str, float, str]],
    place: Path,
    names: set[str],
    of: Subject,
    seen: _Seen,
    *,
    has_student: bool,
) -> None:
    if checkpoints := [place / name for name in names if _CHECKPOINT.match(name)]:
        seen.checkpoints[row.number] = checkpoints
    partial_files = (place / name for name in names if _PARTIAL.match(name))
    seen.abandoned += filter(_is_abandoned, partial_files)
    if row.state != TrialState.COMPLETE.name:
        return
    if RESULT not in names:
        seen.without_result.append(row.number)
    elif _value_in(place / RESULT) != row.value:
        seen.other_value.append(row.number)
    if not any(name.endswith(GRID) for name in names):
        seen.without_pictures.append(row.number)
    if has_student and row.student is not None:
        student = runs_folder() / json.loads(row.student)
        if not student.is_file():
            seen.without_student.append(row.number)


def _value_in(path: Path) -> float | None:
    try:
        return float(json.loads(path.read_bytes())["value"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _missing(seen: _Seen) -> Iterator[Finding]:
    restore = "restore the runs folder from a backup; the FID itself is in the database"
    if seen.without_result:
        yield problem("files", f"complete {first_of(seen.without_result)} lack {RESULT}", restore)
    if seen.other_value:
        yield problem(
            "files",
            f"the FID of {first_of(seen.other_value)} is not that of its {RESULT}",
            "one of them was changed by hand, or the folder is another database's: restore both "
            "from one backup",
        )
    if seen.without_student:
        yield problem(
            "files",
            f"{first_of(seen.without_student)} should have a student's file and does not",
            "export and bdense sample cannot use it: restore the file, or train its weights again "
            "by bdense distill",
        )
    if seen.without_pictures:
        yield warning("files", f"complete {first_of(seen.without_pictures)} lack {GRID}", restore)


def _own(
    engine: sa.Engine, of: Subject, checkpoints: dict[int, list[Path]]
) -> dict[int, list[Path]]:
    """Those in folders that are the rows' own: another database's study may have taken them."""
    query = (
        sa.select(TRIALS.c.number, USER_ATTRIBUTES.c.value_json)
        .select_from(TRIALS.join(USER_ATTRIBUTES, USER_ATTRIBUTES.c.trial_id == TRIALS.c.trial_id))
        .where(TRIALS.c.study_id == of.key, USER_ATTRIBUTES.c.key == "fingerprint")
    )
    with engine.connect() as connection:
        fingerprints = {
            row.number: json.loads(row.value_json) for row in connection.execute(query)
        }
    # A row that was given up before anybody told has none of its own.
    default = ((of.parent if of.is_baselines else of.attributes) or {}).get(FINGERPRINT)
    asked = [params for params, _ in Rows(engine, of.key).asked()]
    own = {}
    for number, paths in checkpoints.items():
        if _is_own(of, asked[number], fingerprints.get(number, default), paths[0].parent):
            own[number] = paths
    return own


def _is_own(of: Subject, params: dict[str, Any], fingerprint: str | None, folder: Path) -> bool:
    """Whether a folder's mark is of the row with these parameters."""
    stored = _stored_identity(folder)
    if not isinstance(stored, dict):
        return False
    arms = of.attributes.get(ARMS)
    expected = arms[params["arm"]]["params"] if arms else params
    return bool(stored.get("params") == expected and stored.get("fingerprint") == fingerprint)


def _stored_identity(folder: Path) -> object:
    try:
        return json.loads((folder / IDENTITY).read_bytes())
    except (OSError, ValueError):
        return None


def _taken(numbers: list[int]) -> Iterator[Finding]:
    if numbers:
        yield warning(
            "folders",
            f"there are checkpoints in the folders of {first_of(numbers)}, which have ended, and "
            f"by {IDENTITY} beside them they are another study's of this name",
            "give the study of the other database another name, or another BDENSE_RUNS",
        )


def _leftovers(paths: list[Path]) -> Iterator[Finding]:
    if not paths:
        return
    size = sum(path.stat().st_size for path in paths if path.is_file())
    yield warning(
        "leftovers",
        f"{len(paths)} checkpoints and unfinished files that nobody needs, {size / 2**20:.1f} "
        f"MiB, as {paths[0]}",
        "delete them",
        partial(_delete, paths),
    )


def _delete(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _strangers(there: dict[str, Path], numbers: set[int]) -> Iterator[Finding]:
    """Folders of no row: of a study deleted from the database, or moved aside for its sake."""
    strange = sorted(
        name
        for name in there
        if (found := _ROW.match(name)) and (found[2] or int(found[1]) not in numbers)
    )
    if strange:
        place = there[strange[0]]
        yield warning(
            "folders",
            f"{len(strange)} folders are of no row of this database, as {place}",
            "if no other database's study has this name, delete them",
        )
