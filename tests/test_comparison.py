"""Arms side by side, against differences worked out by hand."""

import math

import pytest
from search.analysis.promotion import PLAIN_PD

from search.analysis.comparison import compare, difference_text
from search.study.arms import PLAIN, SPACES, UNIFORM, Arm, Planned, PlannedRow
from search.study.wording import align
from tests.measured import copy_storage, empty_storage, fid, finish, normalised, open_once
from tests.studies import promotion

OURS = Arm(name="a 1.000 (trial 3)", params={"a": 1.0, "b": -2.0}, trial=3)
T = 4.302653  # t(0.975, 2), of three pairs
# Against plain -2, -3, -4: mean -3, deviation 1. Against uniform -1, 0, 1: a tie.
FIDS = {
    "plain SFD": {1: 10.0, 2: 12.0, 3: 14.0},
    "uniform weights": {1: 9.0, 2: 9.0, 3: 9.0},
    OURS.name: {1: 8.0, 2: 9.0, 3: 10.0},
}


@pytest.fixture
def url(tmp_path, tmp_path_factory, monkeypatch) -> str:
    open_once(monkeypatch)
    return copy_storage(empty_storage(tmp_path_factory.getbasetemp()), tmp_path / "study.db")


def planned_of(url, *, arms=(PLAIN, UNIFORM, OURS), seeds=(1, 2, 3), budgets=((2.56, 2),)):
    planned = Planned.create(url, "digits.confirm", "retrain", normalised(), facts={})
    planned.plan(
        list(arms),
        [
            PlannedRow(arm=index, seed=seed, kimg=kimg, nfe=nfe)
            for kimg, nfe in budgets
            for seed in seeds
            for index in range(len(arms))
        ],
    )
    return planned


@pytest.fixture
def measured(url):
    planned = planned_of(url)
    finish(planned, lambda arm, row: FIDS[arm.name][row.seed])
    return planned


def test_the_difference_of_three_seeds_by_hand(measured):
    comparison = compare(measured)
    plain, uniform, ours = comparison.results
    assert (comparison.plain, comparison.uniform) == (plain, uniform)
    assert ours.fids == FIDS[OURS.name]
    assert ours.rows == {1: 2, 2: 5, 3: 8}
    summary = ours.summary()
    assert (summary.mean, summary.n) == (9.0, 3)
    assert summary.standard_error == pytest.approx(1 / math.sqrt(3))
    pair = comparison.against(ours, plain)
    assert (pair.mean, pair.n, pair.tie) == (-3.0, 3, False)
    assert (pair.low, pair.high) == pytest.approx(
        (-3 - T / math.sqrt(3), -3 + T / math.sqrt(3)), rel=1e-6
    )
    assert pair.relative == pytest.approx(-3 / 12)
    against_uniform = comparison.against(ours, uniform)
    assert (against_uniform.mean, against_uniform.tie) == (0.0, True)
    assert comparison.against(plain, plain) is None
    assert comparison.against(ours, None) is None


def test_the_table(measured):
    comparison = compare(measured)
    cells = [
        (*("", "seed 1", "seed 2", "seed 3", "mean", "s.e."), "vs plain", "vs uniform"),
        (
            *("plain SFD", "10.000", "12.000", "14.000", "12.000", "1.155"),
            *("-", "+33.3 %, +3.00 [-1.97, +7.97], tie"),
        ),
        (
            *("uniform weights", "9.000", "9.000", "9.000", "9.000", "0.000"),
            *("-25.0 %, -3.00 [-7.97, +1.97], tie", "-"),
        ),
        (
            *("a 1.000 (trial 3)", "8.000", "9.000", "10.000", "9.000", "0.577"),
            *("-25.0 %, -3.00 [-5.48, -0.52]", "+0.0 %, +0.00 [-2.48, +2.48], tie"),
        ),
    ]
    assert comparison.table() == align(cells)
    assert comparison.conditions_line() == (
        "FID: 256 images at NFE 2, features of digits-classifier, against digits. Differences are "
        "paired by seed, in [] their 95 % t interval; a tie where it spans 0."
    )


def test_a_seed_without_its_pair_is_left_out_of_the_difference(url):
    """The second seed's plain student failed; the third seed is still to come."""
    planned = planned_of(url)
    finish(planned, lambda arm, row: FIDS[arm.name][row.seed], most=3)
    claim = planned.ledger.claim(SPACES["retrain"], None)
    planned.ledger.fail(claim, "diverged", "the loss is not finite", {})
    finish(planned, lambda arm, row: FIDS[arm.name][row.seed], most=2)
    comparison = compare(planned)
    plain, _, ours = comparison.results
    assert (plain.fids, ours.fids) == ({1: 10.0}, {1: 8.0, 2: 9.0})
    pair = comparison.against(ours, plain)
    assert (pair.n, pair.mean, pair.relative) == (1, -2.0, -0.2)
    assert difference_text(pair) == "-20.0 %, -2.00 [one seed], tie"
    header, first, *_ = comparison.table()
    assert "seed 3" not in header
    assert first.split()[:6] == ["plain", "SFD", "10.000", "-", "10.000", "-"]


def test_budgets_and_evaluations_are_kept_apart(url):
    planned = planned_of(url, arms=(PLAIN,), budgets=((2.56, 2), (2.56, 3), (5.0, 2)))
    finish(planned, lambda arm, row: FIDS[arm.name][row.seed] * row.nfe + row.kimg)
    of_two, of_three, longer = (
        compare(planned, kimg=kimg, nfe=nfe) for kimg, nfe in ((2.56, 2), (2.56, 3), (5.0, 2))
    )
    assert of_two.plain.fids == {1: 22.56, 2: 26.56, 3: 30.56}
    assert of_three.plain.fids == {1: 32.56, 2: 38.56, 3: 44.56}
    assert longer.plain.fids == {1: 25.0, 2: 29.0, 3: 33.0}
    assert of_three.plain.conditions["nfe"] == 3
    assert "at NFE 3," in of_three.conditions_line()
    assert compare(planned, kimg=1.0).results == ()


def test_fids_of_other_conditions_are_shown_and_not_compared(url):
    """One row was measured on twice the images."""
    planned = planned_of(url, arms=(PLAIN, OURS), seeds=(1,))
    finish(planned, lambda arm, row: FIDS[arm.name][row.seed], most=1)
    claim = planned.ledger.claim(SPACES["retrain"], None)
    other = fid(8.0, training=1, evaluation=1) | {"images": 512}
    planned.ledger.complete(claim, 8.0, {"fid": other})
    comparison = compare(planned)
    plain, ours = comparison.results
    assert comparison.differing == ["images"]
    assert comparison.against(ours, plain) is None
    assert "%" not in "".join(comparison.table())
    assert comparison.conditions_line() == (
        "These FIDs were measured under different conditions (images): no comparison."
    )


def test_a_chain_is_compared_at_any_of_its_steps(url):
    """8 -> 4 -> 2: the FID is 1 lower at 4 steps than at 2."""
    planned = Planned.create(url, "promote-digits", "progressive", promotion(), facts={})
    arms = [PLAIN_PD, UNIFORM, OURS]
    planned.plan(arms, [PlannedRow(arm=arm, seed=seed) for seed in (0, 1) for arm in range(3)])
    finish(planned, lambda arm, row: 10.0 - 2 * row.arm + row.seed)
    assert compare(planned).plain.arm == PLAIN_PD
    for steps, expected in ((2, {0: 10.0, 1: 11.0}), (4, {0: 9.0, 1: 10.0})):
        comparison = compare(planned, steps=steps)
        assert comparison.plain.fids == expected
        assert comparison.plain.conditions["nfe"] == steps
        pair = comparison.against(comparison.results[2], comparison.plain)
        assert (pair.mean, pair.low, pair.high) == (-4.0, -4.0, -4.0)
    assert compare(planned, steps=8).results == ()  # the teacher's own
