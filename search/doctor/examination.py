"""``bdense-search doctor``: go through the table of checks, and repair what is safe to repair.

Looking changes nothing. Repairing frees what dead workers hold and deletes what ended rows left
behind; it never touches a trial, a result or a student.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import sqlalchemy as sa

from bdense.errors import BdenseError
from search.doctor.checks import MACHINE, STORAGE, STUDY, Finding, Place, Subject
from search.errors import StorageError, UnknownStudyError
from search.storage.engine import DATABASE_ERRORS, one_line, open_reading, redact
from search.storage.leases import STUDIES
from search.study.study import BASELINES_SUFFIX, Study

_T = TypeVar("_T")


def examine(url: str, name: str | None, *, fix: bool = False) -> Iterator[Finding]:
    """Check this machine, a storage and its studies.

    Args:
        url: The storage, as ``resolve_storage_url`` gives it.
        name: The one study to check; None checks all.
        fix: Whether to repair.

    Raises:
        UnknownStudyError: There is no study of that name.
    """
    for check in MACHINE:
        yield from _run(check.__name__, check, fix=fix)
    try:
        place = Place(url, open_reading(url))
    except StorageError as error:
        yield Finding("storage", "problem", str(error))
        return
    stored = [finding for check in STORAGE for finding in _checked(check, place, fix=fix)]
    yield from stored
    if any(finding.check == "schema" and finding.level == "problem" for finding in stored):
        return
    with place.storage.engine.connect() as connection:
        names = sorted(connection.execute(sa.select(STUDIES.c.study_name)).scalars())
    if name is not None and name not in names:
        there = ", ".join(names) or "none"
        raise UnknownStudyError(f"no study {name!r} in {redact(url)}; studies there: {there}")
    for each in names if name is None else [name]:
        if not each.endswith(BASELINES_SUFFIX):
            yield from examine_study(url, each, fix=fix)


def examine_study(url: str, name: str, *, fix: bool) -> Iterator[Finding]:
    """Check one study's rows and files, and those of its baselines."""
    try:
        study = Study.open(url, name, reading=True)
        spec = study.spec
    except UnknownStudyError as error:
        yield Finding("study", "warning", str(error), study=name)
        return
    except BdenseError as error:
        yield Finding("study", "problem", str(error), study=name)
        return
    for ledger in study.ledgers:
        for check in STUDY:
            subject = Subject(study, spec, ledger)
            yield from (
                replace(finding, study=ledger.study.study_name)
                for finding in _checked(check, subject, fix=fix)
            )


def _checked(check: Callable[[_T], Iterator[Finding]], of: _T, *, fix: bool) -> list[Finding]:
    return list(_run(check.__name__, lambda: check(of), fix=fix))


def _run(name: str, check: Callable[[], Iterator[Finding]], *, fix: bool) -> Iterator[Finding]:
    """What a check finds, repaired with ``fix``; what keeps it from looking is a finding too."""
    try:
        for finding in check():
            yield _repaired(finding) if fix and finding.repair is not None else finding
    except BdenseError as error:  # which says what to do
        yield Finding(name, "problem", str(error))
    except (*DATABASE_ERRORS, OSError) as error:
        yield Finding(name, "problem", f"cannot be checked: {one_line(error)}")


def _repaired(finding: Finding) -> Finding:
    assert finding.repair is not None
    try:
        finding.repair()
    except (BdenseError, OSError, *DATABASE_ERRORS) as error:
        why = str(error) if isinstance(error, BdenseError) else one_line(error)
        return replace(
            finding, level="problem", text=f"{finding.text}; repairing failed: {why}", repair=None
        )
    return replace(finding, level="mended", advice="", repair=None)
