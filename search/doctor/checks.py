"""The doctor's checks, a function each: of this machine, a storage, a study's rows and files.

A check yields what it finds; an error that it raises is a finding too. A finding's ``repair``
sets it right without losing anything.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import sqlalchemy as sa
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from search.spec.study import StudySpec
from search.storage.engine import cache_folder, open_storage, redact, runs_folder, sqlite_file
from search.storage.leases import LEASE, RELEASED, TRIALS, RunningRow, database_clock
from search.storage.ledger import Ledger
from search.storage.rows import SYSTEM_ATTRIBUTES
from search.storage.schema import require_schema
from search.study.artifacts import artifact_store, artifacts_place, is_stored
from search.study.folders import named_file, row_folder
from search.study.retention import (
    ABANDONED_SECONDS,
    CHECKPOINT,
    IDENTITY,
    KEPT,
    RESULT,
    UNFINISHED_ROUND,
)
from search.study.study import FINGERPRINT, Study

Level: TypeAlias = Literal["ok", "warning", "problem", "mended"]

CLOCK_SECONDS = 5.0
SCARCE_BYTES, FULL_BYTES = 2**30, 64 * 2**20
APART_SECONDS = 60.0
_RIGHTS = ("SELECT", "INSERT", "UPDATE", "DELETE")
_ROW = re.compile(r"(\d{5,})(\.[0-9a-f]{8})?")
_ARTIFACT = "artifacts:"  # how Optuna begins the keys of what it knows of artifacts
_ASKED_AT_MOST = 50  # artifacts of a bucket, where each is asked for by itself


@dataclass(frozen=True, slots=True)
class Finding:
    """One answer to one check.

    Attributes:
        check: What was checked, in a word.
        level: ``problem``: something is wrong, or a launch would be refused. ``warning``: worth
            knowing, or set right by the next launch. ``mended``: it was repaired.
        text: What is so.
        advice: What to do.
        study: Which one it is about, if about one.
        repair: Sets it right, where that can be done.
    """

    check: str
    level: Level
    text: str
    advice: str = ""
    study: str = ""
    repair: Callable[[], object] | None = None

    def line(self) -> str:
        """For people."""
        about = f"{self.study}: " if self.study else ""
        advice = f"; {self.advice}" if self.advice else ""
        by_fix = " (--fix does it)" if self.repair is not None else ""
        return redact(f"{self.level:<8} {about}{self.check}: {self.text}{advice}{by_fix}")

    def as_dict(self) -> dict[str, Any]:
        """As ``--json`` prints it."""
        return {
            "check": self.check,
            "level": self.level,
            "study": self.study or None,
            "text": redact(self.text),
            "advice": redact(self.advice) or None,
            "can_be_mended": self.repair is not None,
        }


@dataclass(frozen=True, slots=True)
class Place:
    """A storage, opened for reading."""

    url: str
    storage: RDBStorage


@dataclass(frozen=True, slots=True)
class Subject:
    """A study opened for reading, its spec, and one of its ledgers."""

    study: Study
    spec: StudySpec
    ledger: Ledger

    def complete(self, key: str) -> dict[int, Any]:
        """Number -> attribute of each complete row."""
        rows = self.ledger.rows(TrialState.COMPLETE, keys=(key,))
        return {row.number: row.user_attrs.get(key) for row in rows}


# This machine.


def disks() -> Iterator[Finding]:
    """Room and rights where runs and cache lie."""
    for name, folder in (("runs", runs_folder()), ("cache", cache_folder())):
        place = folder.resolve()
        there = next(each for each in (place, *place.parents) if each.is_dir())
        try:
            with tempfile.TemporaryFile(dir=there) as file:
                file.write(b"\0")
        except OSError as error:
            text = f"{name} cannot be written at {there}: {error.strerror}"
            yield Finding("disk", "problem", text, f"set BDENSE_{name.upper()} elsewhere")
            continue
        free = shutil.disk_usage(there).free
        level: Level = "ok" if free > SCARCE_BYTES else "warning"
        text = f"{free / 2**30:.1f} GiB are free where {name} lie, {place}"
        advice = "" if level == "ok" else "bdense-search clean STUDY deletes trajectories"
        yield Finding("disk", "problem" if free < FULL_BYTES else level, text, advice)


def gpus() -> Iterator[Finding]:
    """Whether torch works, and which GPUs it sees."""
    try:
        found = _apart("gpus_here")
    except RuntimeError as error:
        yield Finding("GPUs", "problem", f"torch cannot be used: {error}", "reinstall torch")
    else:
        yield Finding("GPUs", "ok", ", ".join(found) or "torch sees none on this machine")


def gpus_here() -> list[str]:
    """Name and memory of each GPU that torch sees."""
    import torch

    names = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info(index))
        names.append(f"{torch.cuda.get_device_name(index)}, {free:.0f} of {total:.0f} GiB free")
    return names


def ray_cluster() -> Iterator[Finding]:
    """Whether the cluster of RAY_ADDRESS answers."""
    if not (address := os.environ.get("RAY_ADDRESS")):
        return
    try:
        found = _apart("nodes_of_ray")
    except RuntimeError as error:
        yield Finding("Ray", "problem", str(error), "correct RAY_ADDRESS, or unset it")
        return
    cpus, own = (sum(each.get(kind, 0) for each in found) for kind in ("CPU", "GPU"))
    text = f"the cluster at {address} has {len(found)} machines, {cpus:g} CPUs and {own:g} GPUs"
    yield Finding("Ray", "ok", text)


def nodes_of_ray() -> list[dict[str, float]]:
    """What each machine of the cluster has."""
    import ray

    from search.run.runner import quiet, ray_session
    from search.storage.engine import resolve_storage_url

    with quiet(), ray_session(resolve_storage_url(None)):
        nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in nodes if node["Alive"]]


def _apart(function: str) -> Any:  # noqa: ANN401  what JSON holds
    """Call one of the above in a process of its own, with which what hangs ends.

    Raises:
        RuntimeError: There is no answer; says why.
    """
    program = (
        f"import json; from search.doctor import checks as c; print(json.dumps(c.{function}()))"
    )
    asked = [sys.executable, "-c", program]
    try:
        done = subprocess.run(
            asked, capture_output=True, text=True, timeout=APART_SECONDS, check=True
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no answer within {APART_SECONDS:g} seconds") from None
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines() or [str(error)]
        raise RuntimeError(re.sub(r"^[\w.]+: ", "", said[-1])) from None
    return json.loads(done.stdout.splitlines()[-1])


def unfinished_files() -> Iterator[Finding]:
    """Files under runs and cache that were begun and never finished."""
    found = {*runs_folder().glob("*/*/.*.partial"), *cache_folder().rglob(".*.partial")}
    yield from _leftovers(sorted(filter(_is_abandoned, found)))


# A storage.


def schema(place: Place) -> Iterator[Finding]:
    """Whether our tables are of this version; Optuna's are, or the storage would not open."""
    require_schema(place.storage.engine, place.url)
    yield from ()


def server(place: Place) -> Iterator[Finding]:
    """Whether the database is whole."""
    with place.storage.engine.connect() as connection:
        is_file = sqlite_file(place.url) is not None
        asked = "PRAGMA quick_check(1)" if is_file else "SELECT version()"
        said = str(connection.exec_driver_sql(asked).scalar_one())
    if is_file and said != "ok":
        yield Finding("storage", "problem", f"it is damaged: {said}", "restore a backup")
    yield Finding("storage", "ok", f"{redact(place.url)} answers: {said}")


def rights(place: Place) -> Iterator[Finding]:
    """Whether this user may write."""
    path = sqlite_file(place.url)
    if path is not None:
        lacking = [f"write {each}" for each in (path, path.parent) if not os.access(each, os.W_OK)]
        who = "this user may not"
        advice = "correct the rights of the file and its folder"
    else:
        asked = sa.text("SELECT has_table_privilege(quote_ident(:table), :right)")
        with place.storage.engine.connect() as connection:
            user = connection.exec_driver_sql("SELECT current_user").scalar_one()
            tables = sorted(sa.inspect(connection).get_table_names())
            lacking = [
                f"{right} on {table}"
                for table in tables
                for right in _RIGHTS
                if not connection.execute(asked, {"table": table, "right": right}).scalar_one()
            ]
            if connection.exec_driver_sql("SELECT pg_is_in_recovery()").scalar_one():
                lacking = ["the primary server: this is a standby"]
        who = f"user {user} lacks"
        advice = "launch as another user, or ask for: bdense-search storage init --writer"
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        text = f"{who} {lacking[0]}{more}: it can look, and launch nothing"
        yield Finding("rights", "problem", text, advice)


def clock(place: Place) -> Iterator[Finding]:
    """How far this machine's clock is from the database's, which leases go by."""
    engine = place.storage.engine
    with engine.connect() as connection:
        apart = connection.execute(sa.select(database_clock(engine))).scalar_one() - time.time()
    if abs(apart) > CLOCK_SECONDS:
        text = f"the database's clock is {abs(apart):.0f} s {'ahead' if apart > 0 else 'behind'}"
        yield Finding("clock", "warning", text, "set the clocks, or the times shown are wrong")


# A study, and one of its ledgers.


def leases(of: Subject) -> Iterator[Finding]:
    """Rows whose worker is dead."""
    for row in of.ledger.running_rows():
        if not row.adoptable or (row.process is not None and not row.owner):
            continue  # it is worked on, or was given back
        if row.process is None:
            why, repair = "was never taken by a worker: the process that asked for it died", None
        else:
            worker = f"{row.process.host}:{row.process.pid}"
            ended = "is dead" if row.process.is_seen_dead() else "has not renewed its lease"
            why = f"its worker {worker} (attempt {row.attempt}) {ended}"
            repair = partial(_free, of, row)
        text = f"trial {row.number}: {why}"
        yield Finding("leases", "warning", text, "a launch takes it over", repair=repair)


def conditions(of: Subject) -> Iterator[Finding]:
    """Whether rows were measured under the study's conditions, and this machine would, too."""
    expected = of.study.main.attribute(FINGERPRINT)
    others = [number for number, each in of.complete("fingerprint").items() if each != expected]
    if others:
        text = f"{_numbers(others)} measured under other conditions: their FIDs do not compare"
        yield Finding("conditions", "problem", text, "launch the study under another name")
    if of.ledger is of.study.main and (mine := of.spec.fingerprint()) != expected:
        yield Finding(
            "conditions",
            "problem",
            f"this bdense measures under other conditions (fingerprint {mine}) than the study "
            f"({expected}): it would be refused as a worker",
            "use the version that launched it, and restore its teacher and data",
        )


def versions(of: Subject) -> Iterator[Finding]:
    """Whether rows were measured by different versions of packages."""
    for line in of.ledger.differing_versions():
        yield Finding("versions", "warning", line, "the last digits of FIDs may differ")


def results(of: Subject) -> Iterator[Finding]:
    """Whether complete rows have their results, and those that should their students."""
    folder, students = _folder(of), of.complete("student")
    if not students:
        return
    if not folder.is_dir():
        text = f"none of {len(students)} complete rows has files here: there is no {folder}"
        advice = "set BDENSE_RUNS to the folder that its workers wrote to, or restore it"
        yield Finding("files", "problem", text, advice)
        return
    values = of.ledger.complete_values()
    stored = {number: _value_in(folder / f"{number:05d}" / RESULT) for number in values}
    restore = "restore the runs folder from a backup; the database has the FIDs"
    if other := [number for number, value in stored.items() if value != values[number]]:
        text = f"{_numbers(other)} without {RESULT}, or with another FID in it"
        yield Finding("files", "problem", text, restore)
    kept = set(values)
    if of.ledger is of.study.trials:
        ranked = sorted(values, key=lambda number: (values[number], number))
        kept = {*ranked[: of.spec.keep_students], *(of.ledger.attribute(KEPT) or ())}
    files = {number: named_file(students[number]) for number in kept if students.get(number)}
    if lost := sorted(number for number, file in files.items() if not file.is_file()):
        yield Finding("files", "problem", f"{_numbers(lost)} without its student's file", restore)


def leftovers(of: Subject) -> Iterator[Finding]:
    """Checkpoints of rows that have ended."""
    found, asked = [], of.ledger.asked()
    for number in of.ledger.ended():
        folder = _folder(of) / f"{number:05d}"
        paths = [*folder.glob(CHECKPOINT), *folder.glob(f"*{UNFINISHED_ROUND}")]
        if paths and _is_own(of, asked[number], folder):
            found += paths
    yield from _leftovers(found)


def folders(of: Subject) -> Iterator[Finding]:
    """Folders of no row: of a study that was deleted from the database, or moved aside for it."""
    known, folder = range(len(of.ledger.asked())), _folder(of)
    entries = os.scandir(folder) if folder.is_dir() else ()
    matches = [match for entry in entries if (match := _ROW.fullmatch(entry.name))]
    strange = sorted(m[0] for m in matches if m[2] or int(m[1]) not in known)
    if strange:
        text = f"{len(strange)} folders are of no row of this database, as {folder / strange[0]}"
        advice = "if no other database's study has this name, delete them"
        yield Finding("folders", "warning", text, advice)


def artifacts(of: Subject) -> Iterator[Finding]:
    """Whether the pictures that rows have in the database are in the artifact store."""
    query = (
        sa.select(TRIALS.c.number, SYSTEM_ATTRIBUTES.c.key)
        .join_from(TRIALS, SYSTEM_ATTRIBUTES, SYSTEM_ATTRIBUTES.c.trial_id == TRIALS.c.trial_id)
        .where(
            TRIALS.c.study_id == of.ledger.study._study_id,
            SYSTEM_ATTRIBUTES.c.key.startswith(_ARTIFACT, autoescape=True),
        )
        .order_by(TRIALS.c.number)
    )
    with of.ledger.storage.engine.connect() as connection:
        known = [
            (row.number, row.key.removeprefix(_ARTIFACT)) for row in connection.execute(query)
        ]
    place = artifacts_place()
    try:
        store = artifact_store(place)
        asked = known[-_ASKED_AT_MOST:] if "://" in place else known
        lost = [number for number, key in asked if not is_stored(store, key)]
    except Exception as error:  # noqa: BLE001  the store's own, whichever it is
        yield Finding("artifacts", "problem", f"{place}: {error}", "check BDENSE_ARTIFACTS")
        return
    if lost:
        text = f"{_numbers(sorted(set(lost)))} with pictures that are not in {place}"
        advice = "set BDENSE_ARTIFACTS to where they are, or restore them"
        yield Finding("artifacts", "warning", text, advice)


MACHINE = (disks, gpus, ray_cluster, unfinished_files)
STORAGE = (schema, server, rights, clock)
STUDY = (leases, conditions, versions, results, leftovers, folders, artifacts)


def _folder(of: Subject) -> Path:
    return row_folder(of.ledger.study.study_name, 0).parent.resolve()


def _free(of: Subject, row: RunningRow) -> None:
    """Give a dead worker's row back, unless it was renewed or taken meanwhile."""
    engine = open_storage(of.study.url).engine
    over = LEASE.c.expires < database_clock(engine)
    if row.process is not None and row.process.is_seen_dead():
        over = sa.true()
    mine = (LEASE.c.owner == row.owner, LEASE.c.attempt == row.attempt)
    with engine.begin() as connection:
        connection.execute(
            sa.update(LEASE)
            .values(expires=RELEASED, owner="")
            .where(LEASE.c.trial_id == row.trial_id, *mine, over)
        )


def _value_in(path: Path) -> float | None:
    try:
        return float(json.loads(path.read_bytes())["value"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_own(of: Subject, params: dict[str, Any], folder: Path) -> bool:
    """Whether a folder is the row's: another database's study may have taken it."""
    try:
        stored = json.loads((folder / IDENTITY).read_bytes())
    except (OSError, ValueError):
        return False
    fingerprint = of.study.main.attribute(FINGERPRINT)
    expected = of.study.task(of.ledger, params).identity() | {"fingerprint": fingerprint}
    return bool(stored == json.loads(json.dumps(expected)))


def _is_abandoned(path: Path) -> bool:
    try:
        return path.is_file() and time.time() - path.stat().st_mtime > ABANDONED_SECONDS
    except FileNotFoundError:  # it was finished meanwhile
        return False


def _leftovers(found: list[Path]) -> Iterator[Finding]:
    if found:
        size = sum(path.stat().st_size for path in found if path.is_file()) / 2**20
        text = f"{len(found)} checkpoints and unfinished files, {size:.1f} MiB, as {found[0]}"
        repair = partial(_delete, found)
        yield Finding("leftovers", "warning", text, "delete them", repair=repair)


def _delete(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _numbers(numbers: list[int]) -> str:
    """At most five of them, as in 'complete rows 1, 2'."""
    more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
    shown = ", ".join(map(str, numbers[:5]))
    return f"row{'s' if len(numbers) > 1 else ''} {shown}{more}"
