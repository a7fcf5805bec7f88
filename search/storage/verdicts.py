"""What a pruner says of a trial, once and for all whoever works on it.

A pruner of successive halving notes in the database which rungs a trial has reached, and judges
otherwise where it finds its own notes. So its notes are held back until the verdict is stored with
them: whoever comes later, or asks again after a lost answer, has that verdict.
"""

import copy
from collections.abc import Callable
from typing import Any

from optuna import Study
from optuna.storages import BaseStorage

from search.storage.engine import retrying


def verdict_of(study: Study, number: int, step: int, ask: Callable[[Study], bool]) -> bool:
    """The verdict on a trial at a step: the stored one, else the pruner's, which is stored first.

    Args:
        study: The trial's.
        number: The trial's.
        step: Of the value on the way that is judged.
        ask: Asks the pruner; what it notes of the trial in the study it is given is held back.

    Raises:
        StorageError: The database stayed away.
    """
    key, storage = f"verdict:{step}", study._storage
    trial = retrying(lambda: study.get_trials(deepcopy=False)[number])
    verdict: dict[str, Any] | None = trial.system_attrs.get(key)
    if verdict is None:
        notes: dict[str, Any] = {}

        def fresh() -> bool:
            notes.clear()
            return ask(_noting(study, notes))

        poor = retrying(fresh)
        verdict = {"poor": bool(poor), "notes": notes}  # NumPy's is no JSON
        _store(storage, trial._trial_id, key, verdict)
    # Again where there was one: its worker may have died before they were all there.
    for name, value in verdict["notes"].items():
        _store(storage, trial._trial_id, name, value)
    return bool(verdict["poor"])


def _store(storage: BaseStorage, trial_id: int, key: str, value: Any) -> None:  # noqa: ANN401
    retrying(lambda: storage.set_trial_system_attr(trial_id, key, value))


def _noting(study: Study, notes: dict[str, Any]) -> Study:
    """The same study, but that a pruner's notes go into ``notes``."""
    noting = copy.copy(study)
    noting._storage = _Noting(study._storage, notes)  # type: ignore[assignment]
    return noting


class _Noting:
    """A storage that keeps attributes of the one trial that is judged to itself."""

    def __init__(self, storage: BaseStorage, notes: dict[str, Any]) -> None:
        self._storage = storage
        self._notes = notes

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:  # noqa: ANN401
        self._notes[key] = value

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._storage, name)
