"""The ledger on a real PostgreSQL server, which goes away in the middle of a run."""

import time

import pytest
from optuna.samplers import RandomSampler

from search.ledger import Claim, Wait
from tests.contracts.ledger import LONG_TTL, LedgerContract, complete, take, wait_until
from tests.contracts.ledger_worker import SPACE, STEPS

pytestmark = pytest.mark.postgres


class TestLedgerOnPostgres(LedgerContract):
    @pytest.fixture
    def url(self, postgres) -> str:
        return postgres.new_database()

    @pytest.mark.faults
    def test_a_restart_of_the_server_costs_no_trial_and_no_step(self, scene, postgres):
        command = ("--budget", "4", "--ttl", "3", "--workers", "2")
        launcher = scene.start(*command)
        scene.wait_for_step(3, trials=2)
        postgres.control("restart", "-m", "immediate")
        assert launcher.wait(40) == 0
        assert scene.settle().complete == 4
        for number in range(4):
            assert [line["step"] for line in scene.steps(number)] == list(range(STEPS))

    @pytest.mark.faults
    def test_a_server_that_is_away_longer_than_a_lease_costs_no_trial_either(
        self, scene, postgres
    ):
        launcher = scene.start("--budget", "3", "--ttl", "2", "--workers", "2")
        scene.wait_for_step(2, trials=2)
        postgres.control("stop", "-m", "immediate")
        time.sleep(3)
        postgres.control("start")
        assert launcher.wait(40) == 0
        assert scene.settle().complete == 3
        for number in range(3):
            assert [line["step"] for line in scene.steps(number)] == list(range(STEPS))

    @pytest.mark.faults
    def test_after_a_restart_expired_leases_wait_a_ttl_for_their_owners(self, scene, postgres):
        ledger = scene.open(budget=1, ttl=2.0)
        claim = take(ledger)
        time.sleep(2.1)
        postgres.control("restart", "-m", "immediate")
        other = scene.open()
        assert other.claim(SPACE, RandomSampler) == Wait()
        wait_until(
            lambda: (
                isinstance(found := other.claim(SPACE, RandomSampler), Claim)
                and found.attempt == 2
            )
        )
        assert claim.attempt == 1

    @pytest.mark.faults
    def test_a_released_trial_does_not_wait_after_a_restart(self, scene, postgres):
        ledger = scene.open(budget=1, ttl=LONG_TTL)
        ledger.release(take(ledger))
        postgres.control("restart", "-m", "immediate")
        complete(ledger, take(ledger))
        assert scene.settle().complete == 1
