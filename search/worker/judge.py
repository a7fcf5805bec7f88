"""Whether a trial goes on: its intermediate values, and what the study's pruner says to them.

The pruner's decision is stored before it takes effect, so that a worker that takes the trial over
gets the same one.
"""

from search.spec.space import make_pruner
from search.spec.study import StudySpec
from search.storage.ledger import Claim, Ledger
from search.storage.pruner_decisions import decision_of


class PrunedError(Exception):
    """The pruner ended the trial."""


class Judge:
    """Stores the intermediate values of a claimed row, and asks the pruner about a trial's.

    Args:
        spec: The study's.
        ledger: Of the row.
        claim: The row.
        prunes: Whether it may be ended; a baseline or a given arm is measured to its end alone.
    """

    def __init__(self, spec: StudySpec, ledger: Ledger, claim: Claim, *, prunes: bool) -> None:
        self.prunes = prunes
        self._ledger = ledger
        self._claim = claim
        self._pruner = make_pruner(spec) if prunes else None

    def __call__(self, step: int, value: float) -> bool:
        """Store a value at a step, such as images trained on; whether to end there."""
        claim, pruner = self._claim, self._pruner
        self.store(step, value)
        if pruner is None:
            return False
        return decision_of(
            self._ledger.study,
            claim.number,
            step,
            lambda study: pruner.prune(study, study._storage.get_trial(claim.trial_id)),
        )

    def store(self, step: int, value: float) -> None:
        """Store a value of a row that has been trained to its end."""
        self._ledger.report(self._claim, step, value)
