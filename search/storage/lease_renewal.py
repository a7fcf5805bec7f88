"""Keep a lease alive while its trial is worked on."""

import contextvars
import json
import logging
import threading
import time
from typing import Self

from sqlalchemy.exc import SQLAlchemyError

from bdense.errors import StoppedError
from search.errors import LeaseLostError, StorageError
from search.storage.engine import one_line
from search.storage.leases import Claim, Leases
from search.storage.stop_flags import HALT, Launch, Stops, stopped_error

_log = logging.getLogger(__name__)

PROGRESS_SECONDS = 1.0
_JOIN_SECONDS = 10.0


class LeaseRenewal:
    """Renews a claim's lease from a thread, through outages of the database.

    Use it as a context manager around the work on a trial. Leaving it does not free the lease:
    finish or release the claim.
    """

    def __init__(self, leases: Leases, claim: Claim, study: str, launch: Launch) -> None:
        self.claim = claim
        self._leases = leases
        self._study = study
        self._launch = launch
        self._ended: StoppedError | LeaseLostError | StorageError | None = None
        self._stopping = False
        self._progress: str | None = None
        self._changed = threading.Condition()
        # The thread's log lines belong to the trial too.
        run = contextvars.copy_context().run
        self._thread = threading.Thread(
            target=run, args=(self._run,), name=f"lease of trial {claim.number}", daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(_JOIN_SECONDS)

    def check(self) -> None:
        """Raise if the work must end; costs nothing.

        Raises:
            LeaseLostError: Another worker took the trial over.
            StoppedError: The study, or this launch's workers, were asked to stop.
            StorageError: The database is gone for good.
        """
        if self._ended is not None:
            raise self._ended

    def report(self, progress: str) -> None:
        """Store a text beside the trial, at most 200 characters and once a second; never waits."""
        with self._changed:
            self._progress = progress
            self._changed.notify()

    def _run(self) -> None:
        renewed = time.monotonic()
        while self._wait_for_work(renewed):
            with self._changed:
                progress, self._progress = self._progress, None
            renewed = time.monotonic()
            try:
                ours, stop = self._leases.renew_and_read(self.claim, progress, HALT)
                if not ours:
                    self._ended = lost_error(self.claim)
                    return
                if stop and Stops.of(json.loads(stop)).reaches(self._launch):
                    self._ended = stopped_error(self._study)
            except StorageError as error:  # waiting does not help
                self._ended = error
                return
            except SQLAlchemyError as error:
                # The lease may outlive the outage; the work goes on in any case.
                _log.warning(
                    "lease of trial %d not renewed: %s", self.claim.number, one_line(error)
                )

    def _wait_for_work(self, renewed: float) -> bool:
        """Sleep until a renewal or a progress text is due; False when the context is left."""
        with self._changed:
            while not self._stopping:
                pause = self._leases.ttl / 3
                if self._progress is not None:
                    pause = min(pause, PROGRESS_SECONDS)
                rest = renewed + pause - time.monotonic()
                if rest <= 0:
                    return True
                self._changed.wait(rest)
        return False


def lost_error(claim: Claim) -> LeaseLostError:
    """The error of a worker whose lease another one has."""
    return LeaseLostError(
        f"trial {claim.number}: attempt {claim.attempt} no longer holds it; another worker took "
        "it over or finished it, and this one stored nothing"
    )
