"""The recommended arm is the simplest within a tie; a study knows what it can tell."""

import math

import numpy as np
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
    assert paired_difference(BASE, BASE).tie
    # One common seed, however far apart.
    paired = paired_difference({0: 1.0, 5: 4.0}, {0: 2.0, 6: 4.0})
    assert (paired.mean, paired.low, paired.high) == (-1.0, -math.inf, math.inf)
    assert (paired.n, paired.relative, paired.tie) == (1, -0.5, True)
    assert paired.text("+.2f") == "-1.00 [one seed], tie"
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


STEP = 1 / 400  # of an error rate of 400 held-out images
T = {2: 12.7062047, 3: 4.3026527, 5: 2.7764451, 10: 2.2621572}  # t(0.975, n - 1)


@pytest.mark.parametrize("scale", [1.0, 1000.0])
@pytest.mark.parametrize("rounded", [float, lambda value: float(np.float32(value))])
@pytest.mark.parametrize(
    ("seeds", "steps", "is_tie"),
    # Half-widths in steps, t / sqrt(6 n): 3.67, 1.01, 0.51, 0.29.
    [(2, 3, True), (2, 4, False), (3, 1, True), (3, 2, False), (5, 1, False), (10, 0, True)],
)
def test_equal_differences_of_a_coarse_metric_have_its_resolution(
    seeds, steps, is_tie, rounded, scale
):
    base = {seed: (80 + seed) * STEP for seed in range(seeds)}
    ours = {seed: value + steps * STEP for seed, value in base.items()}
    ours, base = (
        {seed: scale * rounded(value) for seed, value in arm.items()} for arm in (ours, base)
    )
    paired = paired_difference(ours, base)
    assert paired.mean == pytest.approx(scale * steps * STEP, abs=1e-6 * scale)
    assert paired.deviation == pytest.approx(scale * STEP / math.sqrt(6), rel=1e-4)
    reach = T[seeds] * scale * STEP / math.sqrt(6 * seeds)
    assert paired.high - paired.mean == pytest.approx(reach, rel=1e-4)
    assert paired.mean - paired.low == pytest.approx(reach, rel=1e-4)
    assert paired.tie is is_tie


def test_the_resolution_covers_what_equal_differences_hide():
    """Arms that differ by 0.3 steps, and seeds that move a difference by a tenth of a step.

    Rounded, most triples of seeds show equal differences, of 0 or of one step. The interval of
    these still covers 0.3 in more than 95 % of them; one of width 0 would in none.
    """
    draw = np.random.default_rng(0)
    equal = covered = 0
    for _ in range(500):
        base = draw.normal(50, 3, 3)
        ours = base + draw.normal(0.3, 0.1, 3)
        found = [dict(enumerate(arm.round().tolist())) for arm in (ours, base)]
        if len({found[0][seed] - found[1][seed] for seed in range(3)}) == 1:
            paired = paired_difference(*found, 1.0)
            equal, covered = equal + 1, covered + (paired.low <= 0.3 <= paired.high)
    assert equal > 100
    assert covered > 0.95 * equal


def test_a_spread_that_is_seen_is_not_replaced():
    """0.5, 0.51: far less apart than the values, which move by 1 and more."""
    paired = paired_difference({0: 1.5, 1: 3.51}, {0: 1.0, 1: 3.0})
    assert paired.deviation == pytest.approx(0.01 / math.sqrt(2))
    assert not paired.tie


def test_all_results_tell_the_resolution():
    """0.9 and 0.8 under each seed: of these alone a step is 0.1; another arm moves by 0.01."""
    alone = compared(plain=(0.8, 0.8, 0.8), uniform=(0.9, 0.9, 0.9))
    plain, uniform = alone.results
    assert alone.against(uniform, plain).tie
    more = compared(plain=(0.8, 0.8, 0.8), uniform=(0.9, 0.9, 0.9), ours=(0.95, 0.96, 0.97))
    plain, uniform, _ = more.results
    found = more.against(uniform, plain)
    assert (found.tie, found.deviation) == (False, pytest.approx(0.01 / math.sqrt(6)))
    assert noise_of(more).least_difference == pytest.approx(T[3] * 0.01 / math.sqrt(6))


def test_values_that_never_differ_have_no_known_noise():
    alike = compared(plain=(0.5, 0.5, 0.5), uniform=(0.5, 0.5, 0.5))
    paired = alike.against(*reversed(alike.results))
    assert (paired.mean, paired.deviation, paired.tie) == (0.0, None, True)
    assert (paired.low, paired.high) == (-math.inf, math.inf)
    assert "inf" not in paired.text("+.2f")
    found = noise_of(alike)
    assert (found.replicates, found.seeds, found.least_difference) == (3, None, None)
    told = recommend(alike)
    assert (told.arm, told.as_dict()["interval"]) == (ARMS["plain"], None)


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
