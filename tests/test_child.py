"""Calls in a process of their own: what they return and raise, and children that do not answer."""

import functools
import os
import signal
import time

import pytest

from bdense.errors import InputError, NonFiniteError, NonFiniteLossError
from search.child import ChildError, in_child


def refuse() -> None:
    raise InputError("no")


def diverge() -> None:
    raise NonFiniteLossError("the loss", iteration=3)


def kill(number: int) -> None:
    os.kill(os.getpid(), number)


def test_what_the_call_returns_comes_back_from_another_process():
    assert in_child(os.getpid, quiet=True) != os.getpid()


def test_what_the_call_raises_is_raised_here():
    with pytest.raises(InputError) as error:
        in_child(refuse)
    assert str(error.value) == "no"
    assert "in refuse" in error.value.__notes__[0]  # the child's traceback


def test_an_error_that_cannot_be_pickled_comes_as_its_base():
    with pytest.raises(NonFiniteError, match="iteration 3"):
        in_child(diverge)


def test_a_child_that_takes_too_long_is_killed():
    with pytest.raises(ChildError, match=r"no answer within 0\.1 seconds") as error:
        in_child(functools.partial(time.sleep, 600), 0.1)
    assert error.value.status is None


def test_a_child_that_dies_says_by_what():
    with pytest.raises(ChildError, match="SIGKILL") as error:
        in_child(functools.partial(kill, signal.SIGKILL))
    assert error.value.status == -signal.SIGKILL
    with pytest.raises(ChildError, match="exited: 3"):
        in_child(functools.partial(os._exit, 3))
