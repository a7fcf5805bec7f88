"""Who is stopped by a stop or an interruption, and what it costs their trials."""

import time

import pytest

from bdense.errors import StoppedError
from search.storage.stop_flags import HALT, Launch, ask_all, ask_workers, asked_at, is_asked
from tests.contracts.scene import finish_one, take, wait_until


class Stops:
    """A stop reaches those at work, and is held against no trial."""

    @pytest.mark.parametrize("gives_back", [True, False])
    def test_an_interruption_is_not_held_against_the_trial(self, scene, gives_back):
        """Though its worker died with its launcher, before it could give the trial back."""
        ledger = scene.open(budget=1, max_attempts=1, ttl=0.3)
        for attempt in (1, 2, 3):
            claim = take(ledger)
            assert (claim.attempt, claim.tries) == (attempt, 1)
            if gives_back:
                ledger.release(claim, interrupted=True)
                scene.open().forgive_running()  # which forgives it no second time
            else:
                scene.open().forgive_running()
                time.sleep(0.4)
        assert scene.settle().complete == 1

    def test_a_stop_reaches_who_works_now_and_nobody_who_comes_later(self, scene):
        ledger = scene.open(budget=2, ttl=15)
        with ledger.holding(take(ledger)) as held:
            held.check()
            asked = time.monotonic()
            ask_all([scene.open()])
            wait_until(lambda: _raises(StoppedError, held.check))
            assert time.monotonic() - asked < 15  # at the next renewal, after ttl / 3
            ledger.release(held.claim, interrupted=True)
        with pytest.raises(StoppedError, match="study digits was stopped by `bdense-search stop`"):
            take(ledger)
        later = scene.open()
        claim = take(later)
        assert (claim.adopted, claim.attempt, claim.tries) == (True, 2, 1)
        with later.holding(claim) as held:
            time.sleep(0.5)
            held.check()

    def test_who_has_launched_is_stopped_by_what_was_asked_since(self, scene):
        """Whenever its workers open the study; and a launch settles what was asked before it."""
        ledger = scene.open(budget=2)
        first = Launch.begin([ledger])
        ask_all([ledger])
        late_worker = scene.open()
        late_worker.launch = first
        with pytest.raises(StoppedError):
            take(late_worker)
        assert is_asked([ledger], first)
        assert asked_at([ledger]) is not None
        second = Launch.begin([ledger])
        assert not is_asked([ledger], second)
        assert asked_at([ledger]) is None
        late_worker.launch = second
        assert take(late_worker).number == 0

    def test_a_stop_between_two_launches_of_one_script_reaches_the_second(
        self, scene, tmp_path, monkeypatch
    ):
        """As while it joins another head of Ray; the next script settles it."""
        ledger = scene.open(budget=2)
        for script, is_stopped in (("first", True), ("second", False)):
            monkeypatch.setenv("BDENSE_LAUNCH_FILE", str(tmp_path / f"{script}.json"))
            assert not is_asked([ledger], Launch.begin([ledger]))
            if is_stopped:
                ask_all([ledger])
            again = Launch.begin([ledger])
            assert is_asked([ledger], again) == is_stopped
            assert (asked_at([ledger]) is not None) == is_stopped

    def test_an_interrupted_launch_stops_its_own_workers_alone(self, scene):
        ledger = scene.open(budget=3, ttl=2.0)
        mine, other = Launch.begin([ledger]), Launch.begin([ledger])
        holds = []
        for launch in (mine, other):
            worker = scene.open()
            worker.launch = launch
            holds.append(worker.holding(take(worker)))
        with holds[0] as held, holds[1] as others:
            ask_workers([ledger], mine)
            ask_workers([ledger], mine)
            wait_until(lambda: _raises(StoppedError, held.check))
            time.sleep(1.0)  # its renewals look every 0.7 s
            others.check()
        assert not is_asked([ledger], mine)
        assert ledger.attribute(HALT)["launches"] == [mine.name]

    def test_no_more_attempts_are_forgiven_than_there_were(self, scene):
        """Each Ctrl-C of another launch forgives what runs."""
        ledger = scene.open(budget=1, max_attempts=2)
        first = take(ledger)
        for _ in range(5):
            ledger.forgive_running()
        ledger.release(first, interrupted=True)
        tries = []
        for _ in range(2):
            claim = take(ledger)
            tries.append(claim.tries)
            ledger.release(claim)
        assert tries == [1, 2]
        assert finish_one(ledger) is None
        assert ledger.counts().failed == 1

    def test_two_stops_at_once_are_two(self, scene, monkeypatch):
        """A launch that began between them is reached by the second."""
        ledger, other = scene.open(budget=2), scene.open()
        launches = []
        change = other.change

        def later(key, to) -> None:
            ask_all([ledger])  # it has counted, and is overtaken
            launches.append(Launch.begin([ledger]))
            change(key, to)

        monkeypatch.setattr(other, "change", later)
        ask_all([other])
        assert is_asked([ledger], launches[0])


def _raises(kind: type[Exception], call) -> bool:
    try:
        call()
    except kind:
        return True
    return False
