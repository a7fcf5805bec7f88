"""A study's record: the ledgers of its trials and baselines, and which changes it takes."""

import functools
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import optuna
from optuna.exceptions import ExperimentalWarning

from search.errors import SpecChangedError, UnknownStudyError
from search.spec.model_spec import flatten
from search.spec.space import BASELINES
from search.spec.study_file import read_stored
from search.spec.study_spec import StudySpec
from search.storage.ledger import MENDABLE, Ledger
from search.storage.reader import Counts

# Attributes of the Optuna study.
SPEC, CONDITIONS, FINGERPRINT = "spec", "conditions", "fingerprint"
TRAJECTORIES, BASELINE_RESULTS = "trajectories", "baselines"
TEACHER = "teacher_sha256"  # of the first worker's; the same for all
KIND = "kind"  # of planned rows; a search has none
LOOKS = "looks"  # at which fractions of the budget, and how many images, since the first look
BASELINES_SUFFIX = ".baselines"
# The ledger records changes of its own settings itself.
_LEDGER_SETTINGS = ("budget.trials", "resources.lease_seconds", "resources.max_attempts")


@dataclass(frozen=True, slots=True)
class Study:
    """Trials and baselines of one name in one storage.

    Attributes:
        url: The storage; it may hold a password, show ``redact`` of it.
        trials: What is searched.
        baselines: Plain SFD and uniform weights; None where none were planned.
    """

    url: str
    trials: Ledger
    baselines: Ledger | None

    @classmethod
    def open(cls, url: str, name: str) -> Self:
        """A study that exists.

        Raises:
            UnknownStudyError: There is none of that name.
            StorageError: The database cannot be opened.
        """
        _refuse_baselines(name)
        return cls._of(url, Ledger.open(url, name, budget=None))

    @classmethod
    def open_reading(cls, url: str, name: str) -> Self:
        """The same, to look at: nothing can be changed through it."""
        _refuse_baselines(name)
        return cls._of(url, Ledger.open_reading(url, name))

    @classmethod
    def _of(cls, url: str, trials: Ledger) -> Self:
        try:
            baselines = trials.beside(baselines_name(trials.study.study_name))
        except UnknownStudyError:
            baselines = None
        return cls(url, trials, baselines)

    @classmethod
    def create(cls, url: str, spec: StudySpec) -> Self:
        """The study of that spec: new, or joined if its numbers stay comparable.

        Raises:
            SpecChangedError: The stored study has other conditions; says which.
            InputError: Another version of bdense launched it, whose spec this one cannot read.
            StorageError: The database cannot be used.
        """
        refuse_other_conditions(url, spec)
        stored = _stored(url, spec.name)
        # Read before anything is changed: it may be refused.
        before = None if stored is None else _spec_in(stored)
        open_ledger = functools.partial(
            Ledger.open,
            url,
            ttl=spec.resources.lease_seconds,
            max_attempts=spec.resources.max_attempts,
        )
        trials = open_ledger(spec.name, budget=spec.budget.trials)
        _store(trials, spec, before)
        beside = baselines_name(spec.name)
        known = _stored(url, beside) is not None
        baselines = open_ledger(beside, budget=None if known else len(BASELINES))
        baselines.study.set_user_attr("of", spec.name)
        # One that failed is tried again; its row stays and counts.
        for method in BASELINES:
            if baselines.enqueue({"method": method}, again=MENDABLE):
                baselines.resize()
        return cls(url, trials, baselines)

    @property
    def name(self) -> str:
        """The study's name."""
        return self.trials.study.study_name

    @property
    def ledgers(self) -> tuple[Ledger, ...]:
        """Of its trials and, where they were planned, its baselines."""
        return tuple(each for each in (self.trials, self.baselines) if each is not None)

    def counts(self) -> list[Counts]:
        """Of the trials, then of the baselines."""
        return [each.counts() for each in self.ledgers]

    def left(self) -> int:
        """Trials and baselines that have not ended."""
        return sum(counts.planned - counts.ended for counts in self.counts())

    def has_started(self) -> bool:
        """Whether anything was ever begun; until then its conditions may change."""
        return any(counts.ended + counts.running for counts in self.counts())

    def forgive_running(self) -> None:
        """An interruption counts against no trial."""
        for ledger in self.ledgers:
            ledger.forgive_running()


def baselines_name(name: str) -> str:
    """Name of the Optuna study that holds the baselines' rows."""
    return name + BASELINES_SUFFIX


def _refuse_baselines(name: str) -> None:
    if name.endswith(BASELINES_SUFFIX):
        raise UnknownStudyError(
            f"{name!r} holds the baselines of a study; give the study itself: "
            f"{name.removesuffix(BASELINES_SUFFIX)!r}"
        )


def refuse_other_conditions(url: str, spec: StudySpec) -> None:
    """Make sure that the stored study of that name, if it was begun, has the spec's conditions.

    Raises:
        SpecChangedError: It has others, says which; or it is no search.
    """
    try:
        study = Study.open(url, spec.name)
    except UnknownStudyError:
        return
    if study.trials.attribute(KIND) is not None:
        raise SpecChangedError(
            f"{spec.name!r} exists and holds planned rows, not a search; give the study another "
            "name"
        )
    # Until something is measured there is nothing to compare with: a mistake may be mended.
    if not study.has_started():
        return
    stored = json.loads(study.trials.attribute(CONDITIONS))
    if changed := differing_conditions(stored, spec.conditions()):
        raise SpecChangedError(
            f"study {spec.name!r} exists under other conditions, so its numbers would not "
            f"compare ({'; '.join(changed)}); rename the study or restore the file"
        )
    _refuse_other_looks(study, spec)


def differing_conditions(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What keeps the numbers of two sets of conditions apart, for people."""
    return [
        f"{key}: {old.get(key)!r} stored, {new.get(key)!r} given"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _stored(url: str, name: str) -> Ledger | None:
    """The study of that name, if there is one."""
    try:
        return Ledger.open(url, name, budget=None)
    except UnknownStudyError:
        return None


def _spec_in(ledger: Ledger) -> StudySpec | None:
    """What its last launch stored; None where that was killed before it stored any."""
    text: str | None = ledger.attribute(SPEC)
    return None if text is None else read_stored(StudySpec, ledger.study.study_name, text)


def _refuse_other_looks(study: Study, spec: StudySpec) -> None:
    """FIDs on the way compare at one fraction and number of images, with all trials' before."""
    stored, new = study.trials.attribute(LOOKS), _looks(spec)
    if stored is not None and new is not None and stored != new:
        raise SpecChangedError(
            f"study {spec.name!r} has FIDs on the way measured otherwise, which would not compare "
            f"(pruning.at {stored['at']} of {stored['images']} images stored, {new['at']} of "
            f"{new['images']} given); restore them, or drop pruning.at"
        )


def _looks(spec: StudySpec) -> dict[str, Any] | None:
    """What the FIDs on the way are of; None where there are none."""
    if not spec.pruning.at:
        return None
    return {"at": list(spec.pruning.at), "images": spec.look_images}


def _store(ledger: Ledger, spec: StudySpec, before: StudySpec | None) -> None:
    """Write the spec into the study, where workers read it, and record what it changes."""
    study, new = ledger.study, spec.model_dump(mode="json")
    if before is not None:
        # A section that the stored one did not have is at its default there, not changed.
        old = flatten(before.model_dump(mode="json"))
        for key, value in flatten(new).items():
            if old.get(key) != value and key not in _LEDGER_SETTINGS:
                ledger.record_change(key, old.get(key), value)
    if (looks := _looks(spec)) is not None:
        study.set_user_attr(LOOKS, looks)
    study.set_user_attr(CONDITIONS, json.dumps(spec.conditions()))
    study.set_user_attr(FINGERPRINT, spec.fingerprint())
    study.set_user_attr(SPEC, json.dumps(new))
    name_metric(study)


def name_metric(study: optuna.Study) -> None:
    """Say what the values are, where the dashboard shows them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        study.set_metric_names(["FID"])
