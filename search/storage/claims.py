"""How a worker gets its next trial, under the study's lock.

Uses Optuna's semi-private calls, as ``search.storage.verdicts`` does: a ``Trial`` made from its
key, ``_suggest``, ``_storage`` and ``_trial_id``. The ledger's contract suite covers them, and
pyproject.toml pins Optuna's minor version.
"""

import logging
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import TrialState

from bdense.errors import InputError
from search.storage.engine import redact
from search.storage.leases import OUT_OF_BOUNDS, SURPLUS, Claim, Leases, RunningRow

_log = logging.getLogger(__name__)

CONSTRAINT = "largest_weight"
MAX_REFUSED_IN_A_ROW = 200
_DETAIL_CHARACTERS = 2000


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing can start now, but other trials still run: ask again later."""


@dataclass(frozen=True, slots=True)
class Done:
    """The budget is spent and nothing runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """Arguments of one call for a trial; ``owner`` identifies the lease it takes.

    Without a ``sampler`` only planned trials start.
    """

    space: Mapping[str, BaseDistribution]
    sampler: Callable[[int], BaseSampler] | None
    constraint: Callable[[dict[str, Any]], float] | None
    owner: str = field(default_factory=lambda: uuid.uuid4().hex)

    def sampler_at(self, offset: int) -> BaseSampler:
        """The sampler for the ``offset``-th suggestion; any, for planned trials."""
        return RandomSampler() if self.sampler is None else self.sampler(offset)


def failure_attributes(reason: str, detail: str) -> dict[str, str]:
    """Attributes of a failed trial, without passwords."""
    return {"reason": reason, "error": redact(detail)[:_DETAIL_CHARACTERS]}


class Claimer:
    """Picks the trial to work on.

    On PostgreSQL the connection that holds the lock is in a transaction, and Optuna writes through
    its own connections. The lease is taken last, so that the two never wait for each other.
    """

    def __init__(self, study: optuna.Study, leases: Leases, max_attempts: int) -> None:
        self._study = study
        self._leases = leases
        self._max_attempts = max_attempts

    def load_trials(self) -> None:
        """Fill Optuna's cache without the lock, so that later calls read only new trials."""
        self._study.get_trials(deepcopy=False)

    def claim(self, connection: sa.Connection, asking: Asking, budget: int) -> Claim | Wait | Done:
        """A trial to take over, else a new one, else ``Wait`` or ``Done``.

        Args:
            connection: The connection that holds the study's lock.
            asking: Arguments of the call.
            budget: Trials to run in all.
        """
        self._leases.note_server(connection)
        self._leases.sweep(connection)
        for row in self._leases.running(connection):
            if row.owner == asking.owner:
                # An earlier attempt of this call was committed, but its answer was lost.
                params = self._trial(row, asking).params
                return _claim(row, params, asking, attempt=row.attempt, adopted=row.attempt > 1)
            if row.adoptable and (claim := self._adopt(connection, row, asking, budget)):
                return claim
        self._leases.sweep(connection)
        return self._begin(connection, asking, budget)

    def _begin(
        self, connection: sa.Connection, asking: Asking, budget: int
    ) -> Claim | Wait | Done:
        params: dict[str, Any] = {}
        for _ in range(MAX_REFUSED_IN_A_ROW):
            states = self._leases.count_states(connection)
            planned_alone = asking.sampler is None and not states["WAITING"]
            if _started(states) >= budget or planned_alone:
                return Wait() if states["RUNNING"] else Done()
            self._study.sampler = asking.sampler_at(self._leases.count_begun(connection))
            trial = self._study.ask(fixed_distributions=dict(asking.space))
            params = trial.params
            row = RunningRow(trial_id=trial._trial_id, number=trial.number)
            if self._within_bounds(trial, asking) and (
                claim := self._take(connection, row, params, asking, adopted=False)
            ):
                return claim
        raise InputError(
            f"{MAX_REFUSED_IN_A_ROW} suggestions in a row were beyond the bound on the largest "
            f"branch weight, the last one {params}; raise that bound or lower the upper limits "
            "of the search space"
        )

    def _adopt(
        self, connection: sa.Connection, row: RunningRow, asking: Asking, budget: int
    ) -> Claim | None:
        """Take over a trial without a worker, or finish it if it must not run again."""
        if row.attempt == 0 and _started(self._leases.count_states(connection)) > budget:
            self._drop_surplus(row)
            return None
        trial = self._trial(row, asking)
        try:
            if not self._within_bounds(trial, asking):
                return None
            if row.attempt + 1 - row.forgiven > self._max_attempts:
                self._poison(trial, row)
                return None
        except UpdateFinishedTrialError:
            # Its worker was only frozen and has just finished it.
            return None
        return self._take(connection, row, trial.params, asking, adopted=True)

    def _trial(self, row: RunningRow, asking: Asking) -> optuna.Trial:
        """The trial of a row; suggests parameters that a dead worker left out."""
        self._study.sampler = asking.sampler_at(row.number)
        # Optuna's cache can write parameters only of trials that it has listed before.
        self.load_trials()
        trial = optuna.Trial(self._study, row.trial_id)
        for name, distribution in asking.space.items():
            trial._suggest(name, distribution)
        return trial

    def _within_bounds(self, trial: optuna.Trial, asking: Asking) -> bool:
        """Whether the trial may run; if not, it is finished and counts nowhere."""
        beyond = 0.0 if asking.constraint is None else asking.constraint(trial.params)
        if beyond <= 0:
            return True
        trial.set_user_attr(OUT_OF_BOUNDS, True)
        if CONSTRAINT not in trial.constraints:
            trial.set_constraint(CONSTRAINT, beyond)
        self._study.tell(trial.number, state=TrialState.PRUNED, skip_if_finished=True)
        return False

    def _drop_surplus(self, row: RunningRow) -> None:
        """Finish a trial beyond the budget that no worker took.

        A claim started it and then lost the study's lock with its connection.
        """
        self._study._storage.set_trial_user_attr(row.trial_id, SURPLUS, True)
        self._study.tell(row.number, state=TrialState.FAIL, skip_if_finished=True)

    def _poison(self, trial: optuna.Trial, row: RunningRow) -> None:
        detail = (
            f"started {row.attempt} times, and no worker finished it (max_attempts is "
            f"{self._max_attempts}); last seen at: {row.progress or 'the start'}"
        )
        _log.warning("trial %d is given up: %s", row.number, detail)
        for key, value in failure_attributes("poisoned", detail).items():
            trial.set_user_attr(key, value)
        self._study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def _take(
        self,
        connection: sa.Connection,
        row: RunningRow,
        params: Mapping[str, Any],
        asking: Asking,
        *,
        adopted: bool,
    ) -> Claim | None:
        if not self._leases.take(connection, row, asking.owner):
            return None
        return _claim(row, params, asking, attempt=row.attempt + 1, adopted=adopted)


def _claim(
    row: RunningRow, params: Mapping[str, Any], asking: Asking, *, attempt: int, adopted: bool
) -> Claim:
    return Claim(
        trial_id=row.trial_id,
        number=row.number,
        params=params,
        attempt=attempt,
        tries=attempt - row.forgiven,
        owner=asking.owner,
        adopted=adopted,
    )


def _started(states: Mapping[str, int]) -> int:
    return sum(states.values()) - states["WAITING"]
