"""A worker of a study: claims rows, given arms first, and works on each to its end.

Spec and rows come from the database.
"""

import functools
import random
import time
from dataclasses import dataclass
from pathlib import Path

from search.analysis.stop_rule import stop_or_plan
from search.errors import SpecChangedError
from search.spec.space import make_sampler, sampler_seed, search_space
from search.storage.ledger import Claim, Done, LeaseRenewal, Ledger, Wait
from search.study.arms import ROW_SPACE
from search.study.curve import enqueue_best, one_shot_pending
from search.study.results import TrialResult
from search.study.retention import keep_best_students
from search.study.study import FINGERPRINT, Study
from search.study.summary import copy_baselines
from search.study.trial_log import TrialLog
from search.worker.judge import Judge
from search.worker.lifecycle import work_on_row
from search.worker.trainer import Attempt, trainer_of

POLL_SECONDS, LONGEST_POLL_SECONDS = 1.0, 5.0
# Not the global generator, which seeded draws come from.
_jitter = random.Random()


@dataclass(frozen=True, slots=True)
class Claimed:
    """A row to work on, and ``time.perf_counter()`` when it was asked for."""

    ledger: Ledger
    claim: Claim
    asked: float


class Worker:
    """Claims rows of one study and works on them."""

    def __init__(self, study: Study) -> None:
        self._study = study
        # Given arms first. Once a search's baselines have ended they are not asked for again.
        self._asked = list(reversed(study.ledgers))
        # The study's spec, not the launcher's: another may have extended it meanwhile.
        self._spec = study.spec
        if self._spec.evaluation.images == "auto":
            raise SpecChangedError(
                f"the pilot of study {study.name!r} has yet to settle evaluation.images; "
                "launch it again"
            )
        plan = self._spec.plan
        self._awaits_curve = plan.one_shot is not None
        self._looks_ahead = plan.race > 0 or plan.stop or plan.short is not None
        self._ended: list[int] = []
        self._trainer = trainer_of(self._spec).open(study, self._spec)

    def claim(self) -> Claimed | None:
        """The next row, after waiting for one if need be; None once all have ended.

        Given arms come first: of a search these are the baselines, something to beat.
        """
        began = time.perf_counter()
        while True:
            asked, ended = time.perf_counter(), True
            self._plan_ahead()
            for ledger in tuple(self._asked):
                found = Wait() if self._waits(ledger) else self._ask(ledger)
                if isinstance(found, Claim):
                    return Claimed(ledger, found, asked)
                if not isinstance(found, Done):
                    ended = False
                elif ledger is not self._study.main and not self._looks_ahead:
                    self._asked.remove(ledger)
            if ended and not self._plan_ahead():
                return None
            time.sleep(pause_after(time.perf_counter() - began))

    def _waits(self, ledger: Ledger) -> bool:
        """Whether trials wait for the one-shot training; its best points are planned when it ends.

        If it failed, all trials are the sampler's.
        """
        if ledger is not self._study.trials or not self._awaits_curve:
            return False
        self._awaits_curve = one_shot_pending(self._study)
        if not self._awaits_curve:
            enqueue_best(self._study)
        return self._awaits_curve

    def _plan_ahead(self) -> bool:
        """Once rows have ended, end the search or plan given rows; whether one was planned.

        Rows that are planned already come first.
        """
        if not self._looks_ahead:
            return False
        counts = [ledger.counts() for ledger in self._study.ledgers]
        ended = [each.ended for each in counts]
        if ended == self._ended or counts[-1].waiting:
            return False
        planned = stop_or_plan(self._study)
        if not planned:
            self._ended = ended
        return planned

    def _ask(self, ledger: Ledger) -> Claim | Wait | Done:
        """Ask a ledger for a row."""
        if ledger is self._study.given:
            return ledger.claim(ROW_SPACE, None)
        space, sampler = search_space(self._spec), functools.partial(make_sampler, self._spec)
        bounded, branches = self._spec.space, self._spec.resolved.num_branches
        return ledger.claim(space, sampler, lambda params: bounded.excess(params, branches))

    def work(self, claimed: Claimed) -> None:
        """Train and measure a row, or give it back; a search keeps its best students only.

        Raises:
            LeaseLostError: Another worker took it over; nothing was stored.
        """
        study, ledger, claim = self._study, claimed.ledger, claimed.claim
        self._require_same_conditions(claimed)
        is_trial = ledger is study.trials
        task = study.task(ledger, claim.params)
        judge = Judge(self._spec, ledger, claim, prunes=is_trial)

        def work(holding: LeaseRenewal, folder: Path, log: TrialLog) -> TrialResult:
            # While the lease is held: it may take longer than one lasts.
            self._trainer.ready(task)
            result = self._trainer.run(
                Attempt(
                    task=task,
                    folder=folder,
                    check=holding.check,
                    report=holding.report,
                    judge=judge,
                    log=log,
                )
            )
            if is_trial:
                result.seeds["sampler"] = sampler_seed(self._spec, claim.number)
            return result

        work_on_row(
            ledger, claim, work, fingerprint=self._trainer.fingerprint, asked=claimed.asked
        )
        if is_trial:
            keep_best_students(ledger, self._spec.keep_students, claim.number)
        else:
            copy_baselines(study)

    def _require_same_conditions(self, claimed: Claimed) -> None:
        """Refuse to measure under another fingerprint than the study's, and release the row."""
        mine, main = self._trainer.fingerprint, self._study.main
        stored = main.attribute(FINGERPRINT)
        if stored != mine:
            claimed.ledger.release(claimed.claim, interrupted=True)
            raise SpecChangedError(
                f"a worker measures under other conditions (fingerprint {mine}) than study "
                f"{main.name} has ({stored}): another launch changed the study before "
                "its first trial, or the worker runs another version of bdense; launch again"
            )


def pause_after(waited: float) -> float:
    """Seconds to the next try: about a tenth of the time waited, within 1 to 5.

    Hundreds of idle workers may compete for the lock with those that have work.
    """
    pause = min(max(POLL_SECONDS, waited / 10), LONGEST_POLL_SECONDS)
    return pause * _jitter.uniform(0.8, 1.2)
