"""Stop requests to a study's launchers and workers, through the database.

A study counts its stop requests. A launch remembers the count at its start and passes it to its
workers, so later requests reach them and earlier ones do not, and nothing must be reset before the
next launch. Ctrl-C stops only the workers of one launch, by its name. A script that launches again
when Ray's head is lost names a file in $BDENSE_LAUNCH_FILE, which remembers the count for all of
its launches: a request that comes between two of them reaches the second.
"""

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from bdense.errors import StoppedError
from bdense.files import write_json

if TYPE_CHECKING:
    from search.storage.ledger import Ledger

HALT = "halt"  # the attribute of the study
CONTINUE = "run the launch command again to continue"
_REMEMBERED = 20  # interrupted launches


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One launch and its workers.

    Attributes:
        name: Unique.
        stops: The study's number of stop requests when it began.
    """

    name: str
    stops: int

    @classmethod
    def begin(cls, ledgers: "Sequence[Ledger]") -> Self:
        """A new launch; earlier stop requests are settled by it.

        Not those that came after the first launch of the same script.
        """
        now = max((_stored(ledger).count for ledger in ledgers), default=0)
        stops = _first_count(ledgers[0].name, now)
        for ledger in ledgers:
            if stops == now and _stored(ledger).asked is not None:
                ledger.change(HALT, lambda old: asdict(replace(Stops.of(old), asked=None)))
        return cls(name=uuid.uuid4().hex[:8], stops=stops)


def _first_count(study: str, now: int) -> int:
    """A study's stop requests when the script first launched it; without a script, now."""
    if not (named := os.environ.get("BDENSE_LAUNCH_FILE")):
        return now
    path = Path(named)
    known: dict[str, int] = json.loads(path.read_text()) if path.exists() else {}
    if study not in known:
        write_json(path, known | {study: now})
    return known.get(study, now)


NO_LAUNCH = Launch(name="", stops=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stops:
    """The stop requests of a study, as its attribute stores them.

    Attributes:
        count: Number of requests to all.
        asked: Time of the last one; None if the study was launched since.
        launches: Names of interrupted launches.
    """

    count: int = 0
    asked: str | None = None
    launches: tuple[str, ...] = ()

    @classmethod
    def of(cls, stored: Any) -> Self:  # noqa: ANN401  JSON, or None where nothing is stored
        """Read the stored attribute."""
        if not isinstance(stored, Mapping):
            return cls()
        launches = tuple(stored.get("launches", ()))
        return cls(count=stored.get("count", 0), asked=stored.get("asked"), launches=launches)

    def reaches(self, launch: Launch) -> bool:
        """Whether that launch and its workers must end."""
        return self.count > launch.stops or launch.name in self.launches


def ask_all(ledgers: "Sequence[Ledger]") -> None:
    """Ask all launchers and workers of a study to stop."""
    # A launch has the highest count of its ledgers; every ledger must exceed it.
    highest = max(_stored(ledger).count for ledger in ledgers)
    now = datetime.now(UTC).isoformat(timespec="seconds")

    def asked(old: Any) -> dict[str, Any]:  # noqa: ANN401
        stops = Stops.of(old)  # under the lock: another request may just have come
        return asdict(replace(stops, count=1 + max(stops.count, highest), asked=now))

    for ledger in ledgers:
        ledger.change(HALT, asked)
        # From now on there may be no claim that notes a restart of the server.
        ledger.note_server()


def ask_workers(ledgers: "Sequence[Ledger]", launch: Launch) -> None:
    """Ask the workers of one launch to stop."""

    def asked(old: Any) -> dict[str, Any]:  # noqa: ANN401
        stops = Stops.of(old)
        others = [name for name in stops.launches if name != launch.name]
        return asdict(replace(stops, launches=(*others, launch.name)[-_REMEMBERED:]))

    for ledger in ledgers:
        ledger.change(HALT, asked)


def is_asked(ledgers: "Sequence[Ledger]", launch: Launch) -> bool:
    """Whether all were asked to stop since that launch began."""
    return any(_stored(ledger).count > launch.stops for ledger in ledgers)


def asked_at(ledgers: "Sequence[Ledger]") -> str | None:
    """Time of the last stop request, if the study was not launched since."""
    return next((when for ledger in ledgers if (when := _stored(ledger).asked)), None)


def held(ledgers: "Sequence[Ledger]") -> int:
    """Number of rows that have a worker."""
    return sum(ledger.held() for ledger in ledgers)


def stopped_error(name: str) -> StoppedError:
    """The error that ends launchers and workers after a stop request."""
    return StoppedError(
        f"study {name} was stopped by `bdense-search stop`; nothing is lost: {CONTINUE}"
    )


def _stored(ledger: "Ledger") -> Stops:
    return Stops.of(ledger.attribute(HALT))
