"""The lease ledger: each trial is one row of Optuna's table for its whole life.

Any number of processes share a study's budget through the database. ``Ledger.claim`` takes over
the trial of a dead worker before it starts a new one. Only the holder of a trial's lease may
finish it, and its first result stays.

Uses Optuna's semi-private calls, as ``search.worker.judge`` does: a ``Trial`` made
from its key, ``_suggest``, ``_storage`` and ``_trial_id``. The ledger's contract suite covers
them, and pyproject.toml pins Optuna's minor version.
"""

import logging
import math
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, Self, TypeAlias, TypeVar

import optuna
import sqlalchemy as sa
from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler, RandomSampler
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from bdense.errors import InputError
from search.redaction import redact
from search.storage.engine import exclusive, retrying
from search.storage.lease_renewal import LeaseRenewal, lost_error
from search.storage.leases import Claim, Leases, RunningRow
from search.storage.own_study import (
    DEFAULT_MAX_ATTEMPTS,
    JSON,
    lock_name,
    open_or_create,
    record_change,
    require_file,
)
from search.storage.queries import NOT_COUNTED, LedgerReader, asked_of
from search.storage.schema import open_tables
from search.storage.stop_flags import HALT, Launch, Stops, stopped_error
from search.storage.tables import OUT_OF_BOUNDS, SURPLUS

__all__ = ["Claim", "Done", "FailureReason", "LeaseRenewal", "Ledger", "Wait"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

FailureReason: TypeAlias = Literal["diverged", "out of memory", "error", "poisoned"]
# Reasons that the user can remove before asking for the same trial again.
MENDABLE: tuple[FailureReason, ...] = ("out of memory", "error", "poisoned")

_NOTHING: Mapping[str, JSON] = MappingProxyType({})
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
class _Asking:
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

    def fits(self, params: Mapping[str, Any]) -> bool:
        """Whether a trial can start with these parameters; given arms need all of them."""
        try:
            for name in self.space.keys() & params.keys():
                self.space[name].to_internal_repr(params[name])
        except (ValueError, TypeError):
            return False
        return self.sampler is not None or self.space.keys() == params.keys()


def _failure_attributes(reason: str, detail: str) -> dict[str, str]:
    """Attributes of a failed trial, without passwords."""
    return {"reason": reason, "error": redact(detail)[:_DETAIL_CHARACTERS]}


class Ledger(LedgerReader):
    """The trials of one study, shared by every process that opens it.

    Use ``open``, or ``open_reading`` to look only.
    """

    def __init__(
        self, storage: RDBStorage, study: optuna.Study, attributes: Mapping[str, Any]
    ) -> None:
        super().__init__(storage, study, attributes)
        self.max_attempts = int(attributes.get("max_attempts", DEFAULT_MAX_ATTEMPTS))
        # A process outside any launch ends with stop requests from now on.
        self.launch = Launch(name="", stops=Stops.of(attributes.get(HALT)).count)
        self._lock = lock_name(study.study_name)
        self._warm = False

    @classmethod
    def open(
        cls,
        url: str,
        study_name: str,
        *,
        budget: int | None,
        ttl: float | None = None,
        max_attempts: int | None = None,
        maximise: bool = False,
    ) -> Self:
        """Open a study, creating it and its tables if a budget is given.

        Args:
            url: The storage, from ``resolve_storage_url``.
            study_name: Name of the study.
            budget: Trials to run in all, shared by all launchers.
            ttl: Seconds that a lease lasts without renewal, at first 60.
            max_attempts: Starts of a trial before it counts as poisoned, at first 3.
            maximise: Whether higher values are better, of a study that is created.

        A setting of None keeps the stored value; another one replaces it, and the study's
        attribute ``changes`` records that.

        Raises:
            StorageError: The database cannot be opened.
            UnknownStudyError: No budget was given and there is no such study.
        """
        if budget is None:
            require_file(url, study_name)
        storage = open_tables(url)
        given = {"budget": budget, "ttl": ttl, "max_attempts": max_attempts}
        return cls._of(
            storage,
            retrying(partial(open_or_create, storage, study_name, given, maximise=maximise)),
        )

    def record_change(self, key: str, old: JSON, new: JSON) -> None:
        """Append a changed setting to the study's attribute ``changes``."""
        self._locked(lambda _: record_change(self.study, key, old, new))

    def enqueue(
        self,
        params: Mapping[str, Any],
        attrs: Mapping[str, JSON] = _NOTHING,
        *,
        again: Sequence[FailureReason] = (),
        if_room: bool = False,
    ) -> bool:
        """Plan a trial with these parameters before any other; equal parameters are planned once.

        It counts in the budget when it starts.

        Args:
            params: Compared bit for bit; Optuna's own check takes nearly equal numbers for equal.
            attrs: Attributes of the trial.
            again: A trial that failed for one of these reasons is planned anew.
            if_room: Only if fewer trials have started or wait than the budget allows.

        Returns:
            Whether this call planned it.
        """

        over = (*again, NOT_COUNTED)

        def add(connection: sa.Connection) -> bool:
            if if_room:
                counts = self.counts_in(connection, int(self.study.user_attrs["budget"]))
                if counts.total >= counts.planned:
                    return False
            known = self._asked_and_why()
            if any(asked == params and reason not in over for asked, reason in known):
                return False
            self.study.enqueue_trial(dict(params), dict(attrs))
            return True

        return self._locked(add)

    def enqueue_next(
        self, params: Mapping[str, Any], attrs: Mapping[str, JSON], *, seen: int
    ) -> bool:
        """Plan a trial and raise the budget for it, if the study still has the ``seen`` trials.

        Returns:
            Whether this call planned it, as far as the database's answer arrived.
        """

        def add(_: sa.Connection) -> bool:
            if len(self._asked_and_why()) != seen:
                return False
            # First: a process that dies in between leaves no trial that nothing may start.
            self.study.set_user_attr("budget", self._counted(params) + 1)
            self.study.enqueue_trial(dict(params), dict(attrs))
            return True

        return self._locked(add)

    def store(self, attributes: Mapping[str, JSON]) -> None:
        """Set attributes of the study, in this order."""
        for key, value in attributes.items():
            retrying(partial(self.study.set_user_attr, key, value))

    def change(self, key: str, to: Callable[[Any], JSON]) -> None:
        """Replace an attribute of the study by what ``to`` makes of it.

        If the database's answer is lost, ``to`` is called again with its own result.
        """
        self._locked(lambda _: self.study.set_user_attr(key, to(self.study.user_attrs.get(key))))

    def extend_list(self, key: str, values: Sequence[JSON]) -> bool:
        """Store a list as an attribute of the study, if it begins with the stored one.

        Returns:
            Whether it does; otherwise nothing is written.
        """

        def write(_: sa.Connection) -> bool:
            stored = list(self.study.user_attrs.get(key, []))
            begins_with_it = list(values[: len(stored)]) == stored
            if begins_with_it:
                self.study.set_user_attr(key, list(values))
            return begins_with_it

        return self._locked(write)

    def delete(self) -> None:
        """Delete the study and all its trials; no worker may be at work on one."""
        retrying(lambda: optuna.delete_study(study_name=self.name, storage=self.storage))

    def resize(self, names: Collection[str]) -> None:
        """Set the budget to the number of planned trials, which have parameters of these names."""
        self._locked(lambda _: self.study.set_user_attr("budget", self._counted(names)))

    def _counted(self, names: Collection[str]) -> int:
        asked = self._asked_and_why()
        return sum(why != NOT_COUNTED and params.keys() == set(names) for params, why in asked)

    def start_no_more(self) -> None:
        """Set the budget to the number of trials that were started."""

        def end(connection: sa.Connection) -> None:
            self.study.set_user_attr("budget", self.counts_in(connection, 0).started)

        self._locked(end)

    def claim(
        self,
        space: Mapping[str, BaseDistribution],
        sampler: Callable[[int], BaseSampler] | None,
        constraint: Callable[[dict[str, Any]], float] | None = None,
    ) -> Claim | Wait | Done:
        """Take a trial: one whose worker is gone, else a planned one, else a new one.

        Args:
            space: Parameter name to distribution.
            sampler: Makes the sampler of the n-th trial, from the number of trials started
                before. None starts only planned trials.
            constraint: How far parameters are beyond the bound; above 0 the trial is finished at
                once as pruned, outside the budget, and another one is suggested.

        Returns:
            The claim; ``Wait`` while others run; or ``Done``.

        Raises:
            StoppedError: The study, or this launch's workers, were asked to stop.
            InputError: 200 suggestions in a row were beyond the bound.
            StorageError: The database did not come back in time.
        """
        asking = _Asking(space=space, sampler=sampler, constraint=constraint)
        if not self._warm:
            # Before the lock, so that no other waits: this takes seconds for 10,000 trials.
            retrying(partial(self.study.get_trials, deepcopy=False))
            self._warm = True

        def attempt(connection: sa.Connection) -> Claim | Wait | Done:
            stored = self.study.user_attrs
            if Stops.of(stored.get(HALT)).reaches(self.launch):
                raise stopped_error(self.name)
            budget = int(stored["budget"])
            return _Claimer(self, self._leases, connection, asking, budget).claim()

        return self._locked(attempt)

    def holding(self, claim: Claim) -> LeaseRenewal:
        """A context manager that keeps the claim's lease alive while the trial is worked on."""
        return LeaseRenewal(self._leases, claim, self.name, self.launch)

    def complete(self, claim: Claim, value: float, attrs: Mapping[str, JSON]) -> None:
        """Finish with a value; one that is not finite fails as diverged.

        Raises:
            LeaseLostError: Another worker took the trial over; nothing was stored.
        """
        if math.isfinite(value):
            self._finish(claim, TrialState.COMPLETE, attrs, value)
        else:
            self.fail(claim, "diverged", f"the value is {value}", attrs)

    def report(self, claim: Claim, step: int, value: float) -> None:
        """Store an intermediate value; a repeated step overwrites its value.

        Raises:
            LeaseLostError: Another worker took the trial over; nothing was stored.
        """
        self._renew(claim)
        retrying(partial(self.storage.set_trial_intermediate_value, claim.trial_id, step, value))

    def prune(self, claim: Claim, attrs: Mapping[str, JSON]) -> None:
        """Finish as pruned.

        Raises:
            LeaseLostError: Another worker took the trial over; nothing was stored.
        """
        self._finish(claim, TrialState.PRUNED, attrs)

    def fail(
        self, claim: Claim, reason: FailureReason, detail: str, attrs: Mapping[str, JSON]
    ) -> None:
        """Finish without a value; the trial counts in the budget, but samplers do not see it.

        ``detail`` is stored without passwords, at most 2000 characters.

        Raises:
            LeaseLostError: Another worker took the trial over; nothing was stored.
        """
        self._finish(claim, TrialState.FAIL, {**attrs, **_failure_attributes(reason, detail)})

    def release(self, claim: Claim, *, interrupted: bool = False) -> None:
        """Give the trial back unfinished; another worker may continue it at once.

        Args:
            claim: The claim.
            interrupted: The trial is not to blame (Ctrl-C, a machine that shuts down): this
                attempt does not count against it.

        Raises:
            LeaseLostError: Another worker took the trial over.
        """
        if not retrying(partial(self._leases.release, claim, forgive=interrupted)):
            raise lost_error(claim)

    def forgive_running(self) -> None:
        """Do not count the current attempts of running trials: the launcher was interrupted.

        Nothing is released; the next claim finds that the workers are gone.
        """
        self._write(self._leases.forgive)

    def note_server(self) -> None:
        """Let expired leases end after a restart of the server, even without another claim."""
        self._write(self._leases.note_server)

    def _locked(self, call: Callable[[sa.Connection], _T]) -> _T:
        """Call with the connection that holds the study's lock; ``call`` may be repeated."""

        def attempt() -> _T:
            with exclusive(self.storage.engine, self._lock) as connection:
                return call(connection)

        return retrying(attempt)

    def _write(self, call: Callable[[sa.Connection], None]) -> None:
        def attempt() -> None:
            with self.storage.engine.begin() as connection:
                call(connection)

        retrying(attempt)

    def _renew(self, claim: Claim) -> None:
        if not retrying(partial(self._leases.renew, claim)):
            raise lost_error(claim)

    def _finish(
        self,
        claim: Claim,
        state: TrialState,
        attrs: Mapping[str, JSON],
        value: float | None = None,
    ) -> None:
        # Renewing is the fence: no other worker takes over for a full ttl, enough for the rest.
        self._renew(claim)
        set_attribute = partial(self.storage.set_trial_user_attr, claim.trial_id)
        try:
            # Before the value: a finished trial accepts no attributes.
            for key, stored in attrs.items():
                retrying(partial(set_attribute, key, stored))
            retrying(
                partial(self.study.tell, claim.number, value, state=state, skip_if_finished=True)
            )
        except UpdateFinishedTrialError:
            _log.warning("trial %d was finished before; its first result stands", claim.number)
        retrying(partial(self._leases.drop, claim))


@dataclass(frozen=True, slots=True)
class _Claimer:
    """Picks the trial to work on, through the connection that holds the study's lock.

    On PostgreSQL the connection that holds the lock is in a transaction, and Optuna writes through
    its own connections. The lease is taken last, so that the two never wait for each other.
    """

    ledger: Ledger
    leases: Leases
    connection: sa.Connection
    asking: _Asking
    budget: int

    @property
    def study(self) -> optuna.Study:
        """The Optuna study."""
        return self.ledger.study

    def claim(self) -> Claim | Wait | Done:
        """A trial to take over, else a new one, else ``Wait`` or ``Done``."""
        self.leases.note_server(self.connection)
        self.leases.sweep(self.connection)
        for row in self.leases.running(self.connection):
            if row.owner == self.asking.owner:
                # An earlier attempt of this call was committed, but its answer was lost.
                params = self._trial(row).params
                return self._claim(row, params, attempt=row.attempt, adopted=row.attempt > 1)
            if row.adoptable and (claim := self._adopt(row)):
                return claim
        self.leases.sweep(self.connection)
        return self._begin()

    def _begin(self) -> Claim | Wait | Done:
        params: dict[str, Any] = {}
        for _ in range(MAX_REFUSED_IN_A_ROW):
            counts = self.ledger.counts_in(self.connection, self.budget)
            if counts.waiting and self._refuse_unusable():
                continue
            planned_alone = self.asking.sampler is None and not counts.waiting
            if counts.started >= self.budget or planned_alone:
                return Wait() if counts.running else Done()
            begun = self.leases.count_begun(self.connection)
            self.study.sampler = self.asking.sampler_at(begun)
            trial = self.study.ask(fixed_distributions=dict(self.asking.space))
            params = trial.params
            row = RunningRow(trial_id=trial._trial_id, number=trial.number)
            if self._within_bounds(trial) and (claim := self._take(row, params, adopted=False)):
                return claim
        raise InputError(
            f"{MAX_REFUSED_IN_A_ROW} suggestions in a row were beyond the bound on the largest "
            f"branch weight, the last one {params}; raise that bound or lower the upper limits "
            "of the search space"
        )

    def _refuse_unusable(self) -> bool:
        """Fail trials that another program planned outside the space; whether there were any."""
        storage, key = self.study._storage, self.ledger.key
        waiting = storage.get_all_trials(key, deepcopy=False, states=(TrialState.WAITING,))
        refused = [trial for trial in waiting if not self.asking.fits(asked_of(trial))]
        for trial in refused:
            _log.warning("trial %d is not of this study's space: ignored", trial.number)
            storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        return bool(refused)

    def _adopt(self, row: RunningRow) -> Claim | None:
        """Take over a trial without a worker, or finish it if it must not run again."""
        if row.attempt == 0:
            started = self.ledger.counts_in(self.connection, self.budget).started
            if started > self.budget:
                self._drop_surplus(row)
                return None
        trial = self._trial(row)
        try:
            if not self._within_bounds(trial):
                return None
            if row.attempt + 1 - row.forgiven > self.ledger.max_attempts:
                self._poison(trial, row)
                return None
        except UpdateFinishedTrialError:
            # Its worker was only frozen and has just finished it.
            return None
        return self._take(row, trial.params, adopted=True)

    def _trial(self, row: RunningRow) -> optuna.Trial:
        """The trial of a row; suggests parameters that a dead worker left out."""
        self.study.sampler = self.asking.sampler_at(row.number)
        # Optuna's cache can write parameters only of trials that it has listed before.
        self.study.get_trials(deepcopy=False)
        trial = optuna.Trial(self.study, row.trial_id)
        for name, distribution in self.asking.space.items():
            trial._suggest(name, distribution)
        return trial

    def _within_bounds(self, trial: optuna.Trial) -> bool:
        """Whether the trial may run; if not, it is finished and counts nowhere."""
        constraint = self.asking.constraint
        beyond = 0.0 if constraint is None else constraint(trial.params)
        if beyond <= 0:
            return True
        trial.set_user_attr(OUT_OF_BOUNDS, True)
        if CONSTRAINT not in trial.constraints:
            trial.set_constraint(CONSTRAINT, beyond)
        self.study.tell(trial.number, state=TrialState.PRUNED, skip_if_finished=True)
        return False

    def _drop_surplus(self, row: RunningRow) -> None:
        """Finish a trial beyond the budget that no worker took.

        A claim started it and then lost the study's lock with its connection.
        """
        self.study._storage.set_trial_user_attr(row.trial_id, SURPLUS, True)
        self.study.tell(row.number, state=TrialState.FAIL, skip_if_finished=True)

    def _poison(self, trial: optuna.Trial, row: RunningRow) -> None:
        detail = (
            f"started {row.attempt} times, and no worker finished it (max_attempts is "
            f"{self.ledger.max_attempts}); last seen at: {row.progress or 'the start'}"
        )
        _log.warning("trial %d is given up: %s", row.number, detail)
        for key, value in _failure_attributes("poisoned", detail).items():
            trial.set_user_attr(key, value)
        self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def _take(self, row: RunningRow, params: Mapping[str, Any], *, adopted: bool) -> Claim | None:
        if not self.leases.take(self.connection, row, self.asking.owner):
            return None
        return self._claim(row, params, attempt=row.attempt + 1, adopted=adopted)

    def _claim(
        self, row: RunningRow, params: Mapping[str, Any], *, attempt: int, adopted: bool
    ) -> Claim:
        return Claim(
            trial_id=row.trial_id,
            number=row.number,
            params=params,
            attempt=attempt,
            tries=attempt - row.forgiven,
            owner=self.asking.owner,
            adopted=adopted,
        )
