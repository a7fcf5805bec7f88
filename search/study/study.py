"""A study's record in a storage: its spec, its arms and the ledgers of its rows.

A search has two ledgers: the trials that a sampler proposes, and its baselines, which are given
arms in an Optuna study of their own. A study of given arms has one.
"""

import itertools
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any, Self

from optuna.exceptions import ExperimentalWarning

from search.errors import (
    NoSearchError,
    OutdatedStudyError,
    SpecChangedError,
    UnknownStudyError,
)
from search.spec.contents import flatten
from search.spec.file import read_stored
from search.spec.study import StudySpec
from search.storage.engine import retrying
from search.storage.ledger import MENDABLE, Ledger
from search.storage.own_study import BASELINES_SUFFIX
from search.storage.queries import Counts, StoredTrial, asked_of
from search.study.arms import ROW_SPACE, Arm, ArmRow, Task, baseline_arms, one_shot_arm

# Attributes of the Optuna study.
SPEC, CONDITIONS, FINGERPRINT = "spec", "conditions", "fingerprint"
TRAJECTORIES, BASELINE_RESULTS = "trajectories", "baselines"
TEACHER = "teacher_sha256"  # of the first worker's; others must have the same
GPU_BYTES = "gpu_bytes"  # that a trial takes of each of its GPUs, as measured by the preparation
ARMS, VARIANTS, FACTS = "arms", "variants", "facts"
# Fractions and images of the intermediate FIDs that are stored.
INTERMEDIATE = "intermediate"
# A confirmation has the numbers of trials and candidates at the last choice, and the variant
# that is judged.
CHOSEN_AFTER, JUDGED = "chosen_after", "judged_variant"
# The form of all these; storage upgrade brings older ones over.
FORMAT, CURRENT = "format", 2
# The ledger records changes of these itself.
_LEDGER_SETTINGS = ("plan.trials", "resources.lease_seconds", "resources.max_attempts")


@dataclass(frozen=True, slots=True)
class Study:
    """One study in one storage.

    Attributes:
        url: The storage; it may hold a password, show ``redact`` of it.
        trials: What a sampler proposes; None for a study of given arms.
        given: Rows of given arms, of a search its baselines; None where they were not planned.
    """

    url: str
    trials: Ledger | None
    given: Ledger | None

    @classmethod
    def open(cls, url: str, name: str, *, reading: bool = False) -> Self:
        """A study that exists; ``reading`` writes nothing, nor needs the right to.

        Raises:
            UnknownStudyError: There is none of that name, or it is incomplete.
            OutdatedStudyError: An older version made it.
            StorageError: The database cannot be opened.
        """
        if name.endswith(BASELINES_SUFFIX):
            raise UnknownStudyError(
                f"{name!r} holds the baselines of a study; give the study itself: "
                f"{name.removesuffix(BASELINES_SUFFIX)!r}"
            )
        found = Ledger.open_reading(url, name) if reading else Ledger.open(url, name, budget=None)
        return cls._of(url, found)

    def sibling(self, name: str) -> Self | None:
        """Another study of the same storage, through the same connections; None without it."""
        try:
            return type(self)._of(self.url, self.main.sibling(name))
        except UnknownStudyError:
            return None

    def reread(self) -> Self:
        """The study as it is now; another plan of its conditions may have replaced its rows.

        Raises:
            UnknownStudyError: It was deleted.
        """
        return self._of(self.url, self.main.sibling(self.name))

    @classmethod
    def _of(cls, url: str, found: Ledger) -> Self:
        name = found.name
        attributes = found.attributes()
        if SPEC not in attributes:
            raise UnknownStudyError(
                f"study {name!r} is incomplete; run the command that makes it again"
            )
        if attributes.get(FORMAT) != CURRENT:
            raise OutdatedStudyError(
                f"study {name!r} was made by an older version of bdense; upgrade it by "
                "`bdense-search storage upgrade`"
            )
        if ARMS in attributes:
            return cls(url, None, found)
        return cls(url, found, sibling_or_none(found, name + BASELINES_SUFFIX))

    @classmethod
    def create(cls, url: str, spec: StudySpec, *, of: str | None = None) -> Self:
        """The study of a resolved spec: new, or joined if its numbers stay comparable.

        ``of`` names the search that given arms come from, which must not change.

        Raises:
            SpecChangedError: The stored study has other conditions, which are named.
            InputError: Another version of bdense launched it, whose spec this one cannot read.
            StorageError: The database cannot be used.
        """
        try:
            stored: Self | None = cls.open(url, spec.name)
        except UnknownStudyError:
            stored = None
        before = None
        if stored is not None:
            before = stored.spec
            if stored.has_started():
                spec = spec.with_images(before.evaluation.num_images)
            if stored._forget_if_changed(spec, of):
                stored = before = None
        if spec.is_search:
            return cls._create_search(url, spec, before)
        # A smaller budget, even for a moment, would end others' workers.
        ledger = _ledger(url, spec, spec.name, 1 if stored is None else None)
        if stored is None:
            ledger.store({ARMS: [], VARIANTS: [], FACTS: {} if of is None else {"of": of}})
        _store(ledger, spec, before)
        return cls(url, None, ledger)

    @classmethod
    def _create_search(cls, url: str, spec: StudySpec, before: StudySpec | None) -> Self:
        trials = _ledger(url, spec, spec.name, spec.search.points)
        _store(trials, spec, before)
        beside = spec.name + BASELINES_SUFFIX
        given = _ledger(url, spec, beside, 2 if sibling_or_none(trials, beside) is None else None)
        given.store({"of": spec.name})
        study = cls(url, trials, given)
        # First, as trials wait for it. What failed is tried again in new rows.
        if (one_shot := one_shot_arm(spec)) is not None:
            study.plan([one_shot], [spec.seeds.training])
        study.plan(baseline_arms(spec), spec.baseline_seeds)
        if (change := spec.search.changes_when_short(spec)) is not None:
            # Of uniform weights first, which are measured at full length anyway.
            study.plan(baseline_arms(spec)[-1:], [spec.seeds.training], [change])
        return study

    @property
    def main(self) -> Ledger:
        """The ledger whose Optuna study has the name and the attributes."""
        ledger = self.trials or self.given
        assert ledger is not None
        return ledger

    @property
    def name(self) -> str:
        """The study's name."""
        return self.main.name

    @property
    def is_search(self) -> bool:
        """Whether a sampler proposes its points."""
        return self.trials is not None

    @property
    def title(self) -> str:
        """Its name in a sentence: ``study NAME`` for a search."""
        return f"study {self.name}" if self.is_search else self.name

    @property
    def noun(self) -> str:
        """What a row of the main ledger is called."""
        return "trial" if self.is_search else "row"

    @property
    def given_noun(self) -> str:
        """What the rows of a search's given arms are called."""
        plan = self.spec.search
        kinds = {"replicates": plan.race > 0, "short trainings": plan.short is not None}
        return ", ".join(["baselines", *(name for name, is_there in kinds.items() if is_there)])

    @property
    def baselines(self) -> Ledger | None:
        """A search's baselines, replicates and short trainings; None if none were planned."""
        return self.given if self.is_search else None

    @property
    def search(self) -> Ledger:
        """The trials of a search.

        Raises:
            NoSearchError: It is a study of given arms.
        """
        if self.trials is None:
            results = f"see its results by `bdense-search report {self.name}`"
            way_out = f"give the search itself: {self.of}" if self.of else results
            raise NoSearchError(f"{self.name!r} measures given arms and has no search; {way_out}")
        return self.trials

    @property
    def ledgers(self) -> tuple[Ledger, ...]:
        """The ledgers that this study has: trials, then arms."""
        return tuple(each for each in (self.trials, self.given) if each is not None)

    @property
    def spec(self) -> StudySpec:
        """The spec that the last launch stored.

        Raises:
            InputError: Another version of bdense stored it.
        """
        return read_stored(self.name, str(self.main.attribute(SPEC)))

    @property
    def of(self) -> str | None:
        """Name of the search that given arms come from; None where there is none."""
        name: str | None = (self.main.attribute(FACTS) or {}).get("of")
        return name

    @property
    def arms(self) -> list[Arm]:
        """Given arms, indexed by ``ArmRow.arm``."""
        return [Arm(**each) for each in self._given(ARMS)]

    @property
    def variants(self) -> list[dict[str, Any]]:
        """Changes of the method's settings, indexed by ``ArmRow.variant``."""
        return list(self._given(VARIANTS))

    def plan(
        self,
        arms: Sequence[Arm],
        seeds: Sequence[int],
        variants: Sequence[Mapping[str, Any]] = ({},),
    ) -> None:
        """Add the rows that are missing of given arms under each training seed and variant.

        A row that ran out of memory or failed by an error is planned again.

        Raises:
            SpecChangedError: Another command has added arms meanwhile.
        """
        assert self.given is not None
        known, changes = self.arms, self.variants
        new = [arm for arm in arms if arm not in known]
        known += new
        changes += [dict(each) for each in variants if dict(each) not in changes]
        # Where no arm is new it does not matter what others add, as a race does all the time.
        added = not new or self.given.extend_list(ARMS, [asdict(arm) for arm in known])
        if not (added and self.given.extend_list(VARIANTS, changes)):
            raise SpecChangedError(
                f"another command has added arms to {self.name!r} meanwhile; run this one again"
            )
        self._plan_rows(
            ArmRow(arm=known.index(arm), seed=seed, variant=changes.index(dict(change)))
            for change, seed, arm in itertools.product(variants, seeds, arms)
        )

    def plan_failed_again(self) -> None:
        """Plan rows of given arms again that ran out of memory or failed by an error."""
        self._plan_rows(row for row, _ in self.rows())

    def _plan_rows(self, rows: Iterable[ArmRow]) -> None:
        assert self.given is not None
        arms = self.arms
        for row in rows:
            self.given.enqueue(asdict(row), {"arm": arms[row.arm].name}, again=MENDABLE)
        self.given.resize(ROW_SPACE)

    def plan_row(
        self, arm: Arm, seed: int, change: Mapping[str, Any] = MappingProxyType({}), *, seen: int
    ) -> bool:
        """Add one row, if there are still the ``seen`` rows that it was chosen after.

        ``change`` is a variant that rows have already.

        Returns:
            Whether it was added; False where another process was first.
        """
        assert self.given is not None
        known = self.arms
        known += [arm] if arm not in known else []
        variant = self.variants.index(dict(change))
        row = ArmRow(arm=known.index(arm), seed=seed, variant=variant)
        stored = self.given.extend_list(ARMS, [asdict(each) for each in known])
        return stored and self.given.enqueue_next(asdict(row), {"arm": arm.name}, seen=seen)

    def task(self, ledger: Ledger, params: Mapping[str, Any]) -> Task:
        """The task of a row of one of its ledgers."""
        spec = self.spec
        if ledger is not self.given:
            return Task(
                params=dict(params), seed=spec.seeds.training, latents=spec.seeds.evaluation
            )
        row = ArmRow(**params)
        arm = self.arms[row.arm]
        return Task(
            params=arm.params,
            seed=row.seed,
            latents=row.seed if spec.plan.latents == "fresh" else spec.seeds.evaluation,
            variant=self.variants[row.variant],
            arm=arm.name,
        )

    def proposed(self) -> list[tuple[dict[str, Any], bool]]:
        """Parameters of each trial of a search, and whether it has ended."""
        return _asked(self.search)

    def rows(self) -> list[tuple[ArmRow, bool]]:
        """Each planned row of a given arm, and whether it has ended."""
        if self.given is None:
            return []
        asked, names = _asked(self.given), ROW_SPACE.keys()
        return [(ArmRow(**params), ended) for params, ended in asked if params.keys() == names]

    def complete_arms(self) -> list[tuple[Arm, ArmRow, StoredTrial]]:
        """Rows of given arms that have a result, in order, each with its arm."""
        found = [] if self.given is None else self.given.rows()
        rows, arms = [ArmRow(**trial.params) for trial in found], self.arms
        return [(arms[row.arm], row, trial) for row, trial in zip(rows, found, strict=True)]

    def tasks_left(self) -> list[Task]:
        """The tasks of rows that have not ended, without their weights; each once."""
        tasks = [] if self.trials is None else [self.task(self.trials, {})]
        for row in [row for row, ended in self.rows() if not ended]:
            assert self.given is not None
            task = replace(self.task(self.given, asdict(row)), params={}, arm=None)
            if task not in tasks:
                tasks.append(task)
        return tasks

    def counts(self) -> Counts:
        """Counts of the main ledger."""
        return self.main.counts()

    def left(self) -> int:
        """Rows that have not ended."""
        counts = [ledger.counts() for ledger in self.ledgers]
        return sum(each.planned - each.ended for each in counts)

    def has_started(self) -> bool:
        """Whether anything was ever begun; until then its conditions may change."""
        counts = [ledger.counts() for ledger in self.ledgers]
        return any(each.started for each in counts)

    def forgive_running(self) -> None:
        """Do not count this attempt of running rows."""
        for ledger in self.ledgers:
            ledger.forgive_running()

    def refuse_other_conditions(self, spec: StudySpec) -> None:
        """Refuse a resolved spec whose numbers would not compare with those measured.

        Raises:
            SpecChangedError: It has other conditions than those stored.
        """
        self._refuse_changed(spec, self.of)

    def _refuse_changed(self, spec: StudySpec, of: str | None) -> None:
        if spec.evaluation.images == "auto":
            spec = spec.with_images(self.spec.evaluation.num_images)
        changed = self._changed(spec, of)
        if changed and self.has_started():
            raise SpecChangedError(
                f"study {spec.name!r} exists under other conditions, so its numbers would not "
                f"compare ({'; '.join(changed)}); rename the study or restore the file"
            )
        stored, now = self.main.attribute(INTERMEDIATE), intermediate_of(spec)
        if stored is not None and now is not None and stored != now and self.has_started():
            raise SpecChangedError(
                f"study {spec.name!r} has intermediate FIDs measured otherwise, which would not "
                f"compare (plan.at {stored['at']} of {stored['images']} images stored, "
                f"{now['at']} of {now['images']} given); restore them, or drop plan.at"
            )

    def _forget_if_changed(self, spec: StudySpec, of: str | None) -> bool:
        """Delete what was planned under other conditions, if no row was ever begun.

        Returns:
            Whether the whole study was deleted; a search keeps its enqueued points.

        Raises:
            SpecChangedError: Numbers were measured under other conditions.
        """
        old, new = ("a search" if each.is_search else "given arms" for each in (self, spec))
        if old != new:
            raise SpecChangedError(
                f"study {spec.name!r} exists and is {old}, not {new}; choose another name"
            )
        self._refuse_changed(spec, of)
        changed = bool(self._changed(spec, of))
        if changed and self.given is not None:
            self.given.delete()
        return changed and self.given is self.main

    def _changed(self, spec: StudySpec, of: str | None) -> list[str]:
        """Each condition that differs from the stored one, for people."""
        old = {**json.loads(self.main.attribute(CONDITIONS)), "of": self.of}
        new = {**spec.conditions(), "of": of}
        return [
            f"{key}: {old.get(key)!r} stored, {new.get(key)!r} given"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
        ]

    def _given(self, key: str) -> list[Any]:
        return [] if self.given is None else list(self.given.attribute(key) or [])


def intermediate_of(spec: StudySpec) -> dict[str, Any] | None:
    """Fractions and images of a search's intermediate FIDs; None where there are none."""
    if not spec.plan.at:
        return None
    images = spec.plan.images or spec.evaluation.num_images
    return {"at": list(spec.plan.at), "images": images}


def sibling_or_none(ledger: Ledger, name: str) -> Ledger | None:
    """The ledger of another study of the same storage, if there is one."""
    try:
        return ledger.sibling(name)
    except UnknownStudyError:
        return None


def _asked(ledger: Ledger) -> list[tuple[dict[str, Any], bool]]:
    """Parameters of each row, and whether it has ended."""
    trials = retrying(lambda: ledger.study.get_trials(deepcopy=False))
    return [(asked_of(trial), trial.state.is_finished()) for trial in trials]


def _ledger(url: str, spec: StudySpec, name: str, budget: int | None) -> Ledger:
    return Ledger.open(
        url,
        name,
        budget=budget,
        ttl=spec.resources.lease_seconds,
        max_attempts=spec.resources.max_attempts,
        maximise=spec.metric.maximise,
    )


def _store(ledger: Ledger, spec: StudySpec, before: StudySpec | None) -> None:
    """Write the spec into the study, where workers read it, and record what it changes."""
    new = spec.as_dict()
    if before is not None:
        old = flatten(before.as_dict())
        for key, value in flatten(new).items():
            if old.get(key) != value and key not in _LEDGER_SETTINGS:
                ledger.record_change(key, old.get(key), value)
    if (intermediate := intermediate_of(spec)) is not None:
        ledger.store({INTERMEDIATE: intermediate})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        # In the dashboard.
        retrying(lambda: ledger.study.set_metric_names([spec.metric.name]))
    ledger.store(
        {
            CONDITIONS: json.dumps(spec.conditions()),
            FINGERPRINT: spec.fingerprint(),
            FORMAT: CURRENT,
            SPEC: json.dumps(new),  # last: a study without it is incomplete
        }
    )
