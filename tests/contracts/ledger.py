"""What the ledger promises on every database, shown with real processes that really die."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from bdense.errors import InputError
from search.errors import LeaseLostError, UnknownStudyError
from search.storage import ledger as claiming
from search.storage.engine import open_storage
from search.storage.ledger import Claim, Done, Ledger, Wait
from search.storage.queries import Counts
from tests.contracts.ledger_deaths import Deaths
from tests.contracts.ledger_planned import Planned
from tests.contracts.ledger_stops import Stops
from tests.contracts.ledger_worker import SPACE, objective
from tests.contracts.scene import (
    STUDY,
    Scene,
    complete,
    expire_leases,
    finish_one,
    take,
    wait_until,
)


class LedgerContract(Deaths, Planned, Stops):
    """What every database promises; subclass it and give it a ``url`` fixture: an empty one."""

    @pytest.fixture
    def scene(self, url: str, tmp_path: Path) -> Iterator[Scene]:
        scene = Scene(url=url, folder=tmp_path / "trials")
        scene.folder.mkdir()
        yield scene
        scene.end()

    # One trial is one row.

    def test_a_trial_of_an_asker_that_died_before_its_lease_is_adopted_and_completed(self, scene):
        ledger = scene.open(budget=2)
        half = ledger.study.ask(fixed_distributions={"a": SPACE["a"]})
        claim = take(scene.open())
        assert (claim.number, claim.attempt, claim.adopted) == (0, 1, True)
        assert claim.params["a"] == half.params["a"]
        assert -6.0 <= claim.params["b"] <= 0.0
        assert ledger.study.trials[0].params == claim.params
        complete(ledger, claim)
        assert scene.settle().complete == 2

    def test_a_trial_begun_beyond_the_budget_is_dropped(self, scene):
        ledger = scene.open(budget=1)
        claim = take(ledger)
        ledger.study.ask(fixed_distributions=SPACE)
        assert ledger.claim(SPACE, RandomSampler) == Wait()
        complete(ledger, claim)
        assert ledger.claim(SPACE, RandomSampler) == Done()
        assert scene.settle().complete == 1

    @pytest.mark.parametrize("dies_after_telling", [False, True])
    def test_what_was_told_first_stays(self, scene, dies_after_telling):
        ledger = scene.open(budget=1)
        claim = take(ledger)
        first = objective(dict(claim.params))
        if dies_after_telling:  # before it gives the lease up
            ledger.study.tell(claim.number, first)
            ledger.complete(claim, 99.0, {"late": True})
        else:
            complete(ledger, claim)
            with pytest.raises(LeaseLostError, match="trial 0: attempt 1 no longer holds it"):
                ledger.complete(claim, 99.0, {"late": True})
            with pytest.raises(LeaseLostError):
                ledger.fail(claim, "error", "too late", {})
        (trial,) = ledger.study.trials
        assert (trial.value, trial.user_attrs) == (first, {})
        assert scene.settle().complete == 1

    def test_the_same_parameters_planned_twice_are_one_trial(self, scene):
        ledger = scene.open(budget=2)
        for _ in range(2):
            scene.open().enqueue({"a": 1.386, "b": -4.274})
        assert ledger.counts().waiting == 1
        assert take(ledger).params == {"a": 1.386, "b": -4.274}

    def test_a_larger_budget_runs_only_the_difference_and_a_smaller_one_keeps_what_ran(
        self, scene
    ):
        ledger = scene.open(budget=4)
        while finish_one(ledger):
            pass
        larger = scene.open(budget=6)
        assert (larger.budget, ledger.budget) == (6, 6)
        assert scene.settle().complete == 6
        [change] = larger.study.user_attrs["changes"]
        assert (change["key"], change["old"], change["new"]) == ("budget", 4, 6)
        assert [trial.number for trial in larger.study.trials] == list(range(6))
        scene.open(budget=2)
        assert ledger.claim(SPACE, RandomSampler) == Done()
        assert ledger.counts().planned == 6

    def test_suggestions_beyond_the_bound_are_pruned_outside_the_budget(self, scene):
        ledger = scene.open(budget=3)
        ledger.enqueue({"a": 2.5, "b": -1.0})

        def beyond(params: dict[str, float]) -> float:
            return params["a"] - 1.0

        claims = []
        for _ in range(3):
            claims.append(take(ledger, beyond))
            complete(ledger, claims[-1])
        assert ledger.claim(SPACE, RandomSampler, beyond) == Done()
        assert all(claim.params["a"] <= 1.0 for claim in claims)
        refused = [t for t in ledger.study.trials if t.user_attrs.get("out_of_bounds")]
        assert refused[0].params == {"a": 2.5, "b": -1.0}
        assert refused[0].constraints == {"largest_weight": 1.5}
        assert {trial.state for trial in refused} == {TrialState.PRUNED}
        assert len(ledger.study.trials) == 3 + len(refused)
        counts = scene.settle()
        assert (counts.planned, counts.complete, counts.pruned) == (3, 3, 0)

    def test_an_adopted_trial_is_held_against_the_bound_too(self, scene):
        ledger = scene.open(budget=1)
        ledger.release(take(ledger))
        claim = take(ledger, lambda params: 1.0 if len(ledger.study.trials) == 1 else -1.0)
        assert claim.number == 1
        complete(ledger, claim)
        assert scene.settle().complete == 1

    def test_a_bound_that_nothing_meets_ends_with_an_error(self, scene, monkeypatch):
        assert claiming.MAX_REFUSED_IN_A_ROW == 200
        monkeypatch.setattr(claiming, "MAX_REFUSED_IN_A_ROW", 10)
        ledger = scene.open(budget=1)
        with pytest.raises(InputError, match="10 suggestions in a row were beyond the bound"):
            ledger.claim(SPACE, RandomSampler, lambda params: 1.0)
        assert ledger.counts().pruned == 0

    def test_no_two_claims_draw_with_the_same_seed(self, scene):
        ledger = scene.open(budget=4)
        ledger.enqueue({"a": 0.0, "b": -1.0})
        offsets: list[int] = []

        def sampler(offset: int) -> RandomSampler:
            offsets.append(offset)
            return RandomSampler(seed=offset)

        while isinstance(claim := ledger.claim(SPACE, sampler), Claim):
            assert claim.number == offsets[-1]
            complete(ledger, claim)
        assert offsets == [0, 1, 2, 3]

    # Values on the way.

    def test_values_on_the_way_are_stored_by_step_by_whoever_holds_the_lease(self, scene):
        ledger = scene.open(budget=1)
        first = take(ledger)
        for step, value in ((8, 5.0), (4, 6.5), (8, 5.25)):  # told again, written anew
            ledger.report(first, step, value)
        ledger.release(first)
        second = take(scene.open())
        with pytest.raises(LeaseLostError, match="trial 0: attempt 1 no longer holds it"):
            ledger.report(first, 8, 99.0)
        ledger.report(second, 2, 7.0)
        complete(ledger, second)
        with pytest.raises(LeaseLostError, match="trial 0: attempt 2 no longer holds it"):
            ledger.report(second, 2, 99.0)
        assert ledger.study.trials[0].intermediate_values == {8: 5.25, 4: 6.5, 2: 7.0}
        scene.settle()

    # Named ends.

    def test_a_released_trial_is_retried_and_then_fails(self, scene):
        ledger = scene.open(budget=1, max_attempts=2)
        first = take(ledger)
        ledger.release(first)
        second = take(scene.open())
        assert (second.number, second.attempt, second.tries) == (0, 2, 2)
        assert second.params == first.params
        with pytest.raises(LeaseLostError):
            complete(ledger, first)
        ledger.fail(second, "error", "RuntimeError: twice", {"seconds": 3.5})
        trial = ledger.study.trials[0]
        assert trial.state is TrialState.FAIL
        assert trial.user_attrs == {
            "reason": "error",
            "error": "RuntimeError: twice",
            "seconds": 3.5,
        }
        assert scene.settle().failed == 1

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_a_value_that_is_not_finite_fails_the_trial(self, scene, value):
        ledger = scene.open(budget=1)
        ledger.complete(take(ledger), value, {"iterations": 7})
        told = ledger.study.trials[0].user_attrs
        assert told == {
            "iterations": 7,
            "reason": "diverged",
            "error": f"the value is {value}",
        }
        assert scene.settle().failed == 1

    def test_a_failure_stores_no_password_and_no_novel(self, scene):
        ledger = scene.open(budget=1)
        detail = "cannot reach postgresql://me:s3cret@host/db " + "x" * 5000
        ledger.fail(take(ledger), "error", detail, {})
        error = ledger.study.trials[0].user_attrs["error"]
        assert error.startswith("cannot reach postgresql://me:***@host/db xxx")
        assert len(error) == 2000

    def test_a_pruned_trial_counts_in_the_budget(self, scene):
        ledger = scene.open(budget=1)
        ledger.prune(take(ledger), {"step": 3})
        assert scene.settle() == Counts(
            planned=1, complete=0, pruned=1, failed=0, running=0, waiting=0
        )

    # Leases.

    def test_a_live_trial_is_nobody_elses(self, scene):
        ledger, other = scene.open(budget=1, ttl=1.5), scene.open()
        claim = take(ledger)
        with ledger.holding(claim) as held:
            deadline = time.monotonic() + 2.2
            while time.monotonic() < deadline:
                assert other.claim(SPACE, RandomSampler) == Wait()
                held.check()
        complete(ledger, claim)
        assert scene.settle().complete == 1

    def test_an_expired_lease_goes_to_the_next_and_is_lost_to_the_first(self, scene):
        ledger = scene.open(budget=1, ttl=0.6)
        first = take(ledger)
        time.sleep(0.7)
        second = take(scene.open())
        no_longer = pytest.raises(LeaseLostError, match="attempt 1 no longer holds it")
        with ledger.holding(first) as held, no_longer:
            wait_until(held.check)
        complete(ledger, second)
        assert scene.settle().complete == 1

    def test_a_late_worker_that_nobody_replaced_may_still_tell(self, scene):
        ledger = scene.open(budget=1, ttl=0.2)
        claim = take(ledger)
        time.sleep(0.3)
        complete(ledger, claim)
        assert ledger.study.trials[0].value == objective(dict(claim.params))

    def test_progress_is_shown_while_a_trial_runs(self, scene):
        ledger = scene.open(budget=1)
        claim = take(ledger)
        with ledger.holding(claim) as held:
            held.report("iteration 10 of 160")
            wait_until(lambda: ledger.running()[0].progress == "iteration 10 of 160")
        [row] = scene.open().running()
        assert (row.number, row.attempt) == (0, 1)
        assert row.worker.endswith(f":{os.getpid()}")
        assert 0.0 < row.seconds < 30.0
        complete(ledger, claim)
        assert ledger.running() == []

    def test_held_are_trials_of_live_workers(self, scene):
        ledger = scene.open(budget=3, ttl=5.0)
        assert ledger.held() == 0
        given_back, kept = take(ledger), take(ledger)
        assert ledger.held() == 2
        ledger.release(given_back)
        assert ledger.held() == 1
        expire_leases(scene.url)
        # A server that has just been started is not trusted for a lease's time.
        wait_until(lambda: ledger.held() == 0)
        assert kept.number in {row.number for row in ledger.running()}

    # Settings.

    def test_settings_are_the_studys_and_not_the_callers(self, scene):
        scene.open(budget=5, ttl=7.0, max_attempts=2)
        ledger = scene.open()
        assert (ledger.budget, ledger.ttl, ledger.max_attempts) == (5, 7.0, 2)
        assert "changes" not in ledger.study.user_attrs
        ledger.record_change("sampler", "tpe", "gp")
        [change] = ledger.study.user_attrs["changes"]
        assert {key: change[key] for key in ("key", "old", "new")} == {
            "key": "sampler",
            "old": "tpe",
            "new": "gp",
        }

    def test_a_study_that_does_not_exist_is_not_made_by_looking(self, scene):
        scene.open(budget=1)
        with pytest.raises(UnknownStudyError, match=f"no study 'other'.*there: {STUDY};"):
            Ledger.open(scene.url, "other", budget=None)

    def test_a_study_of_somebody_else_is_refused_and_left_alone(self, scene):
        storage = open_storage(scene.url)
        optuna.create_study(study_name="theirs", storage=storage)
        with pytest.raises(UnknownStudyError, match="'theirs' was not made by bdense-search"):
            Ledger.open(scene.url, "theirs", budget=None)
        assert optuna.load_study(study_name="theirs", storage=storage).user_attrs == {}
