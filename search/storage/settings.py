"""A study of the ledger in Optuna's table: found or made, with its settings and their changes."""

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TypeAlias

import optuna
from optuna.storages import RDBStorage

from bdense.errors import InputError
from search.errors import UnknownStudyError
from search.storage.engine import exclusive, redact, sqlite_file

JSON: TypeAlias = bool | int | float | str | Sequence["JSON"] | Mapping[str, "JSON"] | None

CHANGES = "changes"
DEFAULT_TTL_SECONDS = 60.0
DEFAULT_MAX_ATTEMPTS = 3


def open_study(
    storage: RDBStorage, name: str, given: Mapping[str, int | float | None]
) -> optuna.Study:
    """A study with these settings: one that is there, or with a budget a new one.

    Args:
        storage: where it is.
        name: its name.
        given: ``budget``, ``ttl`` and ``max_attempts``; None keeps what is stored.

    Raises:
        UnknownStudyError: no budget was given and there is no such study of ours.
    """
    with exclusive(storage.engine, lock_name(name)):
        if given["budget"] is None:
            study = find_study(storage, name)
        else:
            try:
                study = optuna.load_study(study_name=name, storage=storage)
            except KeyError:
                study = optuna.create_study(study_name=name, storage=storage, direction="minimize")
        _store(study, given)
    return study


def find_study(storage: RDBStorage, name: str) -> optuna.Study:
    """A study of ours that is there, without a change to it."""
    try:
        study = optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        names = optuna.get_all_study_names(storage)
        raise UnknownStudyError(_unknown(name, storage.url, names)) from None
    if "budget" not in study.user_attrs:
        raise UnknownStudyError(
            f"study {name!r} was not made by bdense-search; give the name of one that was, or "
            "launch this one under another name"
        )
    return study


def require_file(url: str, study_name: str) -> None:
    """Where there is no SQLite file there is no study; and looking for one makes none."""
    path = sqlite_file(url)
    if path is not None and not path.exists():
        raise UnknownStudyError(_unknown(study_name, url, []))


def _store(study: optuna.Study, given: Mapping[str, int | float | None]) -> None:
    first = {"ttl": DEFAULT_TTL_SECONDS, "max_attempts": DEFAULT_MAX_ATTEMPTS}
    stored = study.user_attrs
    for key, value in given.items():
        if key not in stored:
            study.set_user_attr(key, first.get(key) if value is None else value)
        elif value is not None and value != stored[key]:
            record_change(study, key, stored[key], value)
            study.set_user_attr(key, value)


def record_change(study: optuna.Study, key: str, old: JSON, new: JSON) -> None:
    """Append to the study's attribute ``changes``, under its lock."""
    changes = list(study.user_attrs.get(CHANGES, []))
    what = {"key": key, "old": old, "new": new}
    # Asked again after a lost answer, it is still one change.
    if not changes or {name: changes[-1].get(name) for name in what} != what:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        study.set_user_attr(CHANGES, [*changes, {"time": now, **what}])


def check_settings(*, budget: int | None, ttl: float | None, max_attempts: int | None) -> None:
    """Refuse settings out of range.

    Raises:
        InputError: names the one.
    """
    if budget is not None and budget < 1:
        raise InputError(f"the budget of a study must be 1 trial or more, got {budget}")
    if ttl is not None and not (math.isfinite(ttl) and ttl > 0):
        raise InputError(f"a lease's ttl must be a positive number of seconds, got {ttl}")
    if max_attempts is not None and max_attempts < 1:
        raise InputError(f"max_attempts must be 1 or more, got {max_attempts}")


def _unknown(name: str, url: str, names: Sequence[str]) -> str:
    there = f"studies there: {', '.join(sorted(names))}" if names else "no study is there"
    return (
        f"no study {name!r} in {redact(url)}; {there}; check the name and --storage, "
        "or launch it first"
    )


def lock_name(study_name: str) -> str:
    """Of the lock under which a study's rows and settings change."""
    return f"study {study_name}"
