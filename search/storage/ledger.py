"""The lease ledger: one planned trial is one row of Optuna's table for its whole life.

Any number of processes share a study's budget through the database alone. ``Ledger.claim`` takes
over the trial of a dead worker before it asks for a new one; only the holder of a trial's lease
may finish it; what was told first stays.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, Self, TypeAlias

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from search.storage.claims import Asking, Claimer, Done, Wait, failure_attributes
from search.storage.engine import exclusive, retrying
from search.storage.lease_renewal import Holding, lost_error
from search.storage.leases import Claim
from search.storage.reader import LedgerReader
from search.storage.rows import NOT_COUNTED
from search.storage.schema import open_tables
from search.storage.settings import (
    DEFAULT_MAX_ATTEMPTS,
    JSON,
    check_settings,
    lock_name,
    open_study,
    record_change,
    require_file,
)
from search.storage.stop_flags import HALT, Launch, Stops, stopped_error

__all__ = ["Claim", "Done", "FailureReason", "Holding", "Ledger", "Wait"]

_log = logging.getLogger(__name__)

FailureReason: TypeAlias = Literal["diverged", "out of memory", "error", "poisoned"]
# Those that the user can mend before the same is asked for again.
MENDABLE: tuple[FailureReason, ...] = ("out of memory", "error", "poisoned")

_NOTHING: Mapping[str, JSON] = MappingProxyType({})


class Ledger(LedgerReader):
    """The trials of one study, shared by every process that opens it.

    Make it by ``open``, or by ``open_reading`` where it is only looked at.
    """

    def __init__(
        self, storage: RDBStorage, study: optuna.Study, attributes: Mapping[str, Any]
    ) -> None:
        super().__init__(storage, study, attributes)
        self.max_attempts = int(attributes.get("max_attempts", DEFAULT_MAX_ATTEMPTS))
        # Whoever is part of no launch ends with what is asked from now on.
        self.launch = Launch(name="", stops=Stops.of(attributes.get(HALT)).count)
        self._lock = lock_name(study.study_name)
        self._claimer = Claimer(study, self._leases, self.max_attempts)
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
    ) -> Self:
        """Open a study, creating it and its tables if a budget is given.

        Args:
            url: the storage, as ``resolve_storage_url`` gives it.
            study_name: the study.
            budget: trials to run in all, shared by every launcher. None keeps the one stored.
            ttl: seconds a lease lasts without being renewed; None keeps the one stored, 60 at
                first.
            max_attempts: times a trial may be started before it counts as poisoned; None keeps
                the number stored, 3 at first.

        A setting that differs from the one stored replaces it, and the study's attribute
        ``changes`` says so.

        Raises:
            StorageError: the database cannot be opened.
            UnknownStudyError: no budget was given and there is no such study.
            InputError: a setting is out of range.
        """
        check_settings(budget=budget, ttl=ttl, max_attempts=max_attempts)
        if budget is None:
            require_file(url, study_name)
        storage = open_tables(url)
        given = {"budget": budget, "ttl": ttl, "max_attempts": max_attempts}
        return cls._of(storage, retrying(partial(open_study, storage, study_name, given)))

    def record_change(self, key: str, old: JSON, new: JSON) -> None:
        """Append to the study's attribute ``changes`` that a setting is no longer what it was."""

        def append() -> None:
            with exclusive(self._storage.engine, self._lock):
                record_change(self.study, key, old, new)

        retrying(append)

    def enqueue(
        self,
        params: Mapping[str, Any],
        attrs: Mapping[str, JSON] = _NOTHING,
        *,
        again: Sequence[FailureReason] = (),
    ) -> bool:
        """Plan a trial with these parameters before any other; twice the same is once.

        It counts in the budget when it starts.

        Args:
            params: as they are, bit for bit: Optuna itself takes nearly equal numbers for equal.
            attrs: stored with it.
            again: one that failed for such a reason is no trial, and is planned anew.

        Returns:
            Whether it is planned by this call.
        """

        def add() -> bool:
            with exclusive(self._storage.engine, self._lock):
                over = (*again, NOT_COUNTED)
                if any(
                    asked == params and reason not in over for asked, reason in self._rows.asked()
                ):
                    return False
                self.study.enqueue_trial(dict(params), dict(attrs))
                return True

        return retrying(add)

    def change(self, key: str, to: Callable[[Any], JSON]) -> None:
        """Replace the study's attribute of that name by what ``to`` makes of it.

        ``to`` may be called again with what it made itself: the first answer was lost.
        """

        def write() -> None:
            with exclusive(self._storage.engine, self._lock):
                self.study.set_user_attr(key, to(self.study.user_attrs.get(key)))

        retrying(write)

    def extend_list(self, key: str, values: Sequence[JSON]) -> bool:
        """Store a list as the study's attribute, if it begins with the one that is there.

        Returns:
            Whether it does; else nothing is written.
        """

        def write() -> bool:
            with exclusive(self._storage.engine, self._lock):
                stored = list(self.study.user_attrs.get(key, []))
                if list(values[: len(stored)]) != stored:
                    return False
                self.study.set_user_attr(key, list(values))
                return True

        return retrying(write)

    def delete(self) -> None:
        """Delete the study and all its trials; nobody may be at work on one."""
        name = self.study.study_name
        retrying(lambda: optuna.delete_study(study_name=name, storage=self._storage))

    def resize(self) -> None:
        """Make the budget that of the trials that were planned, by whomever."""

        def write() -> None:
            with exclusive(self._storage.engine, self._lock):
                self.study.set_user_attr("budget", self._rows.count())

        retrying(write)

    def claim(
        self,
        space: Mapping[str, BaseDistribution],
        sampler: Callable[[int], BaseSampler] | None,
        constraint: Callable[[dict[str, Any]], float] | None = None,
    ) -> Claim | Wait | Done:
        """Take a trial: one whose worker is gone, else a planned one, else a new one.

        Args:
            space: what is suggested, name to distribution.
            sampler: makes the sampler from an offset to its seed: the number of trials started
                before, so that no two claims draw alike. None begins planned trials alone.
            constraint: how far parameters are beyond the bound; above 0 the trial is finished at
                once as pruned, outside the budget, and another one is asked.

        Returns:
            The claim; or ``Wait`` while others run; or ``Done``.

        Raises:
            StoppedError: the study, or this launch's workers, were asked to stop.
            InputError: 200 suggestions in a row were beyond the bound.
            StorageError: the database stayed away.
        """
        asking = Asking(space=space, sampler=sampler, constraint=constraint)
        if not self._warm:
            # Under the lock everybody would wait for it: seconds for 10,000 trials.
            retrying(self._claimer.load_trials)
            self._warm = True

        def attempt() -> Claim | Wait | Done:
            with exclusive(self._storage.engine, self._lock) as connection:
                stored = self.study.user_attrs
                if Stops.of(stored.get(HALT)).reaches(self.launch):
                    raise stopped_error(self.study.study_name)
                return self._claimer.claim(connection, asking, int(stored["budget"]))

        return retrying(attempt)

    def holding(self, claim: Claim) -> Holding:
        """A context manager that keeps the claim's lease alive while the trial is worked on."""
        return Holding(self._leases, claim, self.study.study_name, self.launch)

    def complete(self, claim: Claim, value: float, attrs: Mapping[str, JSON]) -> None:
        """Finish with a value, lower is better; one that is not finite is a failure: diverged.

        Raises:
            LeaseLostError: another worker took the trial over; nothing was told.
        """
        if math.isfinite(value):
            self._finish(claim, TrialState.COMPLETE, attrs, value)
        else:
            self.fail(claim, "diverged", f"the value is {value}", attrs)

    def report(self, claim: Claim, step: int, value: float) -> None:
        """Store a value on the way to the last one; a step told again is written anew.

        Raises:
            LeaseLostError: another worker took the trial over; nothing was told.
        """
        if not retrying(partial(self._leases.renew, claim)):
            raise lost_error(claim)
        retrying(partial(self._storage.set_trial_intermediate_value, claim.trial_id, step, value))

    def prune(self, claim: Claim, attrs: Mapping[str, JSON]) -> None:
        """Finish as not worth going on with.

        Raises:
            LeaseLostError: another worker took the trial over; nothing was told.
        """
        self._finish(claim, TrialState.PRUNED, attrs)

    def fail(
        self, claim: Claim, reason: FailureReason, detail: str, attrs: Mapping[str, JSON]
    ) -> None:
        """Finish without a value; the trial counts in the budget and samplers do not see it.

        ``detail`` is stored without passwords, at most 2000 characters of it.

        Raises:
            LeaseLostError: another worker took the trial over; nothing was told.
        """
        self._finish(claim, TrialState.FAIL, {**attrs, **failure_attributes(reason, detail)})

    def release(self, claim: Claim, *, interrupted: bool = False) -> None:
        """Give the trial back unfinished, for anybody to go on with at once.

        Args:
            claim: what is given back.
            interrupted: nothing was wrong with it (Ctrl-C, a machine going down): this attempt
                is not held against it.

        Raises:
            LeaseLostError: another worker took the trial over already.
        """
        if not retrying(partial(self._leases.release, claim, forgive=interrupted)):
            raise lost_error(claim)

    def forgive_running(self) -> None:
        """The launcher was interrupted: no running trial is to blame for the end of its attempt.

        Nothing is released; that is for whoever finds the workers gone.
        """

        def write() -> None:
            with self._storage.engine.begin() as connection:
                self._leases.forgive(connection)

        retrying(write)

    def _finish(
        self,
        claim: Claim,
        state: TrialState,
        attrs: Mapping[str, JSON],
        value: float | None = None,
    ) -> None:
        # Renewing is the fence: nobody else adopts for a full ttl, enough for what follows.
        if not retrying(partial(self._leases.renew, claim)):
            raise lost_error(claim)
        set_attribute = partial(self._storage.set_trial_user_attr, claim.trial_id)
        try:
            # Before the value: a finished trial takes no more attributes.
            for key, stored in attrs.items():
                retrying(partial(set_attribute, key, stored))
            retrying(
                partial(self.study.tell, claim.number, value, state=state, skip_if_finished=True)
            )
        except UpdateFinishedTrialError:
            _log.warning("trial %d was finished before; its first result stands", claim.number)
        retrying(partial(self._leases.drop, claim))
