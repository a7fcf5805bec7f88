"""``bdense-search doctor``: what is wrong with this machine, a storage and its studies, and why.

Looking changes nothing. Mending gives back what dead workers hold and deletes what finished rows
left behind; it never touches a trial, a result or a student.
"""

from collections.abc import Callable, Iterator

import sqlalchemy as sa

from bdense.errors import BdenseError
from search.doctor.artifacts import check_artifacts
from search.doctor.files import check_cache, check_files
from search.doctor.finding import Finding, ok, problem, warning
from search.doctor.machine import check_machine, wants_of
from search.doctor.rows import Subject, check_rows, names, subjects
from search.doctor.storage import can_read_studies, check_storage, engine_of
from search.errors import UnknownStudyError
from search.storage.engine import DATABASE_ERRORS, lacks_rights, one_line, redact
from search.storage.leases import LEASE
from search.study.study import BASELINE_RESULTS, BASELINES_SUFFIX, FINGERPRINT, SPEC

Check = Callable[[], Iterator[Finding]]


def examine(url: str, name: str | None, *, fix: bool = False) -> Iterator[Finding]:
    """Look at everything, or with ``name`` at one study, and mend what is safe with ``fix``.

    Args:
        url: The storage, as ``resolve_storage_url`` gives it.
        name: A study; None looks at all of the storage.
        fix: Whether to mend.

    Raises:
        UnknownStudyError: There is no study of that name.
    """
    engine = engine_of(url)
    storage = list(check_storage(url, engine))
    found = subjects(engine, name) if can_read_studies(engine) else []
    if name is not None and not found and can_read_studies(engine):
        there = ", ".join(names(engine)) or "none"
        raise UnknownStudyError(f"no study {name!r} in {redact(url)}; studies there: {there}")
    yield from storage
    wants = [want for of in found if (want := wants_of(of.name, of.spec)) and not of.is_baselines]
    yield from _each(lambda: check_machine(wants), fix=fix)
    yield from _each(check_cache, fix=fix)
    for of in found:
        yield from examine_study(url, engine, of, fix=fix)


def examine_study(url: str, engine: sa.Engine, of: Subject, *, fix: bool) -> Iterator[Finding]:
    """Look at one study's rows and files."""
    for check in _checks(url, engine, of):
        yield from (each.of(of.name) for each in _each(check, fix=fix))


def _checks(url: str, engine: sa.Engine, of: Subject) -> list[Check]:
    """What is looked at of one study."""

    def rows() -> Iterator[Finding]:
        has_leases = sa.inspect(engine).has_table(LEASE.name)
        yield from check_rows(engine, of, has_leases=has_leases)

    checks: list[Check] = [rows]
    if of.is_whole:
        checks.append(lambda: check_files(engine, of))
        checks.append(lambda: check_artifacts(engine, of))
        if not of.is_planned:
            checks += [lambda: _baselines(url, of), lambda: _same_bdense(of)]
    return checks


def _each(check: Check, *, fix: bool) -> Iterator[Finding]:
    """What is found, mended with ``fix``; what keeps anybody from looking is a finding too."""
    try:
        for finding in check():
            yield _mended(finding) if fix and finding.mend is not None else finding
    except DATABASE_ERRORS as error:
        yield problem(
            "storage",
            f"not all could be looked at: {one_line(error)}",
            "see to what is said of the storage, then look again",
        )
    except BdenseError as error:  # which says what to do
        yield problem("storage", f"not all could be looked at: {error}")
    except OSError as error:
        yield problem("files", f"not all could be looked at: {error}", "check the files' rights")


def _mended(finding: Finding) -> Finding:
    try:
        return finding.mended()
    except DATABASE_ERRORS as error:
        who = "give the same command as a user who may write" if lacks_rights(error) else ""
        return problem(finding.check, f"{finding.text}; mending failed: {one_line(error)}", who)
    except (BdenseError, OSError) as error:
        return problem(finding.check, f"{finding.text}; mending failed: {error}")


def _baselines(url: str, of: Subject) -> Iterator[Finding]:
    """Whether a search has its baselines, and their results in its own attributes."""
    from search.study.study import Study
    from search.study.summary import baselines_of, copy_baselines

    if not of.has_baselines:
        yield warning(
            "baselines",
            f"there is no {of.name}{BASELINES_SUFFIX}: its maker was killed before it was whole",
            "launch it again",
        )
        return
    study = Study.open(url, of.name, reading=True)
    results = {name: each.as_dict() for name, each in baselines_of(study).items()}
    if results and of.attributes.get(BASELINE_RESULTS) != results:
        yield warning(
            "baselines",
            "their results are not in the study's attributes, where the dashboard shows them",
            "the next launch copies them",
            lambda: copy_baselines(Study.open(url, of.name)),
        )
    elif results:
        yield ok("baselines", f"{' and '.join(results)} are measured and shown with the study")


def _same_bdense(of: Subject) -> Iterator[Finding]:
    """Whether this installation would measure what the study's trials were measured by."""
    from search.spec.file import read_stored

    try:
        mine = read_stored(of.name, of.attributes[SPEC]).fingerprint()
    except BdenseError as error:
        yield problem("conditions", str(error))
        return
    except OSError as error:
        yield warning(
            "conditions",
            f"a file of the study is not on this machine: {error}",
            "its workers need it",
        )
        return
    stored = of.attributes.get(FINGERPRINT)
    if mine != stored:
        yield problem(
            "conditions",
            f"this bdense measures under other conditions (fingerprint {mine}) than the study has "
            f"({stored}): it would be refused as a worker",
            "use the version of bdense that launched it, and restore its teacher and data, or "
            "launch under another name",
        )
    else:
        yield ok("conditions", f"this bdense measures as the study does (fingerprint {mine})")
