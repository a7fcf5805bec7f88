"""Read a study's trials: counts, running trials, results."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from search.storage.claims import differing_versions, leases_of, rows_of
from search.storage.engine import open_reading, retrying
from search.storage.leases import RunningRow
from search.storage.rows import FIXED, StoredTrial
from search.storage.settings import DEFAULT_TTL_SECONDS, find_study, require_file


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Number of trials by state, without those refused as out of bounds."""

    planned: int
    complete: int
    pruned: int
    failed: int
    running: int
    waiting: int

    @classmethod
    def of(cls, states: Mapping[str, int], *, budget: int) -> Self:
        """From the number of trials in each of Optuna's states."""
        started = sum(states.values()) - states["WAITING"]
        return cls(
            planned=max(budget, started),
            complete=states["COMPLETE"],
            pruned=states["PRUNED"],
            failed=states["FAIL"],
            running=states["RUNNING"],
            waiting=states["WAITING"],
        )

    @property
    def ended(self) -> int:
        """Trials that will not run again."""
        return self.complete + self.pruned + self.failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A running trial; ``owner`` is host:pid, ``seconds`` the time since its claim."""

    number: int
    owner: str
    attempt: int
    progress: str
    seconds: float


class LedgerReader:
    """The trials of one study, read-only. Use ``open_reading``."""

    def __init__(
        self, storage: RDBStorage, study: optuna.Study, attributes: Mapping[str, Any]
    ) -> None:
        self.study = study
        self.ttl = float(attributes.get("ttl", DEFAULT_TTL_SECONDS))
        self._storage = storage
        self._leases = leases_of(storage, study, self.ttl)
        self._rows = rows_of(storage, study)

    @classmethod
    def open_reading(cls, url: str, study_name: str) -> Self:
        """A study whose database connection refuses writes.

        Raises:
            StorageError: The database cannot be opened.
            UnknownStudyError: There is no such study.
        """
        require_file(url, study_name)
        storage = open_reading(url)
        return cls._of(storage, retrying(partial(find_study, storage, study_name)))

    def beside(self, study_name: str) -> Self:
        """Another study of the same database, through the same connections.

        Raises:
            UnknownStudyError: There is no such study.
        """
        storage = self._storage
        return self._of(storage, retrying(partial(find_study, storage, study_name)))

    @classmethod
    def _of(cls, storage: RDBStorage, study: optuna.Study) -> Self:
        return cls(storage, study, retrying(lambda: study.user_attrs))

    @property
    def storage(self) -> RDBStorage:
        """The database, for what Optuna stores beside the rows."""
        return self._storage

    @property
    def budget(self) -> int:
        """Trials to run in all, as currently stored: another launcher may change it."""
        return retrying(self._stored_budget)

    def attribute(self, key: str) -> Any:  # noqa: ANN401  as JSON has it
        """An attribute of the study, as currently stored; None without it."""
        return retrying(lambda: self.study.user_attrs).get(key)

    def counts(self) -> Counts:
        """Number of trials by state."""

        def read() -> dict[str, int]:
            with self._storage.engine.connect() as connection:
                return self._leases.count_states(connection)

        return Counts.of(retrying(read), budget=self.budget)

    def running(self) -> list[Running]:
        """Running trials that have a worker, by number."""
        return [
            Running(
                number=row.number,
                owner=f"{row.process.host}:{row.process.pid}" if row.owner else "",
                attempt=row.attempt,
                progress=row.progress,
                seconds=row.seconds,
            )
            for row in self.running_rows()
            if row.process is not None
        ]

    def running_rows(self) -> list[RunningRow]:
        """The running trials with their leases, lowest number first."""

        def read() -> list[RunningRow]:
            with self._storage.engine.connect() as connection:
                return self._leases.running(connection)

        return retrying(read)

    def held(self) -> int:
        """Number of trials that have a live worker, as far as that is known."""
        rows = self.running_rows()
        return sum(row.process is not None and not row.adoptable for row in rows)

    def rows(self, state: TrialState, keys: Collection[str] | None = None) -> list[StoredTrial]:
        """Every trial in that state, by number; does not load the others.

        Args:
            state: Optuna's state.
            keys: Attributes to read, which are most of the cost; None for all.
        """
        return retrying(partial(self._rows.of_state, state, keys))

    def asked(self) -> list[dict[str, Any]]:
        """Parameters of each trial, by number: planned ones, else suggested ones."""
        return [params for params, _ in retrying(self._rows.asked)]

    def complete_values(self) -> dict[int, float]:
        """Number -> value of each complete trial."""
        return retrying(self._rows.complete)

    def ranked_after(self, rank: int, most: int, also: int) -> list[int]:
        """Complete trials after the ``rank`` best, best first.

        Args:
            rank: Number of best trials to skip.
            most: Number of following ones to return, at most.
            also: Number of a trial that is included whatever its rank.
        """
        return retrying(partial(self._rows.ranked_after, rank, most, also))

    def ended(self) -> list[int]:
        """Numbers of trials that will not run again."""
        return retrying(self._rows.ended)

    def best(self) -> StoredTrial | None:
        """The complete trial of lowest value, the first of equal ones; None without any."""
        return retrying(self._rows.best)

    def differing_versions(self) -> list[str]:
        """A line for each package of which trials used several versions."""
        return retrying(partial(differing_versions, self._storage, self.study))

    def _stored_budget(self) -> int:
        return int(self.study.user_attrs["budget"])


def asked_of(trial: FrozenTrial) -> dict[str, Any]:
    """A trial's parameters; Optuna stores those of a waiting trial elsewhere."""
    asked: dict[str, Any] = trial.system_attrs.get(FIXED, trial.params)
    return asked
