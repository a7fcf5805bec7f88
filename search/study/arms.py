"""Studies whose rows are all known beforehand: confirmations, transfers, promotions.

Each row trains one *arm* (a way to weigh the branches) under one seed, through the same ledger as
a search's trials. What the arms are stands in the study's attributes, which only grow: a row names
its arm by its place there.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from search.errors import NotPlannedError, SpecChangedError, UnknownStudyError
from search.spec.model_spec import ModelSpec
from search.spec.study_file import Spec, read_stored
from search.storage.engine import retrying
from search.storage.ledger import MENDABLE, Ledger
from search.storage.reader import asked_of
from search.storage.rows import StoredTrial
from search.study.study import (
    CONDITIONS,
    FINGERPRINT,
    KIND,
    SPEC,
    differing_conditions,
    name_metric,
)
from search.study.wording import counts_line

Kind = Literal["retrain", "progressive"]
ARMS, FACTS = "arms", "facts"
# A row's parameters: which arm, its seed, and where they vary, its budget and NFE.
_CHAIN: dict[str, BaseDistribution] = {
    "arm": IntDistribution(0, 10**6),
    "seed": IntDistribution(0, 2**31 - 1),
}
_STUDENT = _CHAIN | {"kimg": FloatDistribution(0.001, 1e9), "nfe": IntDistribution(1, 10**6)}
SPACES: Mapping[Kind, Mapping[str, BaseDistribution]] = {
    "retrain": _STUDENT,
    "progressive": _CHAIN,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to weigh the branches.

    Attributes:
        name: For people.
        params: ``method`` of a baseline, or a and b, or rule, strength and memory.
        trial: Number of the search's trial it comes from, if from one.
    """

    name: str
    params: dict[str, Any]
    trial: int | None = None

    @property
    def is_baseline(self) -> bool:
        """Whether it stands beside what was searched."""
        return "method" in self.params

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"name": self.name, "params": self.params, "trial": self.trial}


PLAIN = Arm(name="plain SFD", params={"method": "sfd"})
UNIFORM = Arm(name="uniform weights", params={"method": "uniform"})


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRow:
    """One training: an arm under a seed.

    Attributes:
        arm: Its place among the study's arms.
        seed: Of training, and of the latents it is judged on.
        kimg, nfe: Of a student of SFD, in thousands of images and network evaluations.
    """

    arm: int
    seed: int
    kimg: float | None = None
    nfe: int | None = None

    def params(self) -> dict[str, Any]:
        """As the database holds them."""
        optional = {"kimg": self.kimg, "nfe": self.nfe}
        given = {name: value for name, value in optional.items() if value is not None}
        return {"arm": self.arm, "seed": self.seed, **given}

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> Self:
        """The row that has these parameters."""
        return cls(**params)


@dataclass(frozen=True, slots=True)
class Planned:
    """A study of planned rows in one storage.

    Attributes:
        url: The storage; it may hold a password, show ``redact`` of it.
        ledger: Its rows.
    """

    url: str
    ledger: Ledger

    @classmethod
    def open(cls, url: str, name: str) -> Self:
        """One that exists.

        Raises:
            UnknownStudyError: There is none of that name, or its maker was killed before it was
                whole.
            NotPlannedError: It is a search.
            StorageError: The database cannot be opened.
        """
        return cls.of(url, Ledger.open(url, name, budget=None))

    @classmethod
    def of(cls, url: str, ledger: Ledger) -> Self:
        """The rows of a ledger that is open.

        Raises:
            UnknownStudyError, NotPlannedError: As of ``open``.
        """
        name = ledger.study.study_name
        attributes = retrying(lambda: ledger.study.user_attrs)
        if SPEC not in attributes:
            raise UnknownStudyError(f"study {name!r} is half made; the same command carries on")
        if KIND not in attributes:
            raise NotPlannedError(
                f"study {name!r} is a search, not a list of planned rows; give the promotion "
                "another name (promote has --name)"
            )
        return cls(url, ledger)

    @classmethod
    def create(
        cls, url: str, name: str, kind: Kind, spec: ModelSpec, *, facts: Mapping[str, Any]
    ) -> Self:
        """A new one without rows, or the existing one if its numbers stay comparable.

        Args:
            url: The storage.
            name: Of the study.
            kind: What its rows are.
            spec: Under which conditions they are trained, but for what a row says itself; its
                lease and attempts may change.
            facts: What it was made of, such as ``of``, a search's name; they may not change.

        Raises:
            NotPlannedError: It is a search.
            SpecChangedError: The stored one has other conditions or facts; says which.
            StorageError: The database cannot be used.
        """
        is_new = True
        try:
            found = cls.open(url, name)
        except UnknownStudyError:
            pass
        else:
            is_new = found._refuse_or_forget(spec, facts)
        ledger = Ledger.open(
            url,
            name,
            # A smaller budget, if only for a moment, would send others' workers home.
            budget=1 if is_new else None,
            ttl=spec.resources.lease_seconds,
            max_attempts=spec.resources.max_attempts,
        )
        attributes = {
            KIND: kind,
            CONDITIONS: json.dumps(spec.conditions()),
            FINGERPRINT: spec.fingerprint(),
            FACTS: dict(facts),
            SPEC: spec.model_dump_json(),  # the last: with it the study is whole
        }
        for key, value in attributes.items():
            ledger.study.set_user_attr(key, value)
        name_metric(ledger.study)
        return cls(url, ledger)

    @property
    def name(self) -> str:
        """The study's name."""
        return self.ledger.study.study_name

    @property
    def ledgers(self) -> tuple[Ledger, ...]:
        """Of its rows, the only one."""
        return (self.ledger,)

    @property
    def kind(self) -> Kind:
        """What its rows are."""
        kind: Kind = self._attributes()[KIND]
        return kind

    @property
    def facts(self) -> dict[str, Any]:
        """What it was made of."""
        return dict(self._attributes().get(FACTS, {}))

    @property
    def spec_json(self) -> str:
        """Under which conditions its rows are trained."""
        return str(self._attributes()[SPEC])

    def spec(self, kind: type[Spec]) -> Spec:
        """The same, read.

        Raises:
            InputError: It is one of another version of bdense.
        """
        return read_stored(kind, self.name, self.spec_json)

    @property
    def arms(self) -> list[Arm]:
        """In the order that rows count them in."""
        return [Arm(**each) for each in self._attributes().get(ARMS, [])]

    def with_arms(self, wanted: Sequence[Arm]) -> tuple[list[Arm], list[int]]:
        """The stored arms and those wanted beside them; and where the wanted ones are."""
        arms = self.arms
        arms += [arm for arm in wanted if arm not in arms]
        return arms, [arms.index(arm) for arm in wanted]

    def plan(self, arms: Sequence[Arm], rows: Sequence[PlannedRow]) -> None:
        """Add arms and rows to those there are; what is there already is not added again.

        Args:
            arms: All arms; the first are those that are stored, in their order.
            rows: What to train; one that failed for want of memory or by an error is tried anew.

        Raises:
            SpecChangedError: Another command has added arms meanwhile.
        """
        given = [arm.as_dict() for arm in arms]
        if not self.ledger.extend_list(ARMS, given):
            raise SpecChangedError(
                f"another command has added arms to {self.name!r} meanwhile; give this one again"
            )
        for row in rows:
            self.ledger.enqueue(row.params(), {"arm": arms[row.arm].name}, again=MENDABLE)
        self.ledger.resize()

    def rows(self) -> list[PlannedRow]:
        """All rows, in the order that they were planned in."""
        return [row for row, _ in self._rows()]

    def unfinished(self) -> list[PlannedRow]:
        """Rows that have not ended."""
        return [row for row, ended in self._rows() if not ended]

    def complete(self) -> list[StoredTrial]:
        """Those that have a result, as they are stored, in order."""
        return self.ledger.rows(TrialState.COMPLETE)

    def headline(self) -> str:
        """Counts on one line."""
        return f"{self.name}: {counts_line(self.ledger.counts(), 'rows')}"

    def left(self) -> int:
        """Rows that have not ended."""
        counts = self.ledger.counts()
        return counts.planned - counts.ended

    def forgive_running(self) -> None:
        """An interruption counts against no row."""
        self.ledger.forgive_running()

    def _rows(self) -> list[tuple[PlannedRow, bool]]:
        """Each row, and whether it has ended."""
        trials = retrying(lambda: self.ledger.study.get_trials(deepcopy=False))
        return [(PlannedRow.of(asked_of(trial)), trial.state.is_finished()) for trial in trials]

    def _attributes(self) -> dict[str, Any]:
        return retrying(lambda: self.ledger.study.user_attrs)

    def _refuse_or_forget(self, spec: ModelSpec, facts: Mapping[str, Any]) -> bool:
        """Refuse other conditions, unless no row was begun: then the old plan is thrown away.

        Returns:
            Whether it was.
        """
        attributes = self._attributes()
        old = {**json.loads(attributes[CONDITIONS]), **attributes.get(FACTS, {})}
        new = {**spec.conditions(), **facts}
        changed = differing_conditions(old, new)
        if not changed:
            return False
        counts = self.ledger.counts()
        if counts.ended + counts.running:
            raise SpecChangedError(
                f"{self.name!r} exists under other conditions, so its numbers would not compare "
                f"({'; '.join(changed)}); restore the file, or give another name (promote has "
                "--name)"
            )
        self.ledger.delete()
        return True
