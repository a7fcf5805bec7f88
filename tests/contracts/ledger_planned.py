"""Trials that were planned, before any that are suggested."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest

from search.errors import UnknownStudyError
from search.storage.ledger import Done, Wait
from tests.contracts.ledger_worker import SPACE, objective
from tests.contracts.scene import complete, take


class Planned:
    """A planned trial is begun as it was planned."""

    def test_without_a_sampler_planned_trials_alone_are_begun(self, scene):
        ledger = scene.open(budget=4)
        planned = [{"a": a, "b": -1.0} for a in (1.0, 2.0)]
        for params in planned:
            ledger.enqueue(params)
        claims = [ledger.claim(SPACE, None) for _ in planned]
        assert [claim.params for claim in claims] == planned
        assert scene.open().claim(SPACE, None) == Wait()
        for claim in claims:
            complete(ledger, claim)
        assert scene.open().claim(SPACE, None) == Done()
        assert [trial.params for trial in ledger.study.trials] == planned
        scene.open(budget=2).enqueue({"a": 1.5, "b": -1.0})
        assert ledger.claim(SPACE, None) == Done()  # the budget holds too
        assert ledger.counts().waiting == 1
        scene.open(budget=4)
        # Whoever brings a sampler goes on to the budget.
        assert scene.settle().complete == 4

    def test_the_last_place_of_the_budget_is_planned_once(self, scene):
        ledgers = [scene.open(budget=3), scene.open()]
        complete(ledgers[0], take(ledgers[0]))
        take(ledgers[0])  # runs
        with ThreadPoolExecutor(2) as pool:
            planned = pool.map(
                lambda ledger, a: ledger.enqueue({"a": a, "b": -1.0}, if_room=True),
                ledgers,
                (1.0, 1.5),
            )
        assert sorted(planned) == [False, True]
        assert ledgers[0].counts().waiting == 1

    def test_without_a_sampler_a_trial_is_taken_over_with_its_parameters(self, scene):
        ledger = scene.open(budget=1)
        ledger.enqueue({"a": 1.0, "b": -1.0}, {"arm": "uniform"})
        first = ledger.claim(SPACE, None)
        ledger.release(first)
        second = scene.open().claim(SPACE, None)
        assert (second.number, second.attempt, second.adopted) == (0, 2, True)
        assert second.params == first.params
        ledger.complete(second, objective(dict(second.params)), {"seconds": 2.5})
        assert ledger.study.trials[0].user_attrs == {"arm": "uniform", "seconds": 2.5}
        assert scene.settle().complete == 1

    def test_a_trial_whose_worker_died_as_it_began_is_taken_over(self, scene, monkeypatch):
        ledger = scene.open(budget=1)
        ledger.enqueue({"a": 1.0, "b": -1.0})
        begin = ledger.study._storage.set_trial_state_values

        def die(*given, **named):
            begin(*given, **named)
            raise KeyboardInterrupt

        monkeypatch.setattr(ledger.study._storage, "set_trial_state_values", die)
        with pytest.raises(KeyboardInterrupt):
            ledger.claim(SPACE, None)
        other = scene.open()
        claim = other.claim(SPACE, None)
        assert (claim.number, claim.params, claim.tries) == (0, {"a": 1.0, "b": -1.0}, 1)
        complete(other, claim)
        assert scene.settle().complete == 1

    def test_trials_are_planned_to_the_last_bit(self, scene):
        """Optuna itself takes nearly equal numbers for equal."""
        ledger = scene.open(budget=2)
        planned = [{"a": a, "b": -1.0} for a in (1.0, math.nextafter(1.0, 2.0))]
        for params in (*planned, *planned):
            ledger.enqueue(params)
        assert ledger.counts().waiting == 2
        claims = [ledger.claim(SPACE, None) for _ in planned]
        assert [claim.params for claim in claims] == planned
        for claim in claims:
            complete(ledger, claim)
        assert [trial.params for trial in scene.open().study.trials] == planned
        scene.settle()

    def test_a_failed_trial_is_planned_anew_where_its_reason_allows(self, scene):
        ledger = scene.open(budget=1)
        params = {"a": 1.0, "b": -1.0}
        ledger.enqueue(params)
        ledger.fail(take(ledger), "error", "no such file", {})
        for again in ((), ("diverged", "poisoned")):
            ledger.enqueue(params, again=again)
            assert ledger.counts().waiting == 0
        for _ in range(2):
            ledger.enqueue(params, again=("error",))
        ledger.resize(SPACE)
        second = take(ledger)
        assert (second.number, second.attempt, dict(second.params)) == (1, 1, params)
        ledger.enqueue(params, again=("error",))
        complete(ledger, second)
        ledger.enqueue(params, again=("error",))
        counts = ledger.counts()
        assert (counts.complete, counts.failed, counts.waiting) == (1, 1, 0)

    def test_a_list_of_the_study_only_grows(self, scene):
        ledger, other = scene.open(budget=1), scene.open()
        assert ledger.extend_list("arms", ["plain", "uniform"])
        assert other.extend_list("arms", ["plain", "uniform", "third"])
        assert not ledger.extend_list("arms", ["plain", "uniform", "another"])
        assert not ledger.extend_list("arms", ["plain", "uniform"])
        assert ledger.study.user_attrs["arms"] == ["plain", "uniform", "third"]

    def test_the_budget_is_made_that_of_the_planned_trials(self, scene):
        """Also what others plan at the same time; no change of a setting is recorded."""
        ledger, other = scene.open(budget=1), scene.open()
        ledger.enqueue({"a": 1.0, "b": -1.0})
        complete(ledger, ledger.claim(SPACE, None))
        for a in (2.0, 2.5):
            other.enqueue({"a": a, "b": -1.0})
        ledger.resize(SPACE)
        assert (ledger.budget, other.budget, other.counts().planned) == (3, 3, 3)
        assert "changes" not in ledger.study.user_attrs
        assert scene.settle().complete == 3

    def test_of_two_that_plan_the_next_trial_at_once_one_does(self, scene):
        """The other has to look again; what dies before the trial is planned does no harm."""
        ledger, other = scene.open(budget=1), scene.open()
        complete(ledger, take(ledger))
        assert ledger.enqueue_next({"a": 1.0, "b": -1.0}, {"arm": "first"}, seen=1)
        assert not other.enqueue_next({"a": 2.0, "b": -1.0}, {"arm": "second"}, seen=1)
        assert (other.budget, other.counts().waiting) == (2, 1)
        claim = other.claim(SPACE, None)
        assert (claim.params, other.size()) == ({"a": 1.0, "b": -1.0}, 2)
        complete(other, claim)
        assert scene.settle().complete == 2

    def test_no_more_trials_start_once_it_is_said(self, scene):
        """Those that run go on, and a larger budget starts more."""
        ledger = scene.open(budget=4)
        first, second = take(ledger), take(ledger)
        complete(ledger, first)
        ledger.start_no_more()
        assert (ledger.budget, scene.open().claim(SPACE, None)) == (2, Wait())
        complete(ledger, second)
        assert scene.open().claim(SPACE, None) == Done()
        scene.open(budget=3)
        assert scene.settle().complete == 3

    def test_a_deleted_study_is_gone_with_its_planned_trials(self, scene):
        ledger = scene.open(budget=1)
        ledger.enqueue({"a": 1.0, "b": -1.0})
        ledger.delete()
        with pytest.raises(UnknownStudyError):
            scene.open()
        assert scene.open(budget=1).study.trials == []
        assert scene.settle().complete == 1
