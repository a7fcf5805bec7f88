"""Replicates raced inside a search: which point, under which seed, and never too many."""

import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import numpy as np
import pytest

from bdense.errors import InputError
from bdense.weights.space import PLAIN
from search.analysis.comparison import compare
from search.analysis.racing import Contender, next_replicate, plan_replicate
from search.analysis.stop_rule import LargestGain, largest_gain, stop_or_plan
from search.spec.space import make_sampler, search_space
from search.storage.ledger import Claim
from search.study.arms import ROW_SPACE, Arm, ArmRow
from search.study.study import Study
from search.worker.worker import Worker
from tests.measured import command, complete, finish, normalised, search, statements
from tests.rows import SFD
from tests.studies import LEARNED, spec

SEEDS = [0, 1, 2, 3, 4, 5]
# FIDs of 40 seeds: an offset for each, and what a seed's students have beyond it.
OFFSETS, NOISE = 0.3, 0.1


def contender(trial: int, mean: float = 0.0, *, seeds: int = 1, ended: int | None = None):
    return Contender(
        trial=trial,
        mean=mean,
        error=0.1,
        seeds=frozenset(SEEDS[:seeds]),
        ended=seeds if ended is None else ended,
    )


def bowl(a: float) -> float:
    return 10.0 + 0.8 * (a - 1.2) ** 2


def flat(a: float) -> float:
    return 10.0


class Simulated:
    """A search whose FIDs are a curve, a seed's offset and noise; plain has 1 more than uniform.

    One object stands for one worker: several may share a study.
    """

    def __init__(
        self, url: str, curve: Callable[[float], float], *, seed: int = 0, **plan
    ) -> None:
        usual = {"trials": 12, "replicates": 3, "sampler": {"name": "RandomSampler"}}
        self.study = Study.create(url, normalised(plan=usual | plan))
        self.curve, self.seed = curve, seed
        finish(self.study, self.of_arm)

    def fid(self, a: float, training: int, more: float = 0.0) -> float:
        own = np.random.default_rng([self.seed, training, round(1e6 * (a + more + 10))])
        offset = np.random.default_rng([self.seed, training]).normal(0, OFFSETS)
        return float(self.curve(a) + more + offset + own.normal(0, NOISE))

    def of_arm(self, arm: Arm, row: ArmRow) -> float:
        if arm.baseline == PLAIN:
            return self.fid(0.0, row.seed, more=1.0)
        return self.fid(arm.params.get("a", 0.0), row.seed)

    def trial(self) -> bool:
        """Run the next new point; whether there was one."""
        study = self.study
        claim = study.search.claim(
            search_space(study.spec), lambda offset: make_sampler(study.spec, offset)
        )
        if isinstance(claim, Claim):
            complete(study, study.search, claim, self.fid(claim.params["a"], 0))
        return isinstance(claim, Claim)

    def run(self, most: int = 1000) -> list[int | tuple[int, int]]:
        """Work on rows as a worker does: trials by number, replicates by trial and seed."""
        done: list[int | tuple[int, int]] = []
        while len(done) < most:
            if stop_or_plan(self.study):
                done += [
                    (self.study.arms[row.arm].trial, row.seed)
                    for row in finish(self.study, self.of_arm)
                ]
            elif self.trial():
                done.append(self.study.search.size() - 1)
            else:
                break
        return done


def replicates(study: Study) -> list[tuple[int, int]]:
    return [
        (study.arms[row.arm].trial, row.seed)
        for row, _ in study.rows()
        if study.arms[row.arm].trial is not None
    ]


# ---- which one is next ----


@pytest.mark.parametrize(
    ("contenders", "chosen"),
    [
        ([], None),
        # Of points with as many seeds the lowest leads, and gets its next seed first.
        ([contender(7), contender(3)], (7, 1)),
        # The one of most seeds leads: it is brought to all of them.
        ([contender(7), contender(3, 0.1, seeds=3)], (3, 3)),
        # While it runs, others follow up to the number of its seeds.
        ([contender(7, seeds=2, ended=1), contender(3)], (3, 1)),
        ([contender(7, seeds=2, ended=1), contender(3, seeds=2)], None),
        # As many more at once as have ended: after two seeds two more.
        ([contender(7, seeds=3, ended=2)], (7, 3)),
        ([contender(7, seeds=4, ended=2)], None),
        ([contender(7, seeds=4, ended=3)], (7, 4)),
        # Not one that is worse, which leads no more.
        ([contender(7), contender(3, 0.3, seeds=3)], (7, 1)),
        # All seeds: the next one is brought there, the better first.
        ([contender(7, seeds=6), contender(3, 0.01, seeds=2), contender(1, 0.02)], (3, 2)),
        ([contender(7, seeds=6), contender(3, 0.01, seeds=6), contender(1, 0.02)], (1, 1)),
        # Two standard deviations of 0.1 above the lowest is worse; 1.9 are not.
        ([contender(7, seeds=6), contender(3, 0.2)], None),
        ([contender(7, seeds=6), contender(3, 0.19)], (3, 1)),
        # Uniform weights are lower than all of them.
        ([contender(7, 0.3), contender(3, 0.4)], None),
        ([contender(7, seeds=6)], None),
    ],
)
def test_the_next_replicate(contenders, chosen):
    found = next_replicate(contenders, SEEDS)
    assert (found and (found[0].trial, found[1])) == chosen


def test_a_race_plans_no_row_twice_keeps_its_budget_and_favours_the_valley(url):
    simulated = Simulated(url, bowl, trials=14, race=6)
    done = simulated.run()
    study = simulated.study
    raced = replicates(study)
    assert len(set(raced)) == len(raced)
    assert study.search.counts().complete == 8
    assert 3 <= len(raced) <= 6
    assert len(done) == 8 + len(raced)
    assert {s for _, s in raced} <= {1, 2}
    # Its share grows with the trials: never more than 6/8 of them.
    for end in range(len(done)):
        so_far = [isinstance(each, tuple) for each in done[: end + 1]]
        assert sum(so_far) <= 6 / 8 * so_far.count(False)
    slopes = {trial.number: trial.params["a"] for trial in study.search.study.trials}
    trained = Counter(trial for trial, _ in raced)
    leading = [bowl(slopes[trial]) for trial, count in trained.items() if count == 2]
    assert leading
    assert min(leading) <= np.median([bowl(a) for a in slopes.values()])
    # Students of raced points stay on the disk.
    assert set(study.search.attribute("kept_students")) == {trial for trial, _ in raced}
    # Nothing is left, here or for another launch.
    assert not stop_or_plan(study)
    assert (study.left(), replicates(study)) == (0, raced)


@pytest.mark.filterwarnings("ignore")  # threads share what ignores those of a fit
def test_two_workers_at_once_plan_as_one(url):
    """Each asks after each row, at the same time; together they plan what one alone would."""
    first = Simulated(url, bowl, trials=12, race=5)
    second = Study.open(url, "digits")
    planned = 0
    for _ in range(7):
        first.trial()
        with ThreadPoolExecutor(2) as pool:
            planned += sum(pool.map(plan_replicate, [first.study, second]))
        assert len(replicates(first.study)) == planned
        assert second.given.budget == second.given.size()
    raced = replicates(second)
    assert len(set(raced)) == len(raced) == planned <= 5
    assert planned >= 2
    finish(second, first.of_arm)
    assert second.left() == 0


def test_what_a_worker_did_not_plan_before_it_died_the_next_launch_does(url):
    """The arm is known and the budget raised, but the row was never written."""
    simulated = Simulated(url, bowl, trials=12, race=4)
    for _ in range(8):
        simulated.trial()
    study, given = simulated.study, simulated.study.given
    size = given.size()
    given.change("arms", lambda arms: [*arms, {"name": "", "params": {"a": 9.0}, "trial": 99}])
    given.change("budget", lambda _: size + 1)
    assert study.left() == 1
    assert plan_replicate(study)
    assert (given.size(), given.budget) == (size + 1, size + 1)


def test_a_replicate_that_fails_is_not_tried_forever(url):
    simulated = Simulated(url, bowl, trials=10, race=4)
    for _ in range(6):
        simulated.trial()
    for _ in range(10):
        if stop_or_plan(simulated.study):
            claim = simulated.study.given.claim(ROW_SPACE, None)
            simulated.study.given.fail(claim, "diverged", "the loss is not finite", {})
    raced = replicates(simulated.study)
    assert len(set(raced)) == len(raced) <= 4
    assert simulated.study.left() == 0


def test_a_worker_trains_points_again_in_place_of_new_ones(url, monkeypatch, shared_cache):
    """Real trainings, of four updates each, until nothing is left."""
    monkeypatch.setenv("BDENSE_CACHE", str(shared_cache))
    plan = {"trials": 4, "replicates": 2, "race": 2}
    study = Study.create(url, spec(SFD, plan=plan, evaluation__images=64))
    worker = Worker(study)
    while (claimed := worker.claim()) is not None:
        worker.work(claimed)
    assert (study.left(), study.search.counts().complete) == (0, 2)
    assert sorted(replicates(study)) == [(0, 1), (1, 1)]
    trials = study.search.study.trials
    for result in compare(study).results[2:]:
        trial = trials[result.arm.trial]
        assert result.values[0] == trial.value
        again = study.given.study.trials[result.rows[1]]
        assert again.user_attrs["fid"]["seeds"] == {"training": 1, "evaluation": 0}
        assert again.user_attrs["weights"] == trial.user_attrs["weights"]
        assert again.value != trial.value


# ---- what it is good for ----


def search_with_one_replicate(folder) -> Study:
    url, plan = f"sqlite:///{folder / 'few.db'}", {"trials": 1, "replicates": 3}
    search(url, [({"a": 0.4}, 10.0)], study=normalised(plan=plan), plain=12.0, uniform=11.0)
    study = Study.create(url, normalised(plan=plan | {"trials": 2, "race": 1}))
    assert plan_replicate(study)
    finish(study, lambda arm, row: 10.0)
    return study


def test_raced_points_are_compared_and_recommended_and_best_by_their_mean(url, tmp_path):
    """Trial 3 was lucky under the search's seed: others have the lower mean over the seeds."""
    lucky = {0.4: 10.6, 1.2: 10.0, 1.3: 10.1, 2.0: 9.9, 2.4: 10.9, 2.9: 12.2}
    study = search(
        url,
        [({"a": a}, fid) for a, fid in lucky.items()],
        study=normalised(plan={"trials": 6, "replicates": 3}),
        plain=12.0,
        uniform=11.0,
    )
    study = Study.create(url, normalised(plan={"trials": 12, "replicates": 3, "race": 6}))
    assert study.search.best().number == 3
    while plan_replicate(study):
        finish(study, lambda arm, row: bowl(arm.params["a"]) + 0.01 * row.seed)
    comparison = compare(study)
    plain, uniform, *raced = comparison.results
    assert (plain.mean().mean, uniform.mean().mean) == (12.0, 11.0)
    assert [len(each.figures) for each in raced] == sorted(
        (len(r.figures) for r in raced), reverse=True
    )
    best = raced[0]
    # Its own trial is its training under the first seed.
    a = best.arm.params["a"]
    assert best.values == pytest.approx({0: lucky[a], 1: bowl(a) + 0.01, 2: bowl(a) + 0.02})
    assert best.arm.trial != 3
    # As many statements as with one raced point.
    few = search_with_one_replicate(tmp_path)
    assert statements(study, lambda: compare(study)) == statements(few, lambda: compare(few))
    told = json.loads(command("best", "digits", "--json").out)
    assert told["best"]["number"] == best.arm.trial
    assert told["recommended"]["params"] == best.arm.params
    assert told["recommended"]["fid"] == pytest.approx(best.mean().mean)
    assert "ended_early" not in told
    shown = command("best", "digits").out
    assert best.arm.name in shown
    assert command("report", "digits", "--out", tmp_path / "shown").status == 0


@pytest.mark.parametrize(
    ("plan", "weights", "named"),
    [
        ({"race": 2, "replicates": 1}, {}, "plan.race needs .* replicates is 1"),
        ({"stop": True, "replicates": 2}, {}, "plan.stop needs .* replicates is 2"),
        ({"race": 4}, {}, "plan.race 4 of 4 trials"),
        ({"stop": True}, LEARNED, "plan.stop: .* learned weights"),
    ],
)
def test_a_race_that_cannot_be_run_is_refused(plan, weights, named):
    changes = {"weights": weights} if weights else {}
    with pytest.raises(InputError, match=named):
        spec(plan={"trials": 4, "replicates": 3} | plan, **changes)


# ---- when nothing is left to find ----


def test_on_a_flat_space_the_search_ends_early_and_may_be_carried_on(url):
    simulated = Simulated(url, flat, trials=24, stop=True)
    done = simulated.run()
    study = simulated.study
    found = LargestGain.of(study)
    assert 8 <= len(done) < 24
    assert (found.trials, found.arm) == (len(done), "uniform weights")
    assert 0 <= found.gain < found.least_difference
    # It counts as complete, and says so.
    assert (study.left(), study.counts().planned) == (0, len(done))
    for verb in ("best", "status"):
        assert found.text() in command(verb, "digits").out
    assert json.loads(command("best", "digits", "--json").out)["ended_early"] == asdict(found)
    # The same launch again ends at once; without the rule it goes on.
    again = Simulated(url, flat, trials=24, stop=True)
    assert again.run() == []
    on = Simulated(url, flat, trials=14)
    assert len(on.run()) == 14 - len(done)
    assert LargestGain.of(on.study) is None


def test_with_a_winner_that_is_not_resolved_the_search_goes_on(url):
    """The valley lies 1.2 below uniform weights, which only their seeds can be recommended."""
    simulated = Simulated(url, bowl, trials=12, stop=True)
    assert len(simulated.run()) == 12
    found = largest_gain(simulated.study)
    assert found.gain > found.least_difference
    assert LargestGain.of(simulated.study) is None


def test_a_winner_that_the_race_has_resolved_ends_it(url):
    simulated = Simulated(url, bowl, trials=40, race=16, stop=True)
    done = simulated.run()
    found = LargestGain.of(simulated.study)
    assert len(done) < 30
    assert found.arm.startswith("a ")
    slope = float(found.arm.split()[1])
    assert bowl(slope) - 10 < found.least_difference


def test_before_its_noise_is_known_no_search_ends(searched, url):
    """Of one seed nothing is known; of four, once all have ended."""
    assert largest_gain(searched) is None
    trials = [({"a": 0.3 * i}, 10.0 + 0.1 * (i % 3)) for i in range(9)]
    study = search(url, trials, study=normalised(name="flat", plan={"trials": 9, "replicates": 4}))
    assert largest_gain(study) is not None
    more = Study.create(url, normalised(name="flat", plan={"trials": 9, "replicates": 5}))
    assert largest_gain(more) is None
