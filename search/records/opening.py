"""Whatever a name stands for: a search, or a study of planned rows."""

from search.database.storage import retrying
from search.errors import UnknownStudyError
from search.records.planned import Planned
from search.records.study import KIND, Study


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
