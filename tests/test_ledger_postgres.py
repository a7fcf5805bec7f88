"""The ledger on a real PostgreSQL server, which goes away in the middle of a run."""

import os
import signal
import threading
import time

import pytest
import sqlalchemy as sa
from optuna.samplers import RandomSampler

from search.run.ending import EarlyEnd
from search.storage.ledger import Wait
from search.storage.stop_flags import Launch, ask_all
from tests.contracts.ledger import LedgerContract
from tests.contracts.ledger_worker import SPACE, STEPS
from tests.contracts.scene import (
    LONG_TTL,
    complete,
    expire_leases,
    take,
    take_once_free,
    wait_until,
)
from tests.measured import open_unchecked

pytestmark = pytest.mark.postgres


class TestLedgerOnPostgres(LedgerContract):
    @pytest.fixture
    def url(self, postgres_url, monkeypatch) -> str:
        open_unchecked(monkeypatch)
        return postgres_url

    def test_a_servers_clock_set_ahead_ends_no_lease(self, scene):
        """Its worker gets the time of a lease to renew it."""
        ledger, other = scene.open(budget=1), scene.open()
        claim = take(ledger)
        assert other.claim(SPACE, RandomSampler) == Wait()
        expire_leases(scene.url)
        other._leases._ahead -= 1000
        assert other.claim(SPACE, RandomSampler) == Wait()
        complete(ledger, claim)

    def test_an_interrupted_launch_ends_in_time_while_the_database_is_silent(self, scene, capsys):
        ledger = scene.open(budget=1)
        launch, engine = Launch.begin([ledger]), sa.create_engine(scene.url)
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
        began = []

        def interrupted(connection: sa.Connection) -> None:
            with EarlyEnd([ledger], launch, grace=0.5) as ending:
                ending.rows_run()
                wait_until(lambda: connection.exec_driver_sql(waiting).scalar_one() > 0)
                began.append(time.monotonic())
                os.kill(os.getpid(), signal.SIGTERM)
                threading.Event().wait(20)

        with engine.connect() as connection:
            connection.exec_driver_sql("LOCK TABLE study_user_attributes")
            with pytest.raises(KeyboardInterrupt):
                interrupted(connection)
        assert 0.5 < time.monotonic() - began[0] < 10
        assert "Ctrl-C again ends at once" in capsys.readouterr().err

    @pytest.mark.faults
    def test_a_restart_of_the_server_costs_no_trial_and_no_step(self, scene, postgres):
        command = ("--budget", "3", "--ttl", "3", "--workers", "2")
        launcher = scene.start(*command)
        scene.wait_for_step(3, trials=2)
        postgres.control("restart", "-m", "immediate")
        assert launcher.wait(40) == 0
        assert scene.settle().complete == 3
        for number in range(3):
            assert [line["step"] for line in scene.steps(number)] == list(range(STEPS))

    @pytest.mark.faults
    def test_a_server_that_is_away_longer_than_a_lease_costs_no_trial_either(
        self, scene, postgres
    ):
        launcher = scene.start("--budget", "2", "--ttl", "1", "--workers", "2")
        scene.wait_for_step(2, trials=2)
        postgres.control("stop", "-m", "immediate")
        time.sleep(1.6)
        postgres.control("start")
        assert launcher.wait(40) == 0
        assert scene.settle().complete == 2
        for number in range(2):
            assert [line["step"] for line in scene.steps(number)] == list(range(STEPS))

    @pytest.mark.faults
    def test_after_a_restart_expired_leases_wait_a_ttl_for_their_owners(self, scene, postgres):
        """However long recovery took: they count from the first claim that the server answers."""
        ledger = scene.open(budget=1, ttl=1.0)
        take(ledger)
        postgres.control("restart", "-m", "immediate")
        time.sleep(1.1)
        first_answer = time.monotonic()
        claim = take_once_free(ledger)
        assert time.monotonic() - first_answer >= 1.0
        assert (claim.number, claim.attempt) == (0, 2)
        complete(ledger, claim)
        assert scene.settle().complete == 1

    @pytest.mark.faults
    def test_a_stop_after_a_restart_waits_for_no_worker_that_is_gone(self, scene, postgres):
        """Though nobody claims a trial, which would see that the server answers again."""
        ledger = scene.open(budget=1, ttl=1.0)
        take(ledger)
        postgres.control("restart", "-m", "immediate")
        ask_all([ledger])
        wait_until(lambda: ledger.held() == 0)

    @pytest.mark.faults
    def test_a_released_trial_does_not_wait_after_a_restart(self, scene, postgres):
        ledger = scene.open(budget=1, ttl=LONG_TTL)
        ledger.release(take(ledger))
        postgres.control("restart", "-m", "immediate")
        complete(ledger, take(ledger))
        assert scene.settle().complete == 1
