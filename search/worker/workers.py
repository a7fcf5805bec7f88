"""What a slot does with each kind of row: claims it, and knows how to work on it.

A worker takes its orders from the database: the spec is the study's, the rows are the ledger's.
"""

import functools
import logging
import platform
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.errors import InputError
from bdense.models.store import denoiser_sha256
from search.analysis.retraining import variant
from search.errors import SpecChangedError, UnpreparedError
from search.spec.promotion_spec import PromotionSpec
from search.spec.space import baseline_space, make_sampler, search_space
from search.spec.study_spec import StudySpec
from search.storage.engine import retrying
from search.storage.ledger import Claim, Done, Holding, Ledger
from search.study.arms import SPACES, Planned, PlannedRow
from search.study.opening import stored_spec
from search.study.retention import keep_best_students
from search.study.study import FINGERPRINT, TEACHER, TRAJECTORIES, Study
from search.study.summary import copy_baselines
from search.study.trial_log import TrialLog
from search.worker import chain_trial
from search.worker.assets import Assets, load, use_device
from search.worker.chain_trial import ChainAssets, load_chain
from search.worker.engine import excess_weight
from search.worker.pruning import Judge, judge_of
from search.worker.trial import bring_to_an_end, train_and_measure

_log = logging.getLogger(__name__)

POLL_SECONDS, LONGEST_POLL_SECONDS = 1.0, 5.0
# Not the global generator, which seeded draws come from.
_jitter = random.Random()


@dataclass(frozen=True, slots=True)
class Claimed:
    """A row to work on, and ``time.perf_counter()`` when it was asked for."""

    ledger: Ledger
    claim: Claim
    asked: float


class Worker(Protocol):
    """Takes rows of one study and brings them to their end."""

    def claim(self) -> Claimed | None:
        """The next row, after waiting for one if need be; None once all have ended."""
        ...

    def work(self, claimed: Claimed) -> None:
        """Bring it to its end, or give it back.

        Raises:
            LeaseLostError: Another worker took it over; nothing was told.
        """
        ...


class SearchWorker:
    """Baselines, then trials of a search."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._baselines_ended = False  # for good: nobody plans more of them
        # The study's spec, not the launcher's: another may have extended it meanwhile.
        self._spec = stored_spec(study.trials)
        # Recorded by the launch where the cache is shared, by each machine where it is its own.
        self._assets = load(self._spec, use_device(self._spec), record=True)
        _require_same_teacher(study.trials, self._assets.teacher)
        if self._assets.store is not None:
            folder = str(self._assets.store.folder.resolve())
            retrying(lambda: study.trials.study.set_user_attr(TRAJECTORIES, folder))

    def claim(self) -> Claimed | None:
        """Baselines first, as something to beat."""
        study, spec, began = self._study, self._spec, time.perf_counter()
        assert study.baselines is not None  # a launch plans them
        while True:
            asked = time.perf_counter()
            if not self._baselines_ended:
                first = study.baselines.claim(baseline_space(), None)
                if isinstance(first, Claim):
                    return Claimed(study.baselines, first, asked)
                self._baselines_ended = isinstance(first, Done)
            then = study.trials.claim(
                search_space(spec),
                functools.partial(make_sampler, spec),
                functools.partial(excess_weight, spec),
            )
            if isinstance(then, Claim):
                return Claimed(study.trials, then, asked)
            if self._baselines_ended and isinstance(then, Done):
                return None
            time.sleep(pause_after(time.perf_counter() - began))

    def work(self, claimed: Claimed) -> None:
        """Train, measure, and keep the best students' files alone."""
        assets, ledger = self._assets, claimed.ledger
        _require_same_conditions(self._study.trials, claimed, assets.fingerprint)
        # A baseline is there to be beaten, not to be given up.
        is_trial = ledger is self._study.trials
        judge = judge_of(self._spec, ledger, claimed.claim) if is_trial else None

        def train(holding: Holding, folder: Path, log: TrialLog) -> dict[str, Any]:
            result = _evaluate(assets, claimed.claim.params, holding, folder, log, judge)
            drawn = (self._spec.seeds.sampler + claimed.claim.number) % 2**31
            result["attrs"]["seeds"] |= {"sampler": drawn}
            return result

        _end(claimed, train, assets.fingerprint)
        if is_trial:
            keep_best_students(ledger, self._spec.keep_students, claimed.claim.number)
        else:
            copy_baselines(self._study)


class RetrainWorker:
    """Students of SFD: an arm under a seed, at a budget and NFE."""

    def __init__(self, planned: Planned) -> None:
        self._planned = planned
        self._spec = planned.spec(StudySpec)
        self._assets: Assets | None = None

    def claim(self) -> Claimed | None:
        """The next planned row."""
        return _next_planned(self._planned)

    def work(self, claimed: Claimed) -> None:
        """Train and measure."""
        row = PlannedRow.of(claimed.claim.params)
        _require_same_conditions(self._planned.ledger, claimed, self._spec.fingerprint())
        spec, arm = variant(self._spec, row), self._planned.arms[row.arm]

        def train(holding: Holding, folder: Path, log: TrialLog) -> dict[str, Any]:
            # Loaded while the lease is held: another seed's may take longer than one lasts.
            result = _evaluate(self._of(spec), arm.params, holding, folder, log)
            result["attrs"] |= {"arm": arm.name, "kimg": row.kimg}
            return result

        _end(claimed, train, spec.fingerprint())

    def _of(self, spec: StudySpec) -> Assets:
        """What rows of that spec share; rows come seed by seed, so the last one's is kept."""
        if self._assets is None or self._assets.spec != spec:
            try:
                # A command given later may have planned rows that its own launch records.
                self._assets = load(spec, use_device(spec), record=True)
                _require_same_teacher(self._planned.ledger, self._assets.teacher)
            except InputError as error:
                raise UnpreparedError(f"on {platform.node()}: {error}") from error
            self._note_trajectories(self._assets)
        return self._assets

    def _note_trajectories(self, assets: Assets) -> None:
        """Where they lie, for ``clean``; each seed has its own."""
        if assets.store is None:
            return
        study, folder = self._planned.ledger.study, str(assets.store.folder.resolve())
        known = retrying(lambda: study.user_attrs).get(TRAJECTORIES, [])
        if folder not in known:
            retrying(lambda: study.set_user_attr(TRAJECTORIES, [*known, folder]))


class ChainWorker:
    """Chains of progressive distillation: an arm under a seed, round by round."""

    def __init__(self, planned: Planned) -> None:
        self._planned = planned
        spec = planned.spec(PromotionSpec)
        self._assets: ChainAssets = load_chain(spec, use_device(spec))
        _require_same_teacher(planned.ledger, self._assets.teacher)

    def claim(self) -> Claimed | None:
        """The next planned row."""
        return _next_planned(self._planned)

    def work(self, claimed: Claimed) -> None:
        """Distil and measure each round."""
        row, ledger, assets = PlannedRow.of(claimed.claim.params), claimed.ledger, self._assets
        _require_same_conditions(ledger, claimed, assets.fingerprint)
        arm = self._planned.arms[row.arm]

        def train(holding: Holding, folder: Path, log: TrialLog) -> dict[str, Any]:
            return chain_trial.train_and_measure(
                assets,
                arm,
                row.seed,
                folder,
                check=holding.check,
                report=holding.report,
                on_fid=functools.partial(ledger.report, claimed.claim),
                log=log,
            )

        _end(claimed, train, assets.fingerprint)


def pause_after(waited: float) -> float:
    """Seconds to the next try after so many: about a tenth of them, 1 to 5.

    Workers that find nothing to do, hundreds perhaps, take the lock of those who have something.
    """
    pause = min(max(POLL_SECONDS, waited / 10), LONGEST_POLL_SECONDS)
    return pause * _jitter.uniform(0.8, 1.2)


def _next_planned(planned: Planned) -> Claimed | None:
    began = time.perf_counter()
    while True:
        asked = time.perf_counter()
        found = planned.ledger.claim(SPACES[planned.kind], None)
        if isinstance(found, Claim):
            return Claimed(planned.ledger, found, asked)
        if isinstance(found, Done):
            return None
        time.sleep(pause_after(time.perf_counter() - began))


def _evaluate(
    assets: Assets,
    params: Mapping[str, Any],
    holding: Holding,
    folder: Path,
    log: TrialLog,
    judge: Judge | None = None,
) -> dict[str, Any]:
    check, report = holding.check, holding.report
    return train_and_measure(
        assets, params, folder, check=check, report=report, judge=judge, log=log
    )


def _end(
    claimed: Claimed, work: Callable[[Holding, Path, TrialLog], dict[str, Any]], fingerprint: str
) -> None:
    bring_to_an_end(
        claimed.ledger, claimed.claim, work, fingerprint=fingerprint, asked=claimed.asked
    )


def _require_same_teacher(of: Ledger, teacher: NetworkDenoiser) -> None:
    """A cache or a checkpoint that machines do not share may hold another teacher."""
    mine = denoiser_sha256(teacher)
    if of.attribute(TEACHER) is None:
        of.change(TEACHER, lambda stored: stored or mine)  # another may have been first
    stored = of.attribute(TEACHER)
    if stored != mine:
        raise SpecChangedError(
            f"the teacher on {platform.node()} has other weights (sha256 {mine[:12]}) than the "
            f"one that study {of.study.study_name} is measured with ({stored[:12]}), so its FIDs "
            "would not compare: give all machines one BDENSE_CACHE and the same checkpoint, or "
            "start a study of another name"
        )


def _require_same_conditions(of: Ledger, claimed: Claimed, mine: str) -> None:
    """A worker of other numerics, or of a spec replaced meanwhile, must not measure here."""
    stored = of.attribute(FINGERPRINT)
    if stored != mine:
        claimed.ledger.release(claimed.claim, interrupted=True)
        raise SpecChangedError(
            f"a worker measures under other conditions (fingerprint {mine}) than study "
            f"{of.study.study_name} has ({stored}): another launch changed the study before its "
            "first trial, or the worker runs another version of bdense; launch again"
        )
