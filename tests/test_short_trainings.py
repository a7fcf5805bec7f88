"""Short trainings inside a search: what is trained next, for how long, and never twice."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from bdense.errors import InputError
from bdense.weights.space import PLAIN
from search.analysis.observations import observed
from search.analysis.short_trainings import most_telling, plan_short
from search.analysis.stop_rule import stop_or_plan
from search.analysis.surrogate import Posterior
from search.report.log_lines import logged_row
from search.spec.space import make_sampler, search_space
from search.storage.ledger import Claim
from search.study.arms import Arm, ArmRow
from search.study.study import Study
from search.study.summary import baselines_of
from search.worker.worker import Worker
from tests.measured import complete, finish, normalised
from tests.rows import PD, SFD
from tests.studies import NORMALISED, spec

VALLEY = 1.2


# ---- which training tells most ----


def known(means: list[float], correlation: float) -> Posterior:
    """n independent points, and short trainings of each, which agree with full ones so far."""
    n = len(means)
    across = np.block([[np.eye(n), correlation * np.eye(n)], [correlation * np.eye(n), np.eye(n)]])
    return Posterior(means=np.array(means * 2), covariance=across, noise=0.1)


@pytest.mark.parametrize(("correlation", "is_short"), [(0.45, False), (0.55, True)])
def test_a_short_training_pays_where_r_squared_is_above_its_cost(correlation, is_short):
    costs = np.array([1.0, 1.0, 0.25, 0.25])
    chosen = most_telling(known([0.0, 0.0], correlation), 2, costs, [])
    assert (chosen >= 2) == is_short


def test_where_the_lowest_may_be_is_asked_first():
    costs = np.array([1.0, 1.0, 1.0, math.inf, math.inf, math.inf])
    assert most_telling(known([3.0, 0.0, 5.0], 0.0), 3, costs, []) == 1
    # Under way it tells no more; of the others the lower may still be the lowest.
    assert most_telling(known([3.0, 0.0, 5.0], 0.0), 3, costs, [1]) == 0


# ---- a search with them ----


class Simulated:
    """A search whose FIDs are a bowl; short trainings have a steeper one, on another level."""

    def __init__(
        self, url: str, *, trials: int = 6, short: int = 10, lowest: float = VALLEY
    ) -> None:
        plan = {
            "trials": trials,
            "replicates": 3,
            "short": {"trainings": short},
            "sampler": {"name": "RandomSampler"},
        }
        self.study, self.lowest = Study.create(url, normalised(plan=plan)), lowest
        self.done: list[tuple[float, bool]] = []  # slope, and whether short

    def fid(self, a: float, *, short: bool) -> float:
        self.done.append((a, short))
        steep, valley = (1.5, self.lowest) if short else (0.5, VALLEY)
        noise = np.random.default_rng([round(1000 * (a + 10)), short]).normal(0, 0.05)
        return (13.0 if short else 10.0) + steep * (a - valley) ** 2 + float(noise)

    def of_arm(self, arm: Arm, row: ArmRow) -> float:
        if arm.baseline == PLAIN:
            return 12.0
        return self.fid(arm.params.get("a", 0.0), short=row.variant > 0)

    def trial(self) -> bool:
        study = self.study
        claim = study.search.claim(
            search_space(study.spec), lambda offset: make_sampler(study.spec, offset)
        )
        if isinstance(claim, Claim):
            complete(study, study.search, claim, self.fid(claim.params["a"], short=False))
        return isinstance(claim, Claim)

    def run(self) -> None:
        """Work on rows as a worker does."""
        finish(self.study, self.of_arm)
        while stop_or_plan(self.study) or self.study.left():
            if not finish(self.study, self.of_arm) and not self.trial():
                break


def short_rows(study: Study) -> list[ArmRow]:
    return [row for row, _ in study.rows() if row.variant]


def test_the_first_short_ones_are_uniform_weights_and_spread_points(url):
    simulated = Simulated(url)
    study = simulated.study
    (row,) = short_rows(study)
    assert study.arms[row.arm].baseline == "uniform"
    assert study.variants == [{}, {"kimg": study.spec.method.options["kimg"] / 4}]
    # Before anything has ended there is no surrogate: the next ones are spread.
    assert plan_short(study)
    assert plan_short(study)
    slopes = [study.arms[row.arm].params.get("a") for row in short_rows(study)]
    assert slopes == [None, -0.5, 1.25]


def test_a_search_looks_around_by_short_trainings_and_tries_what_they_promise(url):
    simulated = Simulated(url)
    simulated.run()
    study, done = simulated.study, simulated.done
    short = short_rows(study)
    assert 4 <= len(short) <= 10
    assert study.search.counts().complete == 6
    assert study.left() == 0
    assert not stop_or_plan(study)
    # No training twice, and all under the trials' seed.
    assert len({(row.arm, row.seed) for row in short}) == len(short)
    assert {row.seed for row in short} == {0}
    slopes = [trial.params["a"] for trial in study.search.study.trials]
    assert len(set(slopes)) == 6
    # Four show a curve; the first trial lies in its valley.
    first_trial = next(i for i, (a, is_short) in enumerate(done) if a in slopes and not is_short)
    assert sum(is_short for _, is_short in done[:first_trial]) >= 4
    assert abs(done[first_trial][0] - VALLEY) < 0.2
    # Baselines are those of full length.
    assert baselines_of(study)["uniform"].value < 11


def test_where_they_mislead_the_trials_find_the_valley_all_the_same(url):
    """Short trainings are best at 2.5, where the first trial is."""
    simulated = Simulated(url, trials=10, lowest=2.5)
    simulated.run()
    slopes = [trial.params["a"] for trial in simulated.study.search.study.trials]
    assert abs(slopes[0] - 2.5) < 0.3
    assert np.median([abs(a - VALLEY) for a in slopes[5:]]) < 0.3


def test_they_are_observations_of_another_length_and_level(url):
    simulated = Simulated(url)
    simulated.run()
    study = simulated.study
    trials = study.search.rows(state=study.search.study.trials[0].state)
    found = observed(study, trials).observations
    short = [each for each in found if each.group.startswith("short")]
    assert len(short) == len(short_rows(study))
    assert {each.log_length for each in short} == {math.log(0.25)}
    assert {each.log_length for each in found if each not in short} == {0.0}
    assert {each.group for each in short}.isdisjoint(
        each.group for each in found if each not in short
    )


def test_a_search_whose_budget_shrank_meanwhile_plans_no_more(url):
    """As by another worker's stop rule, or a launch with fewer trials."""
    simulated = Simulated(url)
    finish(simulated.study, simulated.of_arm)
    simulated.study.search.start_no_more()
    assert not plan_short(simulated.study)


@pytest.mark.filterwarnings("ignore")  # threads share what ignores those of a fit
def test_two_workers_at_once_plan_one(url):
    simulated = Simulated(url, short=6)
    first, second = simulated.study, Study.open(url, "digits")
    finish(first, simulated.of_arm)
    for _ in range(8):
        before = len(short_rows(first))
        with ThreadPoolExecutor(2) as pool:
            planned = sum(pool.map(plan_short, [first, second]))
        assert len(short_rows(first)) == before + planned <= 6
        finish(first, simulated.of_arm)
    rows = [(first.arms[row.arm].params.get("a"), row.seed) for row in short_rows(first)]
    assert len(set(rows)) == len(rows)


def test_a_worker_trains_them_for_their_share(url, monkeypatch, shared_cache):
    """Real trainings: four updates for a trial, two for a short one."""
    monkeypatch.setenv("BDENSE_CACHE", str(shared_cache))
    plan = {"trials": 2, "replicates": 1, "short": {"length": 0.5, "trainings": 3}}
    study = Study.create(url, spec(SFD, plan=plan, evaluation__images=64))
    worker = Worker(study)
    while (claimed := worker.claim()) is not None:
        worker.work(claimed)
    assert (study.left(), study.search.counts().complete) == (0, 2)
    kimg = study.spec.method.options["kimg"]
    values: dict[int, list[float]] = {}
    for _, row, trial in study.complete_arms():
        changed = trial.user_attrs.get("variant", {})
        assert changed == ({"kimg": kimg / 2} if row.variant else {})
        values.setdefault(row.variant, []).append(trial.value)
    assert [len(each) for each in values.values()] == [2, 3]


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"plan__short": {"length": 1.0}}, "plan.short.length"),
        ({"plan__short": {"trainings": 0}}, "plan.short.trainings"),
        ({"plan__short": {"kimg": 3}}, "kimg"),
    ],
)
def test_short_trainings_that_cannot_be_run_are_refused(keys, named):
    with pytest.raises(InputError, match=named):
        spec(**{"plan__short": {}} | keys)


def test_a_method_without_a_length_in_images_is_refused():
    plan = PD["plan"] | {"short": {}}
    with pytest.raises(InputError, match=r"plan\.short .*progressive"):
        spec(PD, plan=plan)


def test_a_trial_that_failed_is_no_choice_again(url):
    """It is not observed, so the surrogate would choose it for ever."""
    simulated = Simulated(url, trials=8, short=12)
    study = simulated.study
    finish(study, simulated.of_arm)
    failed = 0
    while stop_or_plan(study) or study.left():
        if finish(study, simulated.of_arm):
            continue
        if failed == 0 and study.counts().waiting:
            claim = study.search.claim(search_space(study.spec), None)
            study.search.fail(claim, "diverged", "the loss is not finite", {})
            failed = 1
        elif not simulated.trial():
            break
    short = len(short_rows(study))
    # The surrogate goes on choosing: all trials while short ones are left are its own.
    spread = {round(-0.5 + 3.5 * i / 128, 9) for i in range(128)}
    slopes = [trial.params["a"] for trial in study.search.study.trials]
    assert failed == 1
    assert short < 12
    assert {round(a, 9) for a in slopes} <= spread
    assert len(set(slopes)) == len(slopes)


def test_short_rows_are_no_baselines(url):
    """Of uniform weights there are two under the first seed: the logs are the full one's."""
    simulated = Simulated(url)
    finish(simulated.study, simulated.of_arm)
    study = simulated.study
    ledger, number = logged_row(study, trial=None, baseline="uniform")
    assert ArmRow(**ledger.asked()[number]).variant == 0


def test_a_one_shot_training_beside_them_is_refused():
    with pytest.raises(InputError, match=r"plan\.short .* one_shot"):
        spec(plan__short={}, plan__one_shot={}, weights=NORMALISED)
