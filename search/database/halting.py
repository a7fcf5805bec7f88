"""Asking a study's launchers and workers to stop, wherever they run: through the database alone.

A study counts how often it was asked to. A launch knows the count at its own start and hands it to
its workers: what is asked later reaches them, what is asked earlier does not, and nothing has to
be taken back before the next launch. Ctrl-C asks the workers of one launch alone, by its name.
"""

import logging
import os
import signal
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from bdense.errors import StoppedError
from search.database.storage import one_line
from search.service_log import say

if TYPE_CHECKING:
    from search.database.ledger import Ledger

_log = logging.getLogger(__name__)

HALT = "halt"  # the attribute of the study; `stopped` is that of the stop rule
POLL_SECONDS = 1.0
CONTINUE = "run the launch command again to continue"
# Workers have this long after Ctrl-C or SIGTERM: half of what `docker compose stop` is told here.
GRACE_SECONDS = 60.0
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


def stopped(name: str) -> StoppedError:
    """The end of whoever was asked."""
    return StoppedError(
        f"study {name} was stopped by `bdense-search stop`; nothing is lost: {CONTINUE}"
    )


def _stored(ledger: "Ledger") -> Stops:
    return Stops.of(ledger.attribute(HALT))


class Ending:
    """Lets a launch end as it should: its workers save and give back what they work on.

    Before rows run there is nothing to wait for: Ctrl-C, SIGTERM or a study that is asked to stop
    end the block at once, as a ``KeyboardInterrupt``. Then the first signal asks this launch's
    workers to stop, and a second one, or ``grace`` seconds, ends the block.

    Args:
        ledgers: Of the rows.
        launch: This one.
        at_once: Whether there is nobody left to wait for.
        grace: Seconds that workers have to save and to end.
    """

    def __init__(
        self,
        ledgers: Sequence["Ledger"],
        launch: Launch,
        *,
        at_once: Callable[[], bool] = lambda: False,
        grace: float = GRACE_SECONDS,
    ) -> None:
        self._ledgers = ledgers
        self._launch = launch
        self._at_once = at_once
        self._rows_run = False
        self._over = threading.Event()
        self._interrupted = threading.Event()
        self._before: dict[int, Any] = {}
        self._thread = threading.Thread(target=self._watch, name="end of the launch", daemon=True)
        self._timer = threading.Timer(grace, self._end_now)
        self._timer.daemon = True

    @property
    def interrupted(self) -> bool:
        """Whether there was a signal."""
        return self._interrupted.is_set()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._timer.cancel()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def rows_run(self) -> None:
        """From now on workers have something to save."""
        self._rows_run = True

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self.interrupted or self._at_once() or not self._rows_run or self._timer.is_alive():
            raise KeyboardInterrupt
        self._interrupted.set()
        self._timer.start()
        say("\nending: workers save what they have; Ctrl-C again ends at once")

    def _watch(self) -> None:
        while not self._over.wait(POLL_SECONDS):
            try:
                if self.interrupted:
                    ask_workers(self._ledgers, self._launch)
                    return
                if is_asked(self._ledgers, self._launch):
                    self._wind_up()
                    return
            except Exception as error:  # noqa: BLE001  the database may come back
                _log.warning("whether to stop cannot be seen: %s", one_line(error))

    def _wind_up(self) -> None:
        """The study was asked to stop: its workers see to that themselves."""
        if self._rows_run:
            self._timer.start()
        else:
            self._end_now()

    def _end_now(self) -> None:
        if not self._over.is_set():
            self._interrupted.set()
            os.kill(os.getpid(), signal.SIGINT)
