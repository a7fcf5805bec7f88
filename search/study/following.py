"""One row that somebody waits for: has it ended, and is it still to come."""

import sqlalchemy as sa
from optuna.trial import TrialState

from bdense.errors import InputError
from search.storage.engine import retrying
from search.storage.leases import STATE, TRIALS
from search.storage.ledger import Ledger


class Followed:
    """A row by its number, which is asked for by SQL: however many others there are.

    Args:
        ledger: Of the rows.
        number: From 0.
    """

    def __init__(self, ledger: Ledger, number: int) -> None:
        self._ledger = ledger
        self._number = number
        name, storage = ledger.study.study_name, ledger.storage
        self._key = retrying(lambda: storage.get_study_id_from_name(name))

    def has_ended(self) -> bool:
        """Whether it will not run again.

        Raises:
            InputError: There is no such row, nor is one to come.
        """
        state = retrying(self._state)
        if state is None:
            self._require_one_to_come()
            return False
        return TrialState[state].is_finished()

    def _state(self) -> str | None:
        query = sa.select(STATE).where(
            TRIALS.c.study_id == self._key, TRIALS.c.number == self._number
        )
        with self._ledger.storage.engine.connect() as connection:
            return connection.execute(query).scalar()

    def _require_one_to_come(self) -> None:
        query = sa.select(sa.func.count()).where(TRIALS.c.study_id == self._key)

        def count() -> int:
            with self._ledger.storage.engine.connect() as connection:
                return connection.execute(query).scalar_one()

        counts, there = self._ledger.counts(), retrying(count)
        known = counts.ended + counts.running + counts.waiting
        to_come = max(counts.planned - known, 0)
        if not 0 <= self._number < there + to_come:
            more = f", {to_come} more are to come" if to_come else ""
            raise InputError(
                f"study {self._ledger.study.study_name} has no trial {self._number}: there are "
                f"{there} so far{more}, numbered from 0"
            )
