"""Whatever a name stands for: a search, or a study of planned rows."""

from collections.abc import Mapping
from typing import Any

from search.errors import UnknownStudyError
from search.spec.study_file import read_stored
from search.spec.study_spec import StudySpec
from search.storage.engine import retrying
from search.storage.ledger import Ledger
from search.study.arms import Planned
from search.study.study import KIND, SPEC, Study


def open_record(url: str, name: str, *, reading: bool = False) -> Study | Planned:
    """The study of that name.

    Args:
        url: The storage.
        name: Of the study.
        reading: Whether it is only looked at, perhaps by a user who may do no more.

    Raises:
        UnknownStudyError: There is none.
        StorageError: The database cannot be opened.
    """
    study = Study.open_reading(url, name) if reading else Study.open(url, name)
    attributes = retrying(lambda: study.trials.study.user_attrs)
    return Planned(url, study.trials) if KIND in attributes else study


def open_search_named(url: str, name: str, *, reading: bool = False) -> Study:
    """A search; arguments as of ``open_record``.

    Raises:
        UnknownStudyError: There is none of that name, or it is a study of planned rows.
    """
    record = open_record(url, name, reading=reading)
    if isinstance(record, Planned):
        of = record.facts.get("of")
        hint = f"; give the search itself: {of}" if of else ""
        raise UnknownStudyError(f"{name!r} is no search but planned rows ({record.kind}){hint}")
    return record


def stored_spec(ledger: Ledger) -> StudySpec:
    """The spec of a study of SFD's students, as its last launch stored it.

    Raises:
        UnknownStudyError: There is none: its maker was killed before it was whole.
        InputError: It is one of another version of bdense.
    """
    return spec_of(ledger.study.study_name, retrying(lambda: ledger.study.user_attrs))


def spec_of(name: str, attributes: Mapping[str, Any]) -> StudySpec:
    """The same, from the attributes of the study of that name."""
    if (stored := attributes.get(SPEC)) is None:
        raise UnknownStudyError(f"study {name!r} was never launched; launch it first")
    return read_stored(StudySpec, name, stored)
