"""The recommended arm is the simplest within a tie; a study knows what it can tell."""

import math

import pytest
from scipy import stats
from scipy.stats import t

from bdense.errors import InputError
from bdense.metrics.records import FID
from bdense.weights.space import PLAIN, UNIFORM
from search.analysis.comparison import ArmResult, Comparison
from search.analysis.paired import Mean, mean_of, paired_difference
from search.analysis.recommendation import Noise, noise_of, recommend
from search.spec.metric import Metric
from search.spec.sections import MOST_IMAGES
from search.study.arms import Arm
from tests.measured import fid

ARMS = {
    "plain": Arm(name="plain SFD", params={"baseline": "plain"}),
    "uniform": Arm(name="uniform weights", params={"baseline": "uniform"}),
    "ours": Arm(name="a 1.000 (trial 3)", params={"a": 1.0, "b": -2.0}, trial=3),
    "other": Arm(name="a 0.500 (trial 5)", params={"a": 0.5, "b": -1.0}, trial=5),
}


def compared(**values) -> Comparison:
    """Arms and their FIDs under seeds 0, 1, ..."""
    results = [
        ArmResult(
            arm=ARMS[name],
            figures={s: FID.read(fid(value, training=s)) for s, value in enumerate(fids)},
            rows=dict(enumerate(range(len(fids)))),
        )
        for name, fids in values.items()
    ]
    return Comparison(
        metric=Metric(), baselines=(PLAIN, UNIFORM), variant={}, results=tuple(results)
    )


@pytest.mark.parametrize(
    ("values", "chosen"),
    [
        # Each difference is sure where it is the same under every seed, but for a little.
        ({"plain": (4, 4.1, 4), "uniform": (3, 3, 3), "ours": (2, 2, 2.1)}, "ours"),
        ({"plain": (4, 4.1, 4), "uniform": (3, 3, 3), "ours": (2.5, 3.4, 3)}, "uniform"),
        ({"plain": (4, 4.1, 4), "uniform": (8, 8, 8.1), "ours": (3.5, 4.6, 4)}, "plain"),
        # The best beats plain distillation and ties with uniform weights, which are simpler.
        ({"plain": (4, 4.1, 4), "uniform": (3, 5, 4), "ours": (3, 3, 3.1)}, "uniform"),
        ({"uniform": (3, 3, 3.1), "ours": (2, 2, 2.1), "other": (1.9, 2.1, 2)}, "ours"),
        # Seeds that failed must not make a winner.
        ({"plain": (4, 4.1, 4), "uniform": (3, 3, 3), "ours": (1,)}, "uniform"),
        # One seed: there is no interval, and the lowest is taken.
        ({"plain": (4,), "uniform": (8,), "ours": (4.5,)}, "plain"),
        ({"plain": (4,), "uniform": (3,), "ours": (4.5,)}, "uniform"),
        ({"plain": (4,)}, "plain"),
    ],
)
def test_the_simplest_arm_within_a_tie(values, chosen):
    found = recommend(compared(**values))
    assert found.arm is ARMS[chosen]
    assert found.value == pytest.approx(sum(values[chosen]) / len(values[chosen]))
    assert found.why
    told = found.as_dict()
    assert told["params"] == ARMS[chosen].params
    if chosen == "plain" or "plain" not in values or len(values[chosen]) == 1:
        assert told["interval"] is None
    else:
        low, high = told["interval"]
        assert low < high


def test_no_baseline_no_recommendation():
    assert recommend(compared(ours=(1, 2, 3))) is None


def test_the_least_difference_by_hand():
    """uniform - plain is -1, -2, -3: deviation 1; the effects are the same, so latents add 0."""
    found = noise_of(compared(plain=(4, 4, 4), uniform=(3, 2, 1)))
    assert (found.seeds, found.latents, found.replicates) == (1.0, 0.0, 3)
    assert found.least_difference == pytest.approx(t.ppf(0.975, 2))


def test_latents_add_to_the_noise():
    """Effects that differ by 1, 0, -1, 0: deviation sqrt(2/3), of four groups half of it."""
    both = compared(plain=(4, 4, 4), uniform=(3, 2, 1))
    effects = {"plain": (0.5, 0, -0.5, 0), "uniform": (-0.5, 0, 0.5, 0)}
    results = [
        ArmResult(
            arm=each.arm,
            figures={
                s: FID.read({**one.as_dict(), "effects": effects[each.arm.baseline]})
                for s, one in each.figures.items()
            },
            rows=each.rows,
        )
        for each in both.results
    ]
    found = noise_of(
        Comparison(metric=Metric(), baselines=(PLAIN, UNIFORM), variant={}, results=tuple(results))
    )
    assert found.latents == pytest.approx(math.sqrt(2 / 3) / 2)
    assert found.least_difference == pytest.approx(t.ppf(0.975, 2) * math.sqrt(1 + 1 / 6))


@pytest.mark.parametrize(
    ("latents", "seeds", "images"),
    # Of 4096 images: four times as many halve 0.4 to half of 0.4; 1.5625 times, 0.25 to 0.2.
    [(0.4, 0.4, 16384), (0.25, 0.4, 7168), (0.2, 0.4, None), (None, 0.4, None), (0.4, None, None)],
)
def test_images_that_balance_the_noise(latents, seeds, images):
    found = Noise(metric=Metric(), latents=latents, seeds=seeds, replicates=3, images=4096)
    assert found.balanced_images == images
    assert ("evaluation.images" in found.text()) == (images is not None)


@pytest.mark.parametrize(
    ("latents", "images", "told"),
    [
        (0.4, 4096, f"even evaluation.images: {MOST_IMAGES} in a new study would not bring"),
        (0.2, 12_375, f"; evaluation.images: {MOST_IMAGES} in a new study would bring"),
        (0.4, MOST_IMAGES, None),
    ],
)
def test_no_study_is_told_to_draw_more_images_than_the_literature(latents, images, told):
    """49,500 are needed in the second case, which rounds up to more than the literature's."""
    text = Noise(metric=Metric(), latents=latents, seeds=0.2, replicates=3, images=images).text()
    assert ("evaluation.images" in text) == (told is not None)
    assert (told or "") in text


@pytest.mark.parametrize(
    "values", [{"plain": (4,), "uniform": (3,)}, {"plain": (4, 4)}, {"uniform": (4, 4)}]
)
def test_noise_that_was_not_measured(values):
    found = noise_of(compared(**values))
    assert (found.seeds, found.least_difference) == (None, None)
    assert found.text()


# ---- paired differences ----


OURS = {0: 2.0, 1: 2.5, 2: 3.0}
BASE = {0: 3.0, 1: 3.1, 2: 3.9, 7: 9.0}


def test_mean_and_standard_error():
    """1, 2, 3, 4, 5: variance 10 / 4, over n = 5 values 1 / 2; one value has no error."""
    error = pytest.approx(math.sqrt(0.5))
    assert mean_of([1, 2, 3, 4, 5]) == Mean(mean=3.0, standard_error=error, n=5)
    assert mean_of([2.5]) == Mean(mean=2.5, standard_error=None, n=1)
    assert (mean_of([2.5]).error_text(".3f"), mean_of([2.0, 3.0]).error_text(".3f")) == (
        "-",
        "0.500",
    )


def test_the_interval_by_hand():
    """Differences -1, -0.6, -0.9: mean -5/6, variance 13/300; t(0.975, 2) = 4.302653."""
    paired = paired_difference(OURS, BASE)
    reach = 4.302653 * math.sqrt(13 / 300 / 3)
    assert paired.n == 3
    assert paired.mean == pytest.approx(-5 / 6)
    assert paired.low == pytest.approx(-5 / 6 - reach, rel=1e-6)
    assert paired.high == pytest.approx(-5 / 6 + reach, rel=1e-6)
    assert paired.relative == pytest.approx(-2.5 / 10)
    assert not paired.tie
    assert paired.text("+.2f") == "-0.83 [-1.35, -0.32]"


def test_the_interval_is_scipys():
    ours = {seed: 2.7 + 0.31 * math.sin(5 * seed) for seed in range(9)}
    base = {seed: 2.8 + 0.17 * math.cos(3 * seed) for seed in range(9)}
    interval = stats.ttest_rel(list(ours.values()), list(base.values())).confidence_interval()
    paired = paired_difference(ours, base)
    assert (paired.low, paired.high) == pytest.approx((interval.low, interval.high), rel=1e-12)


def test_ties():
    paired = paired_difference({0: 2.0, 1: 3.0}, {0: 2.5, 1: 2.9})
    assert (paired.tie, paired.text("+.2f")) == (True, "-0.20 [-4.01, +3.61], tie")
    paired = paired_difference(BASE, BASE)
    assert (paired.low, paired.high, paired.tie) == (0, 0, True)
    # One common seed, however far apart.
    paired = paired_difference({0: 1.0, 5: 4.0}, {0: 2.0, 6: 4.0})
    assert (paired.mean, paired.low, paired.high) == (-1.0, -math.inf, math.inf)
    assert (paired.n, paired.relative, paired.tie) == (1, -0.5, True)
    assert paired.text("+.2f") == "-1.00 [one seed], tie"
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_diverged_is_named(bad):
    with pytest.raises(InputError, match=rf"finite: {bad} of seed 1;"):
        paired_difference({0: 1.0, 1: bad}, BASE)
    with pytest.raises(InputError, match=rf"finite: {bad} of baseline's seed 9;"):
        paired_difference(OURS, BASE | {9: bad})
    with pytest.raises(InputError, match=rf"finite: {bad} of number 2;"):
        mean_of([1.0, 2.0, bad])
    with pytest.raises(InputError, match="no values"):
        mean_of([])


def test_of_a_program_s_metric_the_baseline_may_be_0_or_negative():
    assert paired_difference({0: 1.0}, {0: 0.0}).relative is None
    assert paired_difference({0: -1.0}, {0: -2.0}).relative == 0.5
