"""Learned branch weights: the rules in closed form, their state, what they refuse."""

import math

import pytest
import torch

from bdense.diffusion.branches import export_branch
from bdense.errors import InputError
from bdense.methods.sfd import SFDConfig
from bdense.training.loop import IterationReport
from bdense.weights.weighting import SMALLEST_SCALE, FixedWeights, LearnedWeights, Observed
from tests.contracts.weights import WeightingContract
from tests.small import same_weights, sfd, small_teacher, small_trajectories

LOSSES = torch.tensor([1.0, 2.0, 4.0, 8.0])


class TestFixedWeights(WeightingContract):
    options = ({"last": 3.0},)

    def make(self, last=4.0):
        return FixedWeights(torch.tensor([0.5, 1.0, 2.0, last]))


class TestFixedWeightsByInterval(WeightingContract):
    options = ({"last": 3.0},)

    def make(self, last=4.0):
        return FixedWeights(torch.tensor([[0.5, 1.0, 2.0, last], [1.0, 1.0, 1.0, 1.0]]))


class TestLearnedByLosses(WeightingContract):
    rule = "uncertainty"
    options = ({"strength": 0.5}, {"memory": 3})

    def make(self, **options):
        return LearnedWeights(4, rule=self.rule, **options)


class TestLearnedByGradients(TestLearnedByLosses):
    rule = "gradient-norm"


class TestLearnedByAlignment(TestLearnedByLosses):
    rule = "alignment"


class TestAnnealed(TestLearnedByLosses):
    rule = "anneal"


def seen(weighting: LearnedWeights, *signals: torch.Tensor, progress: float = 0.0) -> list[float]:
    """Weights after updates whose losses, or cosines, are the signals."""
    for each in signals:
        weighting.observe(Observed(losses=each, progress=progress, cosines=each))
    return weighting.weights().tolist()


def test_uncertainty_weighs_by_the_inverse_of_the_mean_loss():
    """w_k = K / l_k / sum_j 1 / l_j; K = 4 and l = 1, 2, 4, 8 make sum 1 / l = 15 / 8."""
    expected = [32 / 15, 16 / 15, 8 / 15, 4 / 15]
    assert seen(LearnedWeights(4, rule="uncertainty"), LOSSES) == pytest.approx(expected)


def test_strength_is_an_exponent():
    uniform = LearnedWeights(4, rule="uncertainty", strength=0.0)
    assert seen(uniform, LOSSES) == pytest.approx([1.0] * 4)
    reverse = LearnedWeights(4, rule="uncertainty", strength=-1.0)
    assert seen(reverse, LOSSES) == pytest.approx([4 / 15, 8 / 15, 16 / 15, 32 / 15])


def test_the_scale_is_a_running_mean_that_forgets():
    """Two updates l, 3 l at memory 2: (l / 2 + 3 l) / (1 / 2 + 1) = 7 l / 3 for every branch but
    the last, which stays at l."""
    second = LOSSES * torch.tensor([3.0, 3.0, 3.0, 1.0])
    scale = LOSSES * torch.tensor([7 / 3, 7 / 3, 7 / 3, 1.0])
    inverse = 1 / scale
    expected = (4 * inverse / inverse.sum()).tolist()
    found = seen(LearnedWeights(4, rule="uncertainty", memory=2), LOSSES, second)
    assert found == pytest.approx(expected)


def test_a_branch_at_its_target_does_not_take_all():
    """Its scale is the rounding of float32: it counts as a thousandth of the largest."""
    weights = seen(LearnedWeights(2, rule="uncertainty"), torch.tensor([1e-12, 1.0]))
    assert weights[0] / weights[1] == pytest.approx(1 / SMALLEST_SCALE)
    nothing = seen(LearnedWeights(2, rule="uncertainty"), torch.zeros(2))
    assert nothing == pytest.approx([1.0, 1.0])


def test_gradient_norms_are_made_equal():
    """The norms that reach the head's input, measured here by hand, weighted, are all the same."""
    teacher = small_teacher()
    trajectories = small_trajectories(teacher, count=1)
    reports: list[IterationReport] = []
    observed = []

    class Spy(LearnedWeights):
        def observe(self, seen):
            observed.append(seen.gradient_norms.double())
            super().observe(seen)

    rule = Spy(4, rule="gradient-norm", memory=1)
    sfd(trajectories, rule, images=4, lr=1e-4, dropout=False, on_iteration=reports.append)
    for norms, weights in zip(observed, reports[0].weights, strict=True):
        weighted = norms * weights
        assert weighted.tolist() == pytest.approx([float(weighted[0])] * 4, rel=1e-5)
    # The first update sees the teacher's own head in every branch: the norm of branch k is then
    # proportional to its share of the interval's step, for which L1 has one sign a pixel.
    levels = trajectories.grid.interval(1)
    share = (1 - levels[1:] / levels[0]).tolist()
    assert (observed[0] / observed[0][-1]).tolist() == pytest.approx(
        [s / share[-1] for s in share], rel=0.2
    )


COSINES = torch.tensor([-0.5, 0.25, 0.5, 1.0])


@pytest.mark.parametrize(
    ("strength", "expected"),
    [
        (1.0, [0.0, 4 / 7, 8 / 7, 16 / 7]),
        (2.0, [0.0, 4 / 21, 16 / 21, 64 / 21]),
        (0.0, [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_a_branch_counts_by_its_agreement_with_the_last(strength, expected):
    """w_k = 4 c_k^strength / sum_j c_j^strength with c = 0, 1/4, 1/2, 1: a conflict counts 0."""
    weighting = LearnedWeights(4, rule="alignment", strength=strength)
    assert seen(weighting, COSINES) == pytest.approx(expected)


def test_branches_that_all_conflict_leave_plain_distillation():
    assert seen(LearnedWeights(3, rule="alignment"), torch.tensor([-1.0, -0.1, 1.0])) == [0, 0, 3]


def test_a_conflict_counts_in_the_mean_before_it_is_cut_off():
    """Two updates at memory 2: (-1 / 2 + 1) / (1 / 2 + 1) = 1 / 3."""
    both = torch.tensor([-1.0, 1.0]), torch.tensor([1.0, 1.0])
    found = seen(LearnedWeights(2, rule="alignment", memory=2), *both)
    assert found == pytest.approx([0.5, 1.5])


@pytest.mark.parametrize(
    ("progress", "strength", "expected"),
    [(0.0, 1.0, 1.0), (0.25, 1.0, 0.75), (0.25, 2.0, 0.5625), (0.9, 1.0, 0.1), (0.9, 0.0, 1.0)],
)
def test_annealed_weights_fall_to_nothing(progress, strength, expected):
    weights = seen(LearnedWeights(4, rule="anneal", strength=strength), LOSSES, progress=progress)
    assert [w / weights[-1] for w in weights] == pytest.approx([expected] * 3 + [1.0])
    assert sum(weights) == pytest.approx(4.0)


def test_the_loop_tells_progress_and_the_cosines_of_the_gradients():
    """Branch K agrees with itself; an iteration makes two updates."""
    teacher = small_teacher()
    trajectories = small_trajectories(teacher, count=2)
    told: list[Observed] = []

    class Spy(LearnedWeights):
        def observe(self, seen):
            told.append(seen)
            super().observe(seen)

    sfd(trajectories, Spy(4, rule="alignment"), images=8, lr=1e-4, dropout=False)
    iterations = len(told) // 2
    assert [each.progress for each in told] == [i // 2 / iterations for i in range(len(told))]
    for each in told:
        assert float(each.cosines[-1]) == pytest.approx(1.0)
        assert bool((each.cosines.abs() <= 1 + 1e-6).all())
    # At first each branch is the teacher's own, on a path that hardly bends: they agree.
    assert bool((told[0].cosines > 0).all())
    assert len({tuple(each.cosines.tolist()) for each in told}) == len(told)


@pytest.mark.parametrize("rule", ["uncertainty", "alignment", "anneal"])
def test_strength_zero_is_uniform_weights_bit_for_bit(rule):
    teacher = small_teacher()
    trajectories = small_trajectories(teacher, count=2)
    given = LearnedWeights(4, rule=rule, strength=0.0)
    learned, uniform = (sfd(trajectories, weights, images=8) for weights in (given, torch.ones(4)))
    assert same_weights(export_branch(learned), export_branch(uniform))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_branches": 0, "rule": "uncertainty"}, r"num_branches \(K\) must be at least 1"),
        ({"num_branches": 4, "rule": "hope"}, "rule must be one of uncertainty, .*, got hope"),
        (
            {"num_branches": 4, "rule": "uncertainty", "strength": float("nan")},
            r"strength must lie in -10\.\.10, got nan",
        ),
        (
            {"num_branches": 4, "rule": "anneal", "strength": -0.5},
            r"strength -0\.5 would reverse the rule anneal",
        ),
        (
            {"num_branches": 4, "rule": "uncertainty", "memory": 0},
            "memory must be at least 1 update, got 0",
        ),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(InputError, match=message):
        LearnedWeights(**options)


def test_each_update_of_an_iteration_uses_its_own_weights():
    """Two intervals: the report tells them, and equal rows are the same student bit for bit."""
    trajectories = small_trajectories(small_teacher(), count=2)
    rows = torch.tensor([[0.5, 1.0, 2.0, 4.0], [1.0, 1.0, 1.0, 1.0]])
    reports: list[IterationReport] = []
    differing = sfd(trajectories, FixedWeights(rows), images=8, on_iteration=reports.append)
    assert [each.weights.tolist() for each in reports] == [rows.tolist()] * 2
    same, plain = (sfd(trajectories, each, images=8) for each in (rows[1].expand(2, 4), rows[1]))
    assert same_weights(same, plain)
    assert not same_weights(differing, plain)


def test_weights_are_rescaled_in_each_interval():
    config = SFDConfig(rescale_weights=True)
    rows = torch.tensor([[1.0, 3.0], [2.0, 2.0]], dtype=torch.float64)
    assert config.scaled(rows).tolist() == [[0.25, 0.75], [0.5, 0.5]]


@pytest.mark.parametrize("updates", [1, 3])
def test_weights_of_another_number_of_updates_are_refused(updates):
    """The student has two intervals."""
    trajectories = small_trajectories(small_teacher(), count=2)
    with pytest.raises(InputError, match=f"branch weights for {updates} updates an iteration"):
        sfd(trajectories, FixedWeights(torch.ones(updates, 4)), images=8)


@pytest.mark.parametrize(
    "bad",
    [
        *([1.0, math.inf], [math.nan, 1.0], [-1.0, 2.0], [0.0, 0.0], []),
        *([[1.0, 1.0], [0.0, 0.0]], [[[1.0]]]),
    ],
)
def test_weights_that_say_nothing_are_refused(bad):
    with pytest.raises(InputError, match="branch weights must be finite numbers >= 0"):
        FixedWeights(torch.tensor(bad))
