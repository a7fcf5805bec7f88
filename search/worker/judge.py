"""Whether a trial goes on: its intermediate values, and what the study's pruner says to them.

The pruner's decision is stored before it takes effect, so that a worker that takes the trial over
gets the same one. Pruners of successive halving note in the database which rungs a trial has
reached, and judge differently when they find these notes. So the notes are held back until the
decision is stored with them.
"""

import copy
from typing import Any

from optuna.storages import BaseStorage

from search.spec.space import make_pruner
from search.spec.study import StudySpec
from search.storage.engine import retrying
from search.storage.ledger import Claim, Ledger


class PrunedError(Exception):
    """The pruner ended the trial: why, and after what fraction of its training, if known."""

    def __init__(self, reason: str, at: float | None = None) -> None:
        super().__init__(reason, at)
        self.reason, self.at = reason, at


class Judge:
    """Stores the intermediate values of a claimed row, and asks the pruner about a trial's.

    ``prunes`` is whether the pruner may end it; baselines and given arms always run to the end.
    """

    def __init__(self, spec: StudySpec, ledger: Ledger, claim: Claim, *, prunes: bool) -> None:
        self.prunes = prunes
        self._ledger = ledger
        self._claim = claim
        self._pruner = make_pruner(spec) if prunes else None

    def __call__(self, step: int, value: float) -> bool:
        """Store the value at a step, such as images trained on; whether to end the row."""
        self.store(step, value)
        return self._pruner is not None and self._decision(step)

    def store(self, step: int, value: float) -> None:
        """Store a value of a row that has been trained to its end."""
        self._ledger.report(self._claim, step, value)

    def _decision(self, step: int) -> bool:
        """The decision at a step: the stored one, else the pruner's, which is then stored."""
        study, trial_id = self._ledger.study, self._claim.trial_id
        key, storage, pruner = f"verdict:{step}", study._storage, self._pruner
        assert pruner is not None
        trial = retrying(lambda: storage.get_trial(trial_id))
        decision: dict[str, Any] | None = trial.system_attrs.get(key)
        if decision is None:
            notes: dict[str, Any] = {}
            noting = copy.copy(study)
            noting._storage = _Noting(storage, notes)  # type: ignore[assignment]

            def ask() -> bool:
                notes.clear()
                return pruner.prune(noting, storage.get_trial(trial_id))

            poor = retrying(ask)
            decision = {"poor": bool(poor), "notes": notes}  # JSON does not take NumPy's bool
            _store(storage, trial_id, key, decision)
        # A stored decision, too: its worker may have died before all notes were stored.
        for name, value in decision["notes"].items():
            _store(storage, trial_id, name, value)
        return bool(decision["poor"])


def _store(storage: BaseStorage, trial_id: int, key: str, value: Any) -> None:  # noqa: ANN401
    retrying(lambda: storage.set_trial_system_attr(trial_id, key, value))


class _Noting:
    """A storage that puts new attributes of the judged trial into ``notes``."""

    def __init__(self, storage: BaseStorage, notes: dict[str, Any]) -> None:
        self._storage = storage
        self._notes = notes

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:  # noqa: ANN401
        self._notes[key] = value

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._storage, name)
