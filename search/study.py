"""A study's record: the ledgers of its trials and baselines, and which changes it takes."""

import functools
import json
import warnings
from dataclasses import dataclass
from typing import Self

import optuna
from optuna.exceptions import ExperimentalWarning

from search.errors import SpecChangedError, UnknownStudyError
from search.ledger import Counts, Ledger
from search.model_spec import flatten
from search.space import BASELINES
from search.spec import StudySpec

# Attributes of the Optuna study.
SPEC, CONDITIONS, FINGERPRINT = "spec", "conditions", "fingerprint"
TRAJECTORIES, BASELINE_RESULTS = "trajectories", "baselines"
KIND = "kind"  # of planned rows; a search has none
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
        if name.endswith(BASELINES_SUFFIX):
            raise UnknownStudyError(
                f"{name!r} holds the baselines of a study; give the study itself: "
                f"{name.removesuffix(BASELINES_SUFFIX)!r}"
            )
        trials = Ledger.open(url, name, budget=None)
        try:
            baselines = Ledger.open(url, baselines_name(name), budget=None)
        except UnknownStudyError:
            baselines = None
        return cls(url, trials, baselines)

    @classmethod
    def create(cls, url: str, spec: StudySpec) -> Self:
        """The study of that spec: new, or joined if its numbers stay comparable.

        Raises:
            SpecChangedError: The stored study has other conditions; says which.
            StorageError: The database cannot be used.
        """
        refuse_other_conditions(url, spec)
        open_ledger = functools.partial(
            Ledger.open,
            url,
            ttl=spec.resources.lease_seconds,
            max_attempts=spec.resources.max_attempts,
        )
        trials = open_ledger(spec.name, budget=spec.budget.trials)
        _store(trials, spec)
        baselines = open_ledger(baselines_name(spec.name), budget=len(BASELINES))
        baselines.study.set_user_attr("of", spec.name)
        for method in BASELINES:
            baselines.enqueue({"method": method})
        return cls(url, trials, baselines)

    @property
    def name(self) -> str:
        """The study's name."""
        return self.trials.study.study_name

    def counts(self) -> list[Counts]:
        """Of the trials, then of the baselines."""
        return [each.counts() for each in (self.trials, self.baselines) if each is not None]

    def left(self) -> int:
        """Trials and baselines that have not ended."""
        return sum(counts.planned - counts.ended for counts in self.counts())

    def has_started(self) -> bool:
        """Whether anything was ever begun; until then its conditions may change."""
        return any(counts.ended + counts.running for counts in self.counts())

    def forgive_running(self) -> None:
        """An interruption counts against no trial."""
        for ledger in (self.trials, self.baselines):
            if ledger is not None:
                ledger.forgive_running()


def baselines_name(name: str) -> str:
    """Name of the Optuna study that holds the baselines' rows."""
    return name + BASELINES_SUFFIX


def refuse_other_conditions(url: str, spec: StudySpec) -> None:
    """Make sure that the stored study of that name, if it was begun, has the spec's conditions.

    Raises:
        SpecChangedError: It has others, says which; or it is no search.
    """
    try:
        study = Study.open(url, spec.name)
    except UnknownStudyError:
        return
    if KIND in study.trials.study.user_attrs:
        raise SpecChangedError(
            f"{spec.name!r} exists and holds planned rows, not a search; give the study another "
            "name"
        )
    # Until something is measured there is nothing to compare with: a mistake may be mended.
    if not study.has_started():
        return
    old, new = json.loads(study.trials.study.user_attrs[CONDITIONS]), spec.conditions()
    changed = [
        f"{key}: {old.get(key)!r} stored, {new.get(key)!r} given"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if changed:
        raise SpecChangedError(
            f"study {spec.name!r} exists under other conditions, so its numbers would not "
            f"compare ({'; '.join(changed)}); rename the study or restore the file"
        )


def _store(ledger: Ledger, spec: StudySpec) -> None:
    """Write the spec into the study, where workers read it, and record what it changes."""
    study, new = ledger.study, spec.model_dump(mode="json")
    if SPEC in study.user_attrs:
        old = flatten(json.loads(study.user_attrs[SPEC]))
        for key, value in flatten(new).items():
            if old.get(key) != value and key not in _LEDGER_SETTINGS:
                ledger.record_change(key, old.get(key), value)
    study.set_user_attr(CONDITIONS, json.dumps(spec.conditions()))
    study.set_user_attr(FINGERPRINT, spec.fingerprint())
    study.set_user_attr(SPEC, json.dumps(new))
    name_metric(study)


def name_metric(study: optuna.Study) -> None:
    """Say what the values are, where the dashboard shows them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        study.set_metric_names(["FID"])
