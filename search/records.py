"""Whatever a name stands for: a search, or a study of planned rows."""

from search.errors import UnknownStudyError
from search.planned import Planned
from search.storage import retrying
from search.study import BASELINES_SUFFIX, KIND, Study


def open_record(url: str, name: str) -> Study | Planned:
    """The study of that name.

    Raises:
        UnknownStudyError: There is none.
        StorageError: The database cannot be opened.
    """
    if name.endswith(BASELINES_SUFFIX):
        return Study.open(url, name)  # which says what to name instead
    study = Study.open(url, name)
    attributes = retrying(lambda: study.trials.study.user_attrs)
    return Planned(url, study.trials) if KIND in attributes else study


def open_search_named(url: str, name: str) -> Study:
    """A search.

    Raises:
        UnknownStudyError: There is none of that name, or it is a study of planned rows.
    """
    record = open_record(url, name)
    if isinstance(record, Planned):
        of = record.facts.get("of")
        hint = f"; give the search itself: {of}" if of else ""
        raise UnknownStudyError(f"{name!r} is no search but planned rows ({record.kind}){hint}")
    return record
