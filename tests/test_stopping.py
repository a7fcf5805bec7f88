"""When more search cannot beat the noise: synthetic studies on a real ledger."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

from search.analysis.stopping import StopRule, room_left
from search.analysis.surrogate import Evaluation, posterior, posterior_means
from search.spec.space import make_sampler, search_space
from search.spec.study_spec import StudySpec
from search.storage.ledger import ENDED_EARLY, Claim, Done, Ledger
from search.study.points import Point, enqueue
from search.study.study import Study, stopped_early
from search.study.summary import FID_KEYS, headline, standing, status_json
from tests.studies import NORMALISED, spec

SPACE = {"a": FloatDistribution(-1.0, 2.0)}


def bowl(a: float, depth: float = 0.2) -> float:
    """A FID of 10 at a = 0.7 and ``depth`` more where a is one off."""
    return 10.0 * (1.0 + depth * (a - 0.7) ** 2)


def noisy(curve: Callable[[float], float], seed: int = 0) -> Callable[[float], float]:
    """What one training seed makes of it: 1.3 per cent."""
    draws = np.random.default_rng(seed)
    return lambda a: curve(a) * (1.0 + 0.013 * draws.normal())


def evaluations(fid: Callable[[float], float], points: list[float]) -> list[Evaluation]:
    return [Evaluation(point={"a": a}, value=fid(a), group="search") for a in points]


def grid(count: int, low: float = -1.0, high: float = 2.0) -> list[float]:
    return np.linspace(low, high, count).tolist()


# ---- the bound ----


def test_the_posteriors_means_are_the_surrogates():
    measured = evaluations(noisy(bowl), grid(12))
    points = [{"a": a} for a in grid(7)]
    means, deviations = posterior(measured, points)
    assert means.tolist() == posterior_means(measured, points)
    # Far from what was measured the curve may go anywhere; a measurement's noise is not in it.
    outside, inside = posterior(measured, [{"a": 6.0}, {"a": 0.5}])[1]
    assert 0 <= inside < 0.1 < outside
    assert deviations.max() < 0.5


def test_where_all_is_measured_and_alike_nothing_is_left_to_gain():
    flat = room_left(evaluations(noisy(lambda _: 10.0), grid(16)), SPACE)
    assert 0 <= flat.gain < 0.013
    assert flat.best == pytest.approx(10.0, rel=0.01)


def test_a_valley_that_is_known_leaves_little_and_one_beyond_the_points_much():
    known = room_left(evaluations(noisy(bowl), grid(20)), SPACE)
    assert known.gain < 0.013
    slope = room_left(evaluations(noisy(bowl), grid(8, low=-1.0, high=0.0)), SPACE)
    assert slope.gain > 0.05
    # The same points where the space ends with them.
    ends = room_left(
        evaluations(noisy(bowl), grid(8, -1.0, 0.0)), {"a": FloatDistribution(-1.0, 0.0)}
    )
    assert ends.gain < slope.gain


def test_points_that_may_not_be_trained_are_none_to_gain_from():
    slope = evaluations(noisy(bowl), grid(8, low=-1.0, high=0.0))
    free = room_left(slope, SPACE)
    bounded = room_left(slope, SPACE, lambda point: point["a"] <= 0.0)
    assert bounded.gain < free.gain


def test_a_rule_that_was_never_tried_may_be_better():
    space = {"rule": CategoricalDistribution(("x", "y")), "strength": FloatDistribution(0.0, 1.0)}
    draws = np.random.default_rng(0)

    def at(rule: str, strength: float) -> Evaluation:
        fid = 10.0 * (1 + 0.013 * draws.normal()) + (3.0 if rule == "x" else 0.0)
        return Evaluation(point={"rule": rule, "strength": strength}, value=fid, group="search")

    one = [at("x", strength) for strength in grid(8, 0.0, 1.0)]
    both = [*one, *(at("y", strength) for strength in grid(8, 0.0, 1.0))]
    assert room_left(both, space).best == pytest.approx(10.0, rel=0.02)
    assert room_left(both, space).gain < 0.05


def test_one_point_tells_nothing():
    assert room_left(evaluations(bowl, [0.5] * 6), SPACE) is None


def test_what_adam_does_not_see_is_no_room():
    """Points of one b, and the space has others: b is no coordinate of the curve."""
    known = evaluations(noisy(bowl), grid(20))
    both = SPACE | {"b": FloatDistribution(-6.0, 0.0)}
    found = room_left(known, both)
    assert found.gain == pytest.approx(room_left(known, SPACE).gain, rel=0.1)
    # A slope counts where any b of it may be trained.
    slope = evaluations(noisy(bowl), grid(8, low=-1.0, high=0.0))
    free = room_left(slope, both)
    assert room_left(slope, both, lambda point: point["b"] < -5.9) == free
    assert room_left(slope, both, lambda point: point["a"] + point["b"] < -6).gain < free.gain


# ---- the rule ----

STOP = {"rule": "bound", "min_trials": 8}
ATTRIBUTES = {"fid": dict.fromkeys(FID_KEYS, ""), "weights": [1.0], "student": "student"}


def study(folder: Path, *, trials: int = 30, **keys) -> tuple[Study, StudySpec]:
    given = spec(
        weights=NORMALISED | {"a": {"low": -1.0, "high": 2.0}},
        budget__trials=trials,
        sampler={"name": "random", "startup_trials": 4},
        **keys,
    )
    return Study.create(f"sqlite:///{folder}/study.db", given), given


def search(ledger: Ledger, given: StudySpec, fid: Callable[[float], float]) -> int:
    """Ask the rule and claim, as workers do, until the study has ended; complete trials."""
    rule = StopRule(given, SPACE, lambda _: True)
    while True:
        rule(ledger)
        claim = ledger.claim(SPACE, lambda offset: make_sampler(given, offset))
        if not isinstance(claim, Claim):
            assert claim == Done()
            return ledger.counts().complete
        ledger.complete(claim, fid(claim.params["a"]), ATTRIBUTES)


def test_it_is_off_by_default(tmp_path):
    record, given = study(tmp_path)
    assert search(record.trials, given, lambda _: 10.0) == 30
    assert record.trials.attribute(ENDED_EARLY) is None
    assert "changes" not in record.trials.study.user_attrs


def test_a_study_of_noise_is_stopped_and_counts_as_ended(tmp_path):
    record, given = study(tmp_path, stop=STOP)
    complete = search(record.trials, given, noisy(lambda _: 10.0))
    assert 8 <= complete < 30
    counts = record.trials.counts()
    assert (counts.planned, counts.complete, counts.waiting) == (complete, complete, 0)
    stopped = record.trials.attribute(ENDED_EARLY)
    assert (stopped["after"], stopped["of"]) == (complete, 30)
    assert "less than its noise of 1.30% (stop.noise)" in stopped["reason"]
    [change] = record.trials.study.user_attrs["changes"]
    assert {key: change[key] for key in ("key", "old", "new", "reason")} == {
        "key": "budget",
        "old": 30,
        "new": complete,
        "reason": stopped["reason"],
    }
    now = standing(record)
    assert headline(now).endswith(f"; stopped after {complete} of 30 trials: {stopped['reason']}")
    assert status_json(now)["stopped"] == stopped


def test_a_study_that_still_gains_is_not(tmp_path):
    """The FID falls towards where nobody has looked yet, by far more than its noise."""
    record, given = study(tmp_path, trials=12, stop=STOP)
    steps = iter(range(100))

    def fid(_: float) -> float:
        return 10.0 * 0.9 ** next(steps)

    assert search(record.trials, given, fid) == 12
    assert record.trials.attribute(ENDED_EARLY) is None


def test_it_is_not_asked_before_enough_trials_are_complete(tmp_path):
    record, given = study(tmp_path, stop=STOP | {"min_trials": 20})
    assert search(record.trials, given, lambda _: 10.0) == 20
    (tmp_path / "startup").mkdir()
    record, given = study(tmp_path / "startup", stop=STOP, name="startup")
    given = given.model_copy(
        update={"sampler": given.sampler.model_copy(update={"startup_trials": 25})}
    )
    assert search(record.trials, given, lambda _: 10.0) == 25


def test_the_same_command_leaves_it_stopped_and_a_larger_budget_runs_in_full(tmp_path):
    record, given = study(tmp_path, stop=STOP)
    complete = search(record.trials, given, lambda _: 10.0)
    again, given = study(tmp_path, stop=STOP)
    assert again.trials.budget == complete
    assert search(again.trials, given, lambda _: 10.0) == complete
    # Another number is taken at its word.
    other, given = study(tmp_path, stop=STOP, trials=complete + 1)
    assert search(other.trials, given, lambda _: 10.0) == complete + 1
    more, given = study(tmp_path, stop=STOP, trials=31)
    assert stopped_early(more.trials) is None
    assert search(more.trials, given, lambda _: 10.0) == 31
    counts = more.trials.counts()
    assert counts.planned == counts.complete + counts.pruned + counts.failed == 31
    keys = [
        (c["old"], c["new"])
        for c in more.trials.study.user_attrs["changes"]
        if c["key"] == "budget"
    ]
    assert keys == [(30, complete), (complete, complete + 1), (complete + 1, 31)]


def test_a_point_planned_after_the_stop_is_run_by_the_number_that_it_names(tmp_path):
    """Also where that is the number which the rule stopped short of."""
    record, given = study(tmp_path, trials=9, stop=STOP)
    assert search(record.trials, given, lambda _: 10.0) == 8
    assert (record.trials.budget, stopped_early(record.trials)["of"]) == (8, 9)
    [_, advice] = enqueue(record, given, Point(a=0.123))
    assert advice.endswith("--trials 9")
    again, given = study(tmp_path, trials=9, stop=STOP)
    assert again.trials.budget == 9
    assert search(again.trials, given, lambda _: 10.0) == 9
    assert again.trials.counts().waiting == 0
    assert again.trials.study.trials[8].params == {"a": 0.123}


def test_dropping_the_rule_goes_on_to_the_first_budget(tmp_path):
    record, given = study(tmp_path, stop=STOP)
    assert search(record.trials, given, lambda _: 10.0) < 30
    without, given = study(tmp_path)
    assert search(without.trials, given, lambda _: 10.0) == 30


def test_what_runs_is_finished_and_what_was_planned_comes_first(tmp_path):
    record, given = study(tmp_path, stop=STOP)
    ledger, rule = record.trials, StopRule(given, SPACE, lambda _: True)
    points = grid(9)
    for a in points:
        ledger.enqueue({"a": a})
    for _ in points[:8]:
        claim = ledger.claim(SPACE, None)
        ledger.complete(claim, 10.0, {})
    rule(ledger)
    assert ledger.budget == 30  # the ninth is still to be begun
    running = ledger.claim(SPACE, None)
    StopRule(given, SPACE, lambda _: True)(ledger)
    assert (ledger.budget, ledger.attribute(ENDED_EARLY)["after"]) == (9, 9)
    assert ledger.counts().running == 1
    ledger.complete(running, 10.0, {})
    counts = ledger.counts()
    assert (counts.planned, counts.complete) == (9, 9)
    assert ledger.claim(SPACE, None) == Done()


def test_a_log_linear_search_is_judged_by_its_slopes(tmp_path):
    """As its confirmation chooses: trials of one slope, whatever their b, are one student."""
    given = spec(budget__trials=30, stop=STOP, sampler={"name": "random", "startup_trials": 4})
    ledger = Study.create(f"sqlite:///{tmp_path}/study.db", given).trials
    fid, space = noisy(lambda a: 10.0), search_space(given)
    for number, a in enumerate(grid(16, -0.5, 3.0)):
        ledger.enqueue({"a": a, "b": -6.0 + 0.001 * number})
        ledger.complete(ledger.claim(space, None), fid(a), {})
    rule = StopRule(given, space, lambda _: True)
    assert {tuple(each.point) for each in rule._evaluations(ledger)} == {("a",)}
    rule(ledger)
    assert ledger.attribute(ENDED_EARLY)["after"] == 16


def test_pruned_and_failed_trials_count_and_tell_the_curve_nothing(tmp_path):
    record, given = study(tmp_path, stop=STOP)
    ledger, rule = record.trials, StopRule(given, SPACE, lambda _: True)
    for number, a in enumerate(grid(12)):
        ledger.enqueue({"a": a})
        claim = ledger.claim(SPACE, None)
        if number % 3 == 2:
            ledger.report(claim, 640, 500.0)
            ledger.prune(claim, {})
        elif number == 0:
            ledger.fail(claim, "diverged", "the loss is not finite", {})
        else:
            ledger.complete(claim, 10.0, {})
        rule(ledger)
        if number < 11:
            assert ledger.budget == 30
    counts = ledger.counts()
    assert (counts.complete, counts.pruned, counts.failed) == (7, 4, 1)
    ledger.enqueue({"a": 0.123})
    ledger.complete(ledger.claim(SPACE, None), 10.0, {})
    rule(ledger)
    counts = ledger.counts()
    assert (counts.planned, counts.ended) == (13, 13)


def test_the_bound_is_relative_to_the_noise_given(tmp_path):
    measured = evaluations(noisy(bowl, seed=2), grid(10))
    gain = room_left(measured, SPACE).gain
    assert math.isfinite(gain)
    for noise, stops in ((gain * 1.01, True), (gain * 0.99, False)):
        folder = tmp_path / str(stops)
        folder.mkdir()
        record, given = study(folder, stop=STOP | {"noise": noise})
        for each in measured:
            record.trials.enqueue(each.point)
            record.trials.complete(record.trials.claim(SPACE, None), each.value, {})
        StopRule(given, SPACE, lambda _: True)(record.trials)
        assert (record.trials.attribute(ENDED_EARLY) is not None) == stops
