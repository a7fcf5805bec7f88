"""Following one row until it has ended."""

from typing import Any

import sqlalchemy as sa
from optuna.trial import TrialState

from bdense.errors import InputError
from search.storage.engine import retrying
from search.storage.leases import STATE, TRIALS
from search.storage.ledger import Ledger


class Followed:
    """A row by its number from 0, read by SQL, so that the number of rows does not matter."""

    def __init__(self, ledger: Ledger, number: int) -> None:
        self._ledger, self._number = ledger, number
        name, storage = ledger.study.study_name, ledger.storage
        self._key = retrying(lambda: storage.get_study_id_from_name(name))

    def has_ended(self) -> bool:
        """Whether it will not run again.

        Raises:
            InputError: There is no such row, nor will there be one.
        """
        state = self._scalar(sa.select(STATE).where(TRIALS.c.number == self._number))
        if state is not None:
            return TrialState[state].is_finished()
        counts = self._ledger.counts()
        there: int = self._scalar(sa.select(sa.func.count()))
        known = counts.ended + counts.running + counts.waiting
        to_come = max(counts.planned - known, 0)
        if not 0 <= self._number < there + to_come:
            more = f", {to_come} more are to come" if to_come else ""
            raise InputError(
                f"study {self._ledger.study.study_name} has no trial {self._number}: there are "
                f"{there} so far{more}, numbered from 0"
            )
        return False

    def _scalar(self, query: sa.Select[Any]) -> Any:  # noqa: ANN401
        """One value over the rows of the study."""

        def read() -> Any:  # noqa: ANN401
            with self._ledger.storage.engine.connect() as connection:
                return connection.scalar(query.where(TRIALS.c.study_id == self._key))

        return retrying(read)
