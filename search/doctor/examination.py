"""``bdense-search doctor``: what is wrong with this machine, a storage and its studies, and why.

Looking changes nothing. Mending gives back what dead workers hold and deletes what finished rows
left behind; it never touches a trial, a result or a student.
"""

from collections.abc import Callable, Iterator

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from search.database.lease import LEASE
from search.database.storage import one_line, redact
from search.doctor.artifacts import look_at_artifacts
from search.doctor.files import look_at_cache, look_at_files
from search.doctor.finding import Finding, ok, problem, warning
from search.doctor.machine import look_at_machine, wants_of
from search.doctor.rows import Subject, look_at_rows, subjects
from search.doctor.storage import can_read_studies, engine_of, look_at_storage
from search.errors import UnknownStudyError
from search.records.study import BASELINE_RESULTS, BASELINES_SUFFIX, FINGERPRINT, SPEC


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
    storage = list(look_at_storage(url, engine))
    found = subjects(engine, name) if can_read_studies(engine) else []
    if name is not None and not found and can_read_studies(engine):
        names = ", ".join(of.name for of in subjects(engine, None)) or "none"
        raise UnknownStudyError(f"no study {name!r} in {redact(url)}; studies there: {names}")
    yield from storage
    wants = [want for of in found if (want := wants_of(of.name, of.spec)) and not of.is_baselines]
    yield from _each(look_at_machine(wants), fix=fix)
    yield from _each(look_at_cache(), fix=fix)
    for of in found:
        yield from examine_study(url, engine, of, fix=fix)


def examine_study(url: str, engine: sa.Engine, of: Subject, *, fix: bool) -> Iterator[Finding]:
    """Look at one study's rows and files."""
    for look in _looks(url, engine, of):
        try:
            yield from (each.of(of.name) for each in _each(look(), fix=fix))
        except SQLAlchemyError as error:
            yield problem("storage", one_line(error), "look again").of(of.name)


def _looks(url: str, engine: sa.Engine, of: Subject) -> list[Callable[[], Iterator[Finding]]]:
    """What is looked at of one study."""
    has_leases = sa.inspect(engine).has_table(LEASE.name)
    looks = [lambda: look_at_rows(engine, of, has_leases=has_leases)]
    if of.is_whole:
        looks.append(lambda: look_at_files(engine, of))
        looks.append(lambda: look_at_artifacts(engine, of))
        if not of.is_planned:
            looks += [lambda: _baselines(url, engine, of), lambda: _same_bdense(of)]
    return looks


def _each(findings: Iterator[Finding], *, fix: bool) -> Iterator[Finding]:
    for finding in findings:
        if not fix or finding.mend is None:
            yield finding
            continue
        try:
            yield finding.mended()
        except (SQLAlchemyError, OSError) as error:
            yield problem(finding.check, f"{finding.text}; mending failed: {one_line(error)}")


def _baselines(url: str, engine: sa.Engine, of: Subject) -> Iterator[Finding]:
    """Whether a search has its baselines, and their results in its own attributes."""
    from search.records.standing import baseline_results, copy_baselines
    from search.records.study import Study

    if len(subjects(engine, of.name)) < 2:
        yield warning(
            "baselines",
            f"there is no {of.name}{BASELINES_SUFFIX}: its maker was killed before it was whole",
            "launch it again",
        )
        return
    study = Study.open(url, of.name)
    results = baseline_results(study)
    if results and of.attributes.get(BASELINE_RESULTS) != results:
        yield warning(
            "baselines",
            "their results are not in the study's attributes, where the dashboard shows them",
            "the next launch copies them",
            lambda: copy_baselines(study),
        )
    elif results:
        yield ok("baselines", f"{' and '.join(results)} are measured and shown with the study")


def _same_bdense(of: Subject) -> Iterator[Finding]:
    """Whether this installation would measure what the study's trials were measured by."""
    from pydantic import ValidationError

    from search.specs.study_spec import StudySpec

    try:
        mine = StudySpec.model_validate_json(of.attributes[SPEC]).fingerprint()
    except ValidationError as error:
        yield problem(
            "conditions",
            f"this bdense cannot read the study's spec: {error.error_count()} mistakes",
            "use the version of bdense that launched it",
        )
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
