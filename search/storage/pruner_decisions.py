"""A pruner's decision on a trial, stored once for all workers.

Pruners of successive halving note in the database which rungs a trial has reached, and judge
differently when they find these notes. So the notes are held back until the decision is stored
with them. A later worker, or a call repeated after a lost answer, gets that decision.
"""

import copy
from collections.abc import Callable
from typing import Any

from optuna import Study
from optuna.storages import BaseStorage

from search.storage.engine import retrying


def decision_of(study: Study, number: int, step: int, ask: Callable[[Study], bool]) -> bool:
    """The decision on a trial at a step: the stored one, else the pruner's, which is then stored.

    Args:
        study: The trial's study.
        number: Number of the trial.
        step: Step of the intermediate value.
        ask: Asks the pruner about the given study, which holds the pruner's notes back.

    Raises:
        StorageError: The database did not come back in time.
    """
    key, storage = f"verdict:{step}", study._storage
    key_of_trial = storage.get_trial_id_from_study_id_trial_number
    trial = retrying(lambda: storage.get_trial(key_of_trial(study._study_id, number)))
    decision: dict[str, Any] | None = trial.system_attrs.get(key)
    if decision is None:
        notes: dict[str, Any] = {}

        def fresh() -> bool:
            notes.clear()
            return ask(_noting(study, notes))

        poor = retrying(fresh)
        decision = {"poor": bool(poor), "notes": notes}  # JSON does not take NumPy's bool
        _store(storage, trial._trial_id, key, decision)
    # A stored decision, too: its worker may have died before all notes were stored.
    for name, value in decision["notes"].items():
        _store(storage, trial._trial_id, name, value)
    return bool(decision["poor"])


def _store(storage: BaseStorage, trial_id: int, key: str, value: Any) -> None:  # noqa: ANN401
    retrying(lambda: storage.set_trial_system_attr(trial_id, key, value))


def _noting(study: Study, notes: dict[str, Any]) -> Study:
    """The study with a storage that puts a pruner's notes into ``notes``."""
    noting = copy.copy(study)
    noting._storage = _Noting(study._storage, notes)  # type: ignore[assignment]
    return noting


class _Noting:
    """A storage that keeps new attributes of the judged trial to itself."""

    def __init__(self, storage: BaseStorage, notes: dict[str, Any]) -> None:
        self._storage = storage
        self._notes = notes

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:  # noqa: ANN401
        self._notes[key] = value

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._storage, name)
