"""Our Optuna studies: find or create one, with its settings and their changes."""

import contextlib
import logging
from collections.abc import Container, Mapping, Sequence
from datetime import UTC, datetime
from typing import TypeAlias

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from search.errors import UnknownStudyError
from search.log import optuna_says
from search.redaction import redact
from search.storage.engine import exclusive, sqlite_file
from search.storage.tables import BEGUN, ENDED, is_own

JSON: TypeAlias = bool | int | float | str | Sequence["JSON"] | Mapping[str, "JSON"] | None

CHANGES = "changes"
# A search's baselines are in an Optuna study of the search's name and this suffix.
BASELINES_SUFFIX = ".baselines"
DEFAULT_TTL_SECONDS = 60.0
DEFAULT_MAX_ATTEMPTS = 3


class OwnStudy(optuna.Study):
    """An Optuna study that marks the trials it begins and ends, and lists no foreign results.

    Samplers and pruners read the trials of the study that they are given.
    """

    def tell(
        self,
        trial: Trial | int,
        values: float | Sequence[float] | None = None,
        state: TrialState | None = None,
        skip_if_finished: bool = False,
    ) -> FrozenTrial:
        """Finish a trial, which is marked as ended by us first."""
        number = trial if isinstance(trial, int) else trial.number
        key = self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
        with contextlib.suppress(UpdateFinishedTrialError):
            self._storage.set_trial_system_attr(key, ENDED, True)
        return super().tell(trial, values, state, skip_if_finished)

    def _pop_waiting_trial_id(self) -> int:
        """A waiting trial, else a new one; ``ask`` would begin that itself, without a mark."""
        waiting = self._storage.get_all_trials(
            self._study_id, deepcopy=False, states=(TrialState.WAITING,)
        )
        for trial in waiting:
            with contextlib.suppress(UpdateFinishedTrialError):
                # Marked first: a process that dies in between leaves no foreign trial.
                self._storage.set_trial_system_attr(trial._trial_id, BEGUN, True)
                if self._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
                    return trial._trial_id
        new = create_trial(state=TrialState.RUNNING, system_attrs={BEGUN: True})
        return self._storage.create_new_trial(self._study_id, template_trial=new)

    def _get_trials(
        self,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
        use_cache: bool = False,
    ) -> list[FrozenTrial]:
        found = super()._get_trials(deepcopy, states, use_cache)
        return [trial for trial in found if not trial.state.is_finished() or is_own(trial)]


def open_or_create(
    storage: RDBStorage,
    name: str,
    given: Mapping[str, int | float | None],
    *,
    maximise: bool = False,
) -> optuna.Study:
    """The study of that name with these settings; created if a budget is given.

    Args:
        storage: Its database.
        name: Its name.
        given: ``budget``, ``ttl`` and ``max_attempts``; None keeps the stored value.
        maximise: Whether higher values are better, of a study that is created.

    Raises:
        UnknownStudyError: No budget was given and there is no such study of ours.
    """
    with exclusive(storage.engine, lock_name(name)):
        if given["budget"] is None:
            study = find_study(storage, name)
        else:
            try:
                study = OwnStudy(name, storage)
            except KeyError:
                way = StudyDirection.MAXIMIZE if maximise else StudyDirection.MINIMIZE
                with optuna_says(logging.WARNING):  # of baselines and the like, too
                    optuna.create_study(study_name=name, storage=storage, direction=way)
                study = OwnStudy(name, storage)
        _store(study, given)
    return study


def find_study(storage: RDBStorage, name: str) -> optuna.Study:
    """An existing study of ours, without changing it."""
    try:
        study = OwnStudy(name, storage)
    except KeyError:
        raise unknown_study(storage, name) from None
    if "budget" not in study.user_attrs:
        raise UnknownStudyError(
            f"study {name!r} was not made by bdense-search; give the name of one that was, or "
            "launch this one under another name"
        )
    return study


def unknown_study(storage: RDBStorage, name: str) -> UnknownStudyError:
    """The error of a name, with those of the studies that a user can open.

    Studies that hold a search's baselines are not among them.
    """
    found = optuna.get_all_study_summaries(storage, include_best_trial=False)
    names = [
        each.study_name
        for each in found
        if "budget" in each.user_attrs and not each.study_name.endswith(BASELINES_SUFFIX)
    ]
    return UnknownStudyError(_unknown(name, storage.url, names))


def require_file(url: str, study_name: str) -> None:
    """Refuse a missing SQLite file, which opening would create."""
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
    """Append to the study's attribute ``changes``; needs the study's lock."""
    changes = list(study.user_attrs.get(CHANGES, []))
    what = {"key": key, "old": old, "new": new}
    # Repeated after a lost answer, it is still one change.
    if not changes or {name: changes[-1].get(name) for name in what} != what:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        study.set_user_attr(CHANGES, [*changes, {"time": now, **what}])


def _unknown(name: str, url: str, names: Sequence[str]) -> str:
    there = f"studies there: {', '.join(sorted(names))}" if names else "no study is there"
    return (
        f"no study {name!r} in {redact(url)}; {there}; check the name and the storage, "
        "or launch it first"
    )


def lock_name(study_name: str) -> str:
    """Name of the lock for changes to a study's rows and settings."""
    return f"study {study_name}"
