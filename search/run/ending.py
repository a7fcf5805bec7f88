"""End a launch early: on signals, or when its study is asked to stop."""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, Self

from search.errors import StorageRefusedError
from search.log import say
from search.storage.engine import one_line
from search.storage.ledger import Ledger
from search.storage.stop_flags import Launch, ask_workers, is_asked

_log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
# Time for workers after Ctrl-C or SIGTERM: half of the grace period in docker-compose.yml.
GRACE_SECONDS = 60.0


@contextlib.contextmanager
def silencing_descriptor_2() -> Iterator[Callable[[], None]]:
    """Yield a function that empties descriptor 2 until the block is left; sys.stderr goes on.

    For a signal to the process group: it ends Ray's processes too, which Ray's C++ code in this
    process reports there.
    """
    with contextlib.ExitStack() as stack:

        def silence() -> None:
            kept = os.dup(2)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, 2)
            with contextlib.suppress(OSError, AttributeError):  # a notebook's, or none
                if sys.stderr.fileno() == 2:
                    words = os.fdopen(
                        kept,
                        "w",
                        buffering=1,
                        encoding=sys.stderr.encoding,
                        errors="backslashreplace",
                        closefd=False,
                    )
                    stack.enter_context(contextlib.redirect_stderr(words))
            with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
                os.dup2(nowhere.fileno(), 2)

        yield silence


class EarlyEnd:
    """Ends a launch so that its workers save and give their trials back.

    Entered by the main thread. Before rows run, Ctrl-C, SIGTERM or a stop request end the block
    at once, by a ``KeyboardInterrupt``. Afterwards the first signal asks this launch's workers to
    stop, and a second one, or ``grace`` seconds, ends the block.

    Args:
        ledgers: The ledgers of the rows.
        launch: This launch.
        at_once: Whether there are no workers to wait for.
        grace: Seconds that workers have to save and end.

    Attributes:
        on_signal: Called at each signal, by its handler.
    """

    def __init__(
        self,
        ledgers: Sequence[Ledger],
        launch: Launch,
        *,
        at_once: Callable[[], bool] = lambda: False,
        grace: float = GRACE_SECONDS,
    ) -> None:
        self._ledgers = ledgers
        self._launch = launch
        self._at_once = at_once
        self.on_signal: Callable[[], None] = lambda: None
        self._rows_run = False
        self._over = threading.Event()
        self._interrupted = threading.Event()
        self._before: dict[int, Any] = {}
        self._grace = grace
        self._ending = threading.Event()
        # Two: the database may let the watch wait for minutes, and the grace ends all the same.
        self._threads = [
            threading.Thread(target=each, name="end of the launch", daemon=True)
            for each in (self._watch, self._count_down)
        ]

    @property
    def interrupted(self) -> bool:
        """Whether a signal came."""
        return self._interrupted.is_set()

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._on_signal)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._ending.set()  # not before: the handler sets it too, and would wait for its lock

    def rows_run(self) -> None:
        """Rows run from now on, so that workers have something to save."""
        self._rows_run = True

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self.on_signal()
        if self.interrupted or self._at_once() or not self._rows_run or self._ending.is_set():
            raise KeyboardInterrupt
        # All else is the threads': here the main thread may be writing, or hold a lock.
        self._interrupted.set()
        self._ending.set()

    def _count_down(self) -> None:
        self._ending.wait()
        if self._over.is_set():
            return
        if self.interrupted:
            say("\nending: workers save what they have; Ctrl-C again ends at once")
        if not self._over.wait(self._grace):
            self._end_now()

    def _watch(self) -> None:
        while not self._over.wait(POLL_SECONDS):
            try:
                if self.interrupted:
                    ask_workers(self._ledgers, self._launch)
                    return
                if is_asked(self._ledgers, self._launch):
                    # The workers see the request by themselves.
                    self._ending.set() if self._rows_run else self._end_now()
                    return
            except StorageRefusedError:  # ``run`` meets it too, and says so
                self._end_now()
                return
            except Exception as error:  # noqa: BLE001  the database may come back
                _log.warning("cannot read stop requests: %s", one_line(error))

    def _end_now(self) -> None:
        if not self._over.is_set():
            self._interrupted.set()
            os.kill(os.getpid(), signal.SIGINT)
