"""Paired t intervals over training seeds, against numbers worked out by hand and scipy's."""

import math

import pytest
from scipy import stats

from bdense.errors import InputError
from search.analysis.paired import Mean, mean_of, paired_difference

OURS = {0: 2.0, 1: 2.5, 2: 3.0}
BASE = {0: 3.0, 1: 3.1, 2: 3.9, 7: 9.0}


def test_mean_and_standard_error():
    """1, 2, 3, 4, 5: variance 10 / 4, over n = 5 values 1 / 2; one value has no error."""
    error = pytest.approx(math.sqrt(0.5))
    assert mean_of([1, 2, 3, 4, 5]) == Mean(mean=3.0, standard_error=error, n=5)
    assert mean_of([2.5]) == Mean(mean=2.5, standard_error=None, n=1)
    assert (mean_of([2.5]).error_text(), mean_of([2.0, 3.0]).error_text()) == ("-", "0.500")


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
    assert paired.text() == "-0.83 [-1.35, -0.32]"


def test_the_interval_is_scipys():
    ours = {seed: 2.7 + 0.31 * math.sin(5 * seed) for seed in range(9)}
    base = {seed: 2.8 + 0.17 * math.cos(3 * seed) for seed in range(9)}
    interval = stats.ttest_rel(list(ours.values()), list(base.values())).confidence_interval()
    paired = paired_difference(ours, base)
    assert (paired.low, paired.high) == pytest.approx((interval.low, interval.high), rel=1e-12)


def test_what_moves_both_drops_out():
    shifted = [{seed: fid + 10 * seed for seed, fid in arm.items()} for arm in (OURS, BASE)]
    paired, before = paired_difference(*shifted), paired_difference(OURS, BASE)
    assert (paired.mean, paired.low) == pytest.approx((before.mean, before.low))


def test_ties():
    paired = paired_difference({0: 2.0, 1: 3.0}, {0: 2.5, 1: 2.9})
    assert (paired.tie, paired.text()) == (True, "-0.20 [-4.01, +3.61], tie")
    paired = paired_difference(BASE, BASE)
    assert (paired.low, paired.high, paired.tie) == (0, 0, True)
    # One common seed, however far apart.
    paired = paired_difference({0: 1.0, 5: 4.0}, {0: 2.0, 6: 4.0})
    assert (paired.mean, paired.low, paired.high) == (-1.0, -math.inf, math.inf)
    assert (paired.n, paired.relative, paired.tie) == (1, -0.5, True)
    assert paired.text() == "-1.00 [one seed], tie"
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
