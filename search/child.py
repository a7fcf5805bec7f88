"""Calls in a process of their own, which takes its memory and its imports with it."""

import multiprocessing
import os
import signal
from collections.abc import Callable
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
        answer: tuple[Exception | None, T] = ours.recv()
    except EOFError:
        child.join()
        status = child.exitcode or 0
        how = f"{signal.Signals(-status).name} ended it" if status < 0 else f"it exited: {status}"
        raise ChildError(f"a child process died ({how})", status) from None
    finally:
        child.kill()
        child.join()
    error, found = answer
    if error is not None:
        raise error
    return found


def _answer(to: Connection, call: Callable[[], object], quiet: bool) -> None:
    # Ctrl-C reaches the whole group; only the parent reports it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if quiet:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    answer: tuple[Exception | None, object]  # what the call raised or returned
    try:
        answer = None, call()
    except Exception as error:  # noqa: BLE001  the parent raises it
        answer = portable(error, "in a child process"), None
    to.send(answer)
