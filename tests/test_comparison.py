"""Arms side by side, against differences worked out by hand, whatever the method."""

import math

import pytest

from bdense.weights.space import PLAIN, UNIFORM
from search.analysis.comparison import (
    compare,
    comparison_rows,
    comparisons_of,
    difference_text,
    teacher_of,
)
from search.study.arms import ROW_SPACE, Arm, baseline_arms
from search.study.study import Study
from search.study.wording import align
from tests.measured import TEACHER_FID, fid, finish
from tests.studies import of_kind, spec

OURS = Arm(name="a 1.000 (trial 3)", params={"a": 1.0, "b": -2.0}, trial=3)
T = 4.302653  # t(0.975, 2), of three pairs
# Against plain -2, -3, -4: mean -3, deviation 1. Against uniform -1, 0, 1: a tie.
FIDS = {
    "plain": {1: 10.0, 2: 12.0, 3: 14.0},
    "uniform": {1: 9.0, 2: 9.0, 3: 9.0},
    None: {1: 8.0, 2: 9.0, 3: 10.0},
}


def value(arm, row) -> float:
    return FIDS[arm.baseline][row.seed]


def planned(url, method="sfd", *, arms=(0, 1, 2), seeds=(1, 2, 3), variants=({},)) -> Study:
    of = spec(of_kind(method, "arms"))
    study = Study.create(url, of)
    every = [*baseline_arms(of), OURS]
    study.plan([every[index] for index in arms], seeds, variants)
    return study


def measured(url, method="sfd") -> Study:
    study = planned(url, method)
    finish(study, value)
    return study


@pytest.mark.parametrize(
    ("method", "stage", "lower"),
    [("sfd", None, 0.0), ("progressive", None, 0.0), ("progressive", "00004", 1.0)],
)
def test_the_difference_of_three_seeds_by_hand(url, method, stage, lower):
    """8 -> 4 -> 2 steps: every FID is 1 lower at 4 steps than at 2, and no difference moves."""
    comparison = compare(measured(url, method), stage=stage)
    plain, uniform, ours = comparison.results
    assert tuple(map(comparison.baseline, (PLAIN, UNIFORM))) == (plain, uniform)
    assert ours.values == {seed: fid - lower for seed, fid in FIDS[None].items()}
    assert ours.rows == {1: 2, 2: 5, 3: 8}
    assert ours.figure.nfe == (4 if stage else 2)
    mean = ours.mean()
    assert (mean.mean, mean.n) == (9.0 - lower, 3)
    assert mean.standard_error == pytest.approx(1 / math.sqrt(3))
    pair = comparison.against(ours, plain)
    assert (pair.mean, pair.n, pair.tie) == (-3.0, 3, False)
    reach = T / math.sqrt(3)
    assert (pair.low, pair.high) == pytest.approx((-3 - reach, -3 + reach), rel=1e-6)
    assert pair.relative == pytest.approx(-3 / (12 - lower))
    against_uniform = comparison.against(ours, uniform)
    assert (against_uniform.mean, against_uniform.tie) == (0.0, True)
    assert comparison.against(plain, plain) is None
    assert comparison.against(ours, None) is None


def test_the_table(url):
    comparison = compare(measured(url))
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
    assert "256 images at NFE 2, features of digits-classifier" in comparison.conditions_line()


def test_a_method_of_several_stages_has_a_line_for_each_and_its_teacher(url):
    study = measured(url, "progressive")
    at_four, at_two = comparisons_of(study)
    assert (at_four.title, at_two.title) == ("4 steps", "2 steps")
    rows = [
        dict(zip(("arm", "at"), row, strict=False)) for row in comparison_rows([at_four, at_two])
    ]
    assert [row["at"] for row in rows[1:]] == ["4 steps"] * 3 + ["2 steps"] * 3
    teacher = teacher_of(study)
    assert (teacher.value, teacher.nfe) == (TEACHER_FID, 8)
    first = comparison_rows([at_four, at_two], teacher)[1]
    assert first[:2] + first[5:6] == ("teacher", "NFE 8", "3.000")
    assert {len(row) for row in comparison_rows([at_four, at_two], teacher)} == {9}


def test_a_seed_without_its_pair_is_left_out_of_the_difference(url):
    """The second seed's plain student failed; the third seed is still to come."""
    study = planned(url)
    finish(study, value, most=3)
    study.given.fail(study.given.claim(ROW_SPACE, None), "diverged", "the loss is not finite", {})
    finish(study, value, most=2)
    comparison = compare(study)
    plain, _, ours = comparison.results
    assert (plain.values, ours.values) == ({1: 10.0}, {1: 8.0, 2: 9.0})
    pair = comparison.against(ours, plain)
    assert (pair.n, pair.mean, pair.relative) == (1, -2.0, -0.2)
    assert difference_text(pair, study.spec.metric) == "-20.0 %, -2.00 [one seed], tie"
    header, first, *_ = comparison.table()
    assert "seed 3" not in header
    assert first.split()[:6] == ["plain", "SFD", "10.000", "-", "10.000", "-"]


def test_settings_of_the_method_are_kept_apart(url):
    changes = ({}, {"nfe": 3}, {"kimg": 5.0})
    study = planned(url, arms=(0,), variants=changes)
    finish(study, lambda arm, row: value(arm, row) + row.variant)
    for index, (changed, each) in enumerate(zip(changes, comparisons_of(study), strict=True)):
        assert each.variant == changed
        assert each.baseline(PLAIN).values == {
            seed: v + index for seed, v in FIDS["plain"].items()
        }
        assert each.baseline(PLAIN).figure.nfe == changed.get("nfe", 2)
    titles = [each.title for each in comparisons_of(study)]
    assert titles == ["as the study", "nfe 3", "kimg 5.0"]


def test_fids_of_other_conditions_are_shown_and_not_compared(url):
    """One row was measured on twice the images."""
    study = planned(url, arms=(0, 2), seeds=(1,))
    finish(study, value, most=1)
    other = fid(8.0, training=1, evaluation=1) | {"images": 512}
    study.given.complete(study.given.claim(ROW_SPACE, None), 8.0, {"fid": other})
    comparison = compare(study)
    plain, ours = comparison.results
    assert comparison.differing == ["images"]
    assert comparison.against(ours, plain) is None
    assert "%" not in "".join(comparison.table())
    assert "different conditions (images)" in comparison.conditions_line()
