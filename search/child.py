"""Calls in a process of their own, which takes its memory and its imports with it."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TypeVar

from bdense.errors import BdenseError, portable

T = TypeVar("T")


class ChildError(BdenseError):
    """A child process gave no answer.

    Attributes:
        status: Its exit status, the negative number of the signal that ended it; None where it
            took too long.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class _Raised:
    """What a child's call raised."""

    error: Exception


def in_child(call: Callable[[], T], seconds: float | None = None, *, quiet: bool = False) -> T:
    """Call in a child process, and return or raise what the call does.

    Args:
        call: Can be pickled, as can what it returns.
        seconds: After which the child is killed; None waits as long as it takes.
        quiet: Drop what the child prints.

    Raises:
        ChildError: It took too long, or died.
    """
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    child = spawn.Process(target=_answer, args=(theirs, call, quiet), daemon=True)
    child.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            raise ChildError(f"no answer within {seconds:g} seconds")
        answer: T | _Raised = ours.recv()
    except EOFError:
        child.join()
        status = child.exitcode or 0
        how = f"{signal.Signals(-status).name} ended it" if status < 0 else f"it exited: {status}"
        raise ChildError(f"a child process died ({how})", status) from None
    finally:
        child.kill()
        child.join()
    if isinstance(answer, _Raised):
        raise answer.error
    return answer


def _answer(to: Connection, call: Callable[[], object], quiet: bool) -> None:
    # Ctrl-C reaches the whole group; only the parent reports it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if quiet:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    try:
        answer = call()
    except Exception as error:  # noqa: BLE001  the parent raises it
        answer = _Raised(portable(error, "in a child process"))
    to.send(answer)
