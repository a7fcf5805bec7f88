"""``bdense-search doctor``: checks of this machine, a storage, and a study's rows and files.

Each check yields its findings; an error that it raises is a finding too. Checks change nothing. A
finding's repair frees what dead workers hold or deletes what ended rows left behind; it never
touches a trial, a result or a student.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import sqlalchemy as sa
from optuna.storages import RDBStorage

from bdense.errors import BdenseError
from search.child import in_child
from search.errors import StorageError, UnknownStudyError
from search.places import cache_folder, runs_folder
from search.redaction import redact
from search.run.machine import ray_folder_problems, refusal
from search.spec.study import StudySpec
from search.storage.engine import (
    DATABASE_ERRORS,
    one_line,
    open_reading,
    open_storage,
    sqlite_file,
)
from search.storage.leases import RunningRow, database_clock
from search.storage.ledger import Ledger
from search.storage.own_study import BASELINES_SUFFIX, unknown_study
from search.storage.schema import require_schema
from search.storage.tables import LEASE, RELEASED, STUDIES, SYSTEM_ATTRIBUTES, TRIALS
from search.study.artifacts import artifact_store, artifacts_place, is_stored
from search.study.folders import named_file, row_folder, study_folder
from search.study.retention import (
    RESULT,
    UNFINISHED_FILE,
    best_numbers,
    checkpoints,
    is_abandoned,
)
from search.study.study import FINGERPRINT, Study
from search.study.summary import foreign_rows
from search.worker.result import is_folder_of

Level: TypeAlias = Literal["ok", "warning", "problem", "mended"]

_ERRORS = (BdenseError, *DATABASE_ERRORS, OSError)
SCARCE_BYTES, FULL_BYTES = 2**30, 64 * 2**20
CHILD_SECONDS = 60.0  # for torch or Ray, which may hang
_PRIVILEGES = ("SELECT", "INSERT", "UPDATE", "DELETE")
_ARTIFACT = "artifacts:"  # how Optuna begins the keys of what it knows of artifacts
_ASKED_AT_MOST = 50  # artifacts of a bucket, where each is asked for by itself


@dataclass(frozen=True, slots=True)
class Finding:
    """One answer to one check.

    Attributes:
        level: ``problem``: something is wrong, or a launch would be refused. ``warning``: worth
            knowing, or set right by the next launch. ``mended``: it was repaired.
        text: What was found.
        advice: What to do.
        repair: Repairs it without losing anything; None where that needs the user.
        check: Name of the check.
        study: Name of the study, if it is about one.
    """

    level: Level
    text: str
    advice: str = ""
    repair: Callable[[], object] | None = None
    check: str = ""
    study: str = ""

    def repaired(self) -> "Finding":
        """Repair it, and return what is left to say; itself, where that needs the user."""
        if self.repair is None:
            return self
        try:
            self.repair()
        except _ERRORS as error:
            text = f"{self.text}; repairing failed: {one_line(error)}"
            return replace(self, level="problem", text=text, repair=None)
        return replace(self, level="mended", advice="", repair=None)

    def line(self) -> str:
        """The finding for people."""
        about = f"{self.study}: " if self.study else ""
        advice = f"; {self.advice}" if self.advice else ""
        by_fix = " (--fix does it)" if self.repair is not None else ""
        return redact(f"{self.level:<8} {about}{self.check}: {self.text}{advice}{by_fix}")

    def as_dict(self) -> dict[str, Any]:
        """The form that ``--json`` prints."""
        return {
            "check": self.check,
            "level": self.level,
            "study": self.study or None,
            "text": redact(self.text),
            "advice": redact(self.advice) or None,
            "can_be_mended": self.repair is not None,
        }


@dataclass(frozen=True, slots=True)
class Subject:
    """A study opened for reading, its spec, and one of its ledgers."""

    study: Study
    spec: StudySpec
    ledger: Ledger

    @property
    def name(self) -> str:
        """Name of the ledger's Optuna study."""
        return self.ledger.name

    def row(self, number: int) -> Path:
        """A row's folder."""
        return row_folder(self.name, number).resolve()

    def complete(self, key: str) -> dict[int, Any]:
        """Number -> attribute of each complete row."""
        rows = self.ledger.rows(keys=(key,))
        return {row.number: row.user_attrs.get(key) for row in rows}


Findings: TypeAlias = Iterator[Finding]


# This machine.


def disks() -> Findings:
    """Free space and write access of the folders of runs and cache."""
    for name, folder in (("runs", runs_folder()), ("cache", cache_folder())):
        place = folder.resolve()
        if why := refusal(place):
            text = f"{name} cannot be written at {place}: {why}"
            yield Finding("problem", text, f"set BDENSE_{name.upper()} elsewhere")
            continue
        there = next(each for each in (place, *place.parents) if each.is_dir())
        free = shutil.disk_usage(there).free
        text = f"{free / 2**30:.1f} GiB free for {name}, in {place}"
        if free > SCARCE_BYTES:
            yield Finding("ok", text)
        else:
            level: Level = "problem" if free < FULL_BYTES else "warning"
            yield Finding(level, text, "bdense-search clean STUDY deletes trajectories")


def gpus() -> Findings:
    """Whether torch works, and which GPUs it sees."""
    try:
        found = in_child(_gpus_here, CHILD_SECONDS, quiet=True)
    except Exception as error:  # noqa: BLE001  torch's own, whichever it is
        yield Finding("problem", f"torch cannot be used: {one_line(error)}", "reinstall torch")
    else:
        yield Finding("ok", ", ".join(found) or "torch sees none on this machine")


def _gpus_here() -> list[str]:
    """Name and memory of each GPU that torch sees."""
    import torch

    names = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info(index))
        names.append(f"{torch.cuda.get_device_name(index)}, {free:.0f} of {total:.0f} GiB free")
    return names


def ray_cluster() -> Findings:
    """Whether the cluster of RAY_ADDRESS answers, or a Ray of this machine's own could start."""
    for problem in ray_folder_problems():
        yield Finding("problem", problem)
    if not (address := os.environ.get("RAY_ADDRESS")):
        return
    try:
        found = in_child(_nodes_of_ray, CHILD_SECONDS, quiet=True)
    except Exception as error:  # noqa: BLE001  Ray's own, whichever it is
        yield Finding("problem", one_line(error), "correct RAY_ADDRESS, or unset it")
        return
    cpus, own = (sum(each.get(kind, 0) for each in found) for kind in ("CPU", "GPU"))
    text = f"the cluster at {address} has {len(found)} machines, {cpus:g} CPUs and {own:g} GPUs"
    yield Finding("ok", text)


def _nodes_of_ray() -> list[dict[str, float]]:
    """Resources of each machine of the cluster."""
    import ray

    from search.run.runner import ray_session
    from search.storage.engine import resolve_storage_url

    with ray_session(resolve_storage_url(None)):
        nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in nodes if node["Alive"]]


def unfinished_files() -> Findings:
    """Files under runs and cache that were begun and never finished."""
    found = {*runs_folder().glob(f"*/*/{UNFINISHED_FILE}"), *cache_folder().rglob(UNFINISHED_FILE)}
    yield from _leftovers(sorted(filter(is_abandoned, found)))


# A storage.


def schema(url: str, storage: RDBStorage) -> Findings:
    """Whether our tables have this version; Optuna's have, or the storage would not open."""
    require_schema(storage.engine, url)
    yield from ()


def server(url: str, storage: RDBStorage) -> Findings:
    """Whether the database is whole."""
    is_file = sqlite_file(url) is not None
    query = "PRAGMA quick_check(1)" if is_file else "SELECT version()"
    with storage.engine.connect() as connection:
        answer = str(connection.exec_driver_sql(query).scalar_one())
    if is_file and answer != "ok":
        yield Finding("problem", f"it is damaged: {answer}", "restore a backup")
    yield Finding("ok", f"{redact(url)} answers: {answer}")


def rights(url: str, storage: RDBStorage) -> Findings:
    """Whether this user may write."""
    path = sqlite_file(url)
    if path is not None:
        lacking = [f"write {each}" for each in (path, path.parent) if not os.access(each, os.W_OK)]
        who = "this user may not"
        advice = "correct the rights of the file and its folder"
    else:
        query = sa.text("SELECT has_table_privilege(quote_ident(:table), :right)")
        with storage.engine.connect() as connection:
            user = connection.exec_driver_sql("SELECT current_user").scalar_one()
            lacking = [
                f"{right} on {table}"
                for table in sorted(sa.inspect(connection).get_table_names())
                for right in _PRIVILEGES
                if not connection.execute(query, {"table": table, "right": right}).scalar_one()
            ]
            if connection.exec_driver_sql("SELECT pg_is_in_recovery()").scalar_one():
                text = "the database is a standby: studies can be read, and none launched"
                yield Finding("problem", text, "give the address of the primary server")
                return
        # The storage's own connections are set to read alone.
        with sa.create_engine(storage.engine.url, poolclass=sa.NullPool).connect() as connection:
            if connection.exec_driver_sql("SHOW default_transaction_read_only").scalar() == "on":
                lacking.append("a default_transaction_read_only of off, which is on here")
        who = f"user {user} lacks"
        advice = "launch as another user, or ask for: bdense-search storage init --writer"
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        text = f"{who} {lacking[0]}{more}: it can read studies, and launch nothing"
        yield Finding("problem", text, advice)


# A study, and one of its ledgers.


def leases(subject: Subject) -> Findings:
    """Whether rows are held by dead workers."""
    for row in subject.ledger.running_rows():
        if not row.adoptable or (row.process is not None and not row.owner):
            continue  # a worker has it, or gave it back
        if row.process is None:
            why, repair = "was never taken by a worker: the process that asked for it died", None
        else:
            ended = "is dead" if row.process.is_seen_dead() else "has not renewed its lease"
            why = f"its worker {row.worker} (attempt {row.attempt}) {ended}"
            repair = partial(_free, subject, row)
        yield Finding("warning", f"trial {row.number}: {why}", "a launch takes it over", repair)


def conditions(subject: Subject) -> Findings:
    """Whether rows were measured under the study's conditions, and this machine would, too."""
    expected = subject.study.main.attribute(FINGERPRINT)
    others = [
        number for number, each in subject.complete("fingerprint").items() if each != expected
    ]
    if others:
        text = f"{_numbers(others)} measured under other conditions: their FIDs do not compare"
        yield Finding("problem", text, "launch the study under another name")
    if subject.ledger is subject.study.main and (mine := subject.spec.fingerprint()) != expected:
        yield Finding(
            "problem",
            f"this bdense measures under other conditions (fingerprint {mine}) than the study "
            f"({expected}): it would be refused as a worker",
            "use the version that launched it, and restore its teacher and data",
        )


def foreign(subject: Subject) -> Findings:
    """Whether another program added rows."""
    if rows := foreign_rows(subject.ledger):
        yield Finding("warning", rows, "add points by: bdense-search enqueue")


def versions(subject: Subject) -> Findings:
    """Whether rows were measured by different versions of packages."""
    for line in subject.ledger.differing_versions():
        yield Finding("warning", line, "the last digits of FIDs may differ")


def files(subject: Subject) -> Findings:
    """Whether complete rows have result files, and kept ones their student."""
    students = subject.complete("student")
    if not students:
        return
    if not (folder := study_folder(subject.name).resolve()).is_dir():
        text = f"none of {len(students)} complete rows has files here: there is no {folder}"
        advice = "set BDENSE_RUNS to the folder that its workers wrote to, or restore it"
        yield Finding("problem", text, advice)
        return
    values = subject.ledger.complete_values()
    stored = {number: _value_in(subject.row(number) / RESULT) for number in values}
    restore = "restore the runs folder from a backup; the database has the FIDs"
    if other := [number for number, value in stored.items() if value != values[number]]:
        text = f"{_numbers(other)} without {RESULT}, or with another FID in it"
        yield Finding("problem", text, restore)
    kept = set(values)
    if subject.ledger is subject.study.trials:
        kept = best_numbers(subject.ledger, subject.spec.keep_students)
    named = {number: named_file(students[number]) for number in kept if students.get(number)}
    if lost := sorted(number for number, file in named.items() if not file.is_file()):
        yield Finding("problem", f"{_numbers(lost)} without its student's file", restore)


def leftovers(subject: Subject) -> Findings:
    """Whether rows that have ended left checkpoints."""
    study, ledger, found = subject.study, subject.ledger, []
    asked, fingerprint = ledger.asked(), study.main.attribute(FINGERPRINT)
    for number in ledger.ended():
        folder = subject.row(number)
        if paths := checkpoints(folder):
            identity = study.task(ledger, asked[number]).identity(fingerprint)
            # Another database's study may have taken the folder; what cannot be read stays.
            with contextlib.suppress(OSError):
                found += paths if is_folder_of(folder, identity) else []
    yield from _leftovers(found)


def artifacts(subject: Subject) -> Findings:
    """Whether the pictures that rows have in the database are in the artifact store."""
    query = (
        sa.select(TRIALS.c.number, SYSTEM_ATTRIBUTES.c.key)
        .join_from(TRIALS, SYSTEM_ATTRIBUTES, SYSTEM_ATTRIBUTES.c.trial_id == TRIALS.c.trial_id)
        .where(
            TRIALS.c.study_id == subject.ledger.key,
            SYSTEM_ATTRIBUTES.c.key.startswith(_ARTIFACT, autoescape=True),
        )
        .order_by(TRIALS.c.number)
    )
    with subject.ledger.storage.engine.connect() as connection:
        known = [
            (row.number, row.key.removeprefix(_ARTIFACT)) for row in connection.execute(query)
        ]
    place = artifacts_place()
    try:
        store = artifact_store(place)
        asked = known[-_ASKED_AT_MOST:] if "://" in place else known
        lost = [number for number, key in asked if not is_stored(store, key)]
    except Exception as error:  # noqa: BLE001  the store's own, whichever it is
        yield Finding("problem", f"{place}: {error}", "check BDENSE_ARTIFACTS")
        return
    if lost:
        text = f"{_numbers(sorted(set(lost)))} with pictures that are not in {place}"
        yield Finding("warning", text, "set BDENSE_ARTIFACTS to where they are, or restore them")


def _free(subject: Subject, row: RunningRow) -> None:
    """Give a dead worker's row back, unless it was renewed or taken meanwhile."""
    engine = open_storage(subject.study.url).engine
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


def _leftovers(found: list[Path]) -> Findings:
    if found:
        size = sum(path.stat().st_size for path in found if path.is_file()) / 2**20
        text = f"{len(found)} checkpoints and unfinished files, {size:.1f} MiB, as {found[0]}"
        yield Finding("warning", text, "delete them", partial(_delete, found))


def _delete(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _numbers(numbers: list[int]) -> str:
    """At most five of them, as in 'rows 1, 2'."""
    more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
    shown = ", ".join(map(str, numbers[:5]))
    return f"row{'s' if len(numbers) > 1 else ''} {shown}{more}"


# The table of the checks, by their names in findings; each function says what it checks.

MACHINE: dict[str, Callable[[], Findings]] = {
    "disk": disks,
    "GPUs": gpus,
    "Ray": ray_cluster,
    "leftovers": unfinished_files,
}
STORAGE: dict[str, Callable[[str, RDBStorage], Findings]] = {
    "schema": schema,
    "storage": server,
    "rights": rights,
}
STUDY: dict[str, Callable[[Subject], Findings]] = {
    "leases": leases,
    "conditions": conditions,
    "foreign rows": foreign,
    "versions": versions,
    "files": files,
    "leftovers": leftovers,
    "artifacts": artifacts,
}


def examine(url: str, name: str | None) -> Findings:
    """Check this machine, a storage and its studies, or the one study of that name.

    Raises:
        UnknownStudyError: There is no study of that name.
    """
    for check, machine in MACHINE.items():
        yield from _run(check, machine)
    try:
        storage = open_reading(url)
    except StorageError as error:
        yield Finding("problem", str(error), check="storage")
        return
    stored = [
        finding
        for check, function in STORAGE.items()
        for finding in _run(check, partial(function, url, storage))
    ]
    yield from stored
    if any(finding.check == "schema" and finding.level == "problem" for finding in stored):
        return
    with storage.engine.connect() as connection:
        there = connection.execute(sa.select(STUDIES.c.study_name)).scalars()
        names = sorted(each for each in there if not each.endswith(BASELINES_SUFFIX))
    if name is not None and name not in names:
        raise unknown_study(storage, name)
    for each in names if name is None else [name]:
        yield from examine_study(url, each)


def examine_study(url: str, name: str) -> Findings:
    """Check one study's rows and files, and those of its baselines."""
    try:
        study = Study.open(url, name, reading=True)
        spec = study.spec
    except BdenseError as error:
        level: Level = "warning" if isinstance(error, UnknownStudyError) else "problem"
        yield Finding(level, str(error), check="study", study=name)
        return
    for ledger in study.ledgers:
        subject = Subject(study, spec, ledger)
        for check, function in STUDY.items():
            yield from _run(check, partial(function, subject), study=subject.name)


def _run(check: str, call: Callable[[], Findings], *, study: str = "") -> Findings:
    try:
        for found in call():
            yield replace(found, check=check, study=study)
    except BdenseError as error:  # its message says what to do
        yield Finding("problem", str(error), check=check, study=study)
    except _ERRORS as error:
        yield Finding("problem", f"cannot be checked: {one_line(error)}", check=check, study=study)
