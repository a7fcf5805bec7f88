"""Notice that Ray's head is gone. Ray itself ends the process after a minute, or never notices.

No rows are lost: they are in the database.
"""

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Self

import ray

from search.errors import ClusterLostError

_log = logging.getLogger(__name__)

ASK_SECONDS = 1.0
CONNECT_SECONDS = 2.0
# A head that restarts or is slow answers again within this time.
PATIENCE_SECONDS = 10.0
# Time after the interrupt, and again after the last words: Ray's code may ignore both.
STUCK_SECONDS = 5.0


class Head:
    """Watches the head and this machine's node from a thread, as a context manager.

    Any exception counts as no answer. When they are gone for good, it interrupts the main thread
    like Ctrl-C; ``lost`` distinguishes the two. Ray's code may ignore the interrupt: then
    ``last_words`` is called and the process ends with the status of ``ClusterLostError``.

    Args:
        client: Whether Ray's client is used, which has no local node to watch.
        is_there: Whether head and node are there; None asks Ray.
    """

    def __init__(
        self, *, client: bool = False, is_there: Callable[[], bool] | None = None
    ) -> None:
        self.last_words: Callable[[], None] = lambda: None
        self.exit_status = ClusterLostError.exit_status
        self._client = client
        self._is_there = is_there or self._asked_of_ray
        self.address, self._node = "", ""
        self._place: tuple[str, int] = ("", 0)
        if not client and is_there is None:
            context = ray.get_runtime_context()
            self.address = str(context.gcs_address)
            self._node = context.get_node_id()
            self._place = _resolved(self.address)
        self._lost = threading.Event()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="Ray's head", daemon=True)

    def __enter__(self) -> Self:
        if not self._client:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()

    @property
    def lost(self) -> bool:
        """Whether the head is gone."""
        return self._lost.is_set()

    def end(self) -> None:
        """End this process now, and with it Ray's processes that it started."""
        # The last words may wait for a database that is gone too.
        last = threading.Thread(target=self.last_words, name="last words", daemon=True)
        last.start()
        last.join(STUCK_SECONDS)
        os._exit(self.exit_status)

    def _watch(self) -> None:
        heard, missed = time.monotonic(), 0
        while not self._left.wait(ASK_SECONDS):
            if self._is_heard():
                heard, missed = time.monotonic(), 0
                continue
            missed += 1
            # One answer may take long.
            if missed > 1 and time.monotonic() - heard >= PATIENCE_SECONDS:
                self._lost.set()
                os.kill(os.getpid(), signal.SIGINT)
                if not self._left.wait(STUCK_SECONDS):
                    self.end()
                return

    def _is_heard(self) -> bool:
        try:
            return self._is_there()
        except Exception as error:  # noqa: BLE001  Ray's own, whichever it is
            _log.debug("Ray's head: %s: %s", type(error).__name__, error)
            return False

    def _asked_of_ray(self) -> bool:
        """Whether the head answers, and this process's node lives, which workers need."""
        socket.create_connection(self._place, CONNECT_SECONDS).close()
        nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        return any(node["NodeID"] == self._node and node["Alive"] for node in nodes)


def _resolved(address: str) -> tuple[str, int]:
    """IP and port of host:port, resolved while the name is known.

    Looking up the name of a container that has ended takes 10 seconds each time.
    """
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError):
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        return str(found[0][4][0]), int(port)
    return host.strip("[]"), int(port)


def leave_ray(head: Head) -> None:
    """Disconnect; if the head is lost, end within seconds whatever Ray waits for."""
    timer = threading.Timer(STUCK_SECONDS, head.end)
    timer.daemon = True
    if head.lost:
        timer.start()
    ray.shutdown()
    timer.cancel()
