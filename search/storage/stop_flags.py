"""Asking a study's launchers and workers to stop, wherever they run: through the database alone.

A study counts how often it was asked to. A launch knows the count at its own start and hands it to
its workers: what is asked later reaches them, what is asked earlier does not, and nothing has to
be taken back before the next launch. Ctrl-C asks the workers of one launch alone, by its name.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self

from bdense.errors import StoppedError

if TYPE_CHECKING:
    from search.storage.ledger import Ledger

HALT = "halt"  # the attribute of the study
CONTINUE = "run the launch command again to continue"
_REMEMBERED = 20  # launches that were interrupted


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One launch and its workers.

    Attributes:
        name: Its own.
        stops: How often the study had been asked to stop when it began.
    """

    name: str
    stops: int

    @classmethod
    def begin(cls, ledgers: Sequence["Ledger"]) -> Self:
        """A new one; what was asked before is settled with it, and shown no more."""
        stops = max((_stored(ledger).count for ledger in ledgers), default=0)
        for ledger in ledgers:
            if _stored(ledger).asked is not None:
                ledger.change(HALT, lambda old: Stops.of(old).settled())
        return cls(name=uuid.uuid4().hex[:8], stops=stops)


NO_LAUNCH = Launch(name="", stops=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stops:
    """What a study's attribute says.

    Attributes:
        count: Times that everybody was asked.
        asked: When, the last time, if nobody has launched the study since.
        launches: Names of launches that were interrupted.
    """

    count: int = 0
    asked: str | None = None
    launches: tuple[str, ...] = ()

    @classmethod
    def of(cls, stored: Any) -> Self:  # noqa: ANN401  JSON, or None where nothing is stored
        """As the database has it."""
        if not isinstance(stored, Mapping):
            return cls()
        launches = tuple(stored.get("launches", ()))
        return cls(count=stored.get("count", 0), asked=stored.get("asked"), launches=launches)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"count": self.count, "asked": self.asked, "launches": list(self.launches)}

    def reaches(self, launch: Launch) -> bool:
        """Whether that launch and its workers are to end."""
        return self.count > launch.stops or launch.name in self.launches

    def settled(self) -> dict[str, Any]:
        """The same once somebody has launched the study."""
        return self.as_dict() | {"asked": None}


def ask_all(ledgers: Sequence["Ledger"]) -> None:
    """Ask everybody who is at work on a study, or has launched it, to stop."""
    # A launch has the highest count of all its ledgers, and each has to go beyond it.
    highest = max(_stored(ledger).count for ledger in ledgers)
    now = datetime.now(UTC).isoformat(timespec="seconds")

    def asked(old: Any) -> dict[str, Any]:  # noqa: ANN401
        stops = Stops.of(old)  # under the lock: somebody else may just have asked
        return stops.as_dict() | {"count": 1 + max(stops.count, highest), "asked": now}

    for ledger in ledgers:
        ledger.change(HALT, asked)


def ask_workers(ledgers: Sequence["Ledger"], launch: Launch) -> None:
    """Ask the workers of one launch to stop."""

    def asked(old: Any) -> dict[str, Any]:  # noqa: ANN401
        stops = Stops.of(old)
        others = [name for name in stops.launches if name != launch.name]
        return stops.as_dict() | {"launches": [*others, launch.name][-_REMEMBERED:]}

    for ledger in ledgers:
        ledger.change(HALT, asked)


def is_asked(ledgers: Sequence["Ledger"], launch: Launch) -> bool:
    """Whether everybody was asked to stop since that launch began."""
    return any(_stored(ledger).count > launch.stops for ledger in ledgers)


def asked_at(ledgers: Sequence["Ledger"]) -> str | None:
    """When a study was asked to stop that nobody has launched since."""
    return next((when for ledger in ledgers if (when := _stored(ledger).asked)), None)


def held(ledgers: Sequence["Ledger"]) -> int:
    """Rows that somebody works on."""
    return sum(ledger.held() for ledger in ledgers)


def stopped_error(name: str) -> StoppedError:
    """The end of whoever was asked."""
    return StoppedError(
        f"study {name} was stopped by `bdense-search stop`; nothing is lost: {CONTINUE}"
    )


def _stored(ledger: "Ledger") -> Stops:
    return Stops.of(ledger.attribute(HALT))
