"""Processes that really die, and what becomes of their trials."""

import os
import signal

import pytest
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from search.storage.ledger import Done
from tests.contracts.ledger_worker import SPACE, STEPS, objective
from tests.contracts.scene import LONG_TTL, PATIENCE_SECONDS, take_once_free, wait_until


class Deaths:
    """Nothing is lost, and nothing computed twice."""

    @pytest.mark.faults
    def test_a_killed_workers_trial_is_resumed_at_once(self, scene):
        scene.open(budget=2, ttl=LONG_TTL)
        victim = scene.start()
        scene.wait_for_step(3)
        victim.kill()
        at_death = len(scene.steps(0))
        assert scene.start().wait(PATIENCE_SECONDS) == 0
        counts = scene.settle()
        assert (counts.complete, counts.failed) == (2, 0)
        second = [line["step"] for line in scene.steps(0) if line["attempt"] == 2]
        # One step may have been logged and not yet stored when the signal came.
        assert second[0] >= at_death - 1
        assert second[-1] == STEPS - 1
        assert len(scene.steps(1)) == STEPS

    @pytest.mark.faults
    def test_a_killed_launcher_with_its_workers_is_carried_on_by_the_same_command(self, scene):
        command = ("--budget", "2", "--ttl", str(LONG_TTL), "--workers", "2")
        with scene.held_up():
            launcher = scene.start_program(*command)
            scene.wait_for_step(3, trials=2)
            os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
        assert scene.start_program(*command).wait(PATIENCE_SECONDS) == 0
        assert scene.settle().complete == 2
        for number in (0, 1):
            attempts = [line["attempt"] for line in scene.steps(number)]
            assert set(attempts) == {1, 2}
            assert STEPS <= len(attempts) <= STEPS + 1

    @pytest.mark.faults
    def test_workers_that_outlive_their_launcher_keep_their_trials(self, scene):
        command = ("--budget", "3", "--ttl", str(LONG_TTL), "--workers", "2")
        with scene.held_up():
            launcher = scene.start(*command)
            scene.wait_for_step(2, trials=2)
            launcher.kill()
            launcher.wait()
        assert scene.start(*command).wait(PATIENCE_SECONDS) == 0
        assert scene.settle().complete == 3
        for number in range(3):
            assert [line["step"] for line in scene.steps(number)] == list(range(STEPS))

    @pytest.mark.faults
    def test_two_launchers_at_once_share_one_budget(self, scene):
        command = ("--budget", "3", "--ttl", str(LONG_TTL), "--workers", "2")
        launchers = [scene.start(*command) for _ in range(2)]
        assert [launcher.wait(PATIENCE_SECONDS) for launcher in launchers] == [0, 0]
        assert scene.settle().complete == 3
        for number in range(3):
            assert [line["step"] for line in scene.steps(number)] == list(range(STEPS))

    @pytest.mark.faults
    def test_a_frozen_worker_is_fenced_when_it_thaws(self, scene):
        ledger = scene.open(budget=1, ttl=2.0)
        zombie = scene.start()
        scene.wait_for_step(3)
        scene.freeze(zombie)
        claim = take_once_free(ledger)
        assert (claim.number, claim.attempt, claim.adopted) == (0, 2, True)
        with ledger.holding(claim) as held:
            zombie.send_signal(signal.SIGCONT)
            wait_until((scene.folder / "lost").exists)
            held.check()
        assert ledger.counts().complete == 0
        ledger.complete(claim, objective(dict(claim.params)), {"attempt": 2})
        assert zombie.wait(PATIENCE_SECONDS) == 0
        scene.settle()
        assert ledger.study.trials[0].user_attrs["attempt"] == 2
        assert "attempt 1 no longer holds it" in (scene.folder / "lost").read_text()

    @pytest.mark.faults
    def test_a_trial_that_kills_its_workers_is_given_up(self, scene):
        ledger = scene.open(budget=1, ttl=LONG_TTL, max_attempts=2)
        for attempt in (1, 2):
            victim = scene.start()
            wait_until(lambda attempt=attempt: scene.attempts(0) == attempt)
            victim.kill()
            victim.wait()
        assert ledger.claim(SPACE, RandomSampler) == Done()
        trial = ledger.study.trials[0]
        assert trial.state is TrialState.FAIL
        assert trial.user_attrs["reason"] == "poisoned"
        assert "started 2 times" in trial.user_attrs["error"]
        assert scene.settle().failed == 1
