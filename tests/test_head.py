"""Noticing that Ray's head is gone, without a Ray."""

import signal
import threading
import time
from collections.abc import Callable

import pytest

from search.run import head
from search.run.head import Head


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(head, "ASK_SECONDS", 0.02)
    monkeypatch.setattr(head, "PATIENCE_SECONDS", 0.1)
    # Or a Ctrl-C that this process was started to ignore would interrupt nothing.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def raises() -> bool:
    raise RuntimeError("the GCS is gone")


def wait(is_there: Callable[[], bool], seconds: float) -> Head:
    with Head(is_there=is_there) as watched:
        time.sleep(seconds)
    return watched


@pytest.mark.parametrize("is_there", [lambda: False, raises])
def test_a_head_that_is_silent_or_raises_interrupts_once_patience_is_over(is_there):
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        wait(is_there, 20)
    assert 0.1 <= time.monotonic() - began < 10


def test_patience_is_of_time_however_long_each_answer_takes(monkeypatch):
    """A name that cannot be resolved takes 10 seconds to say so."""
    monkeypatch.setattr(head, "PATIENCE_SECONDS", 0.4)

    def is_there() -> bool:
        time.sleep(0.3)
        return False

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        wait(is_there, 20)
    assert 0.6 <= time.monotonic() - began < 10


def test_the_heads_name_is_resolved_while_it_is_known(monkeypatch):
    assert head._resolved("localhost:6379") in (("127.0.0.1", 6379), ("::1", 6379))
    assert head._resolved("[::1]:6379") == ("::1", 6379)
    assert head._resolved("host.invalid:6379") == ("host.invalid", 6379)


def test_a_head_that_answers_again_in_time_is_not_lost():
    answers, all_given = iter([False, True, *[None, True] * 20]), threading.Event()

    def is_there() -> bool:
        answer = next(answers, "over")
        if answer == "over":
            all_given.set()
        if answer is None:
            raise RuntimeError("busy")
        return bool(answer)

    with Head(is_there=is_there) as watched:
        assert all_given.wait(20)
    assert not watched.lost
