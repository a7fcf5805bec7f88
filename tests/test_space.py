"""What is sampled, by whom, and what it means to the engine."""

import math

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from search.worker.engine import branches_and_weights, excess_weight

from bdense.weights.spaces import RULES
from search.spec.space import baseline_space, make_sampler, search_space
from tests.studies import LEARNED, NORMALISED, spec


def suggestions(study_spec, offset: int, count: int = 3) -> list[dict[str, float]]:
    """What a sampler proposes first, in a study that nobody has worked on."""
    study = optuna.create_study(sampler=make_sampler(study_spec, offset))
    return [study.ask(search_space(study_spec)).params for _ in range(count)]


# ---- the space ----


def test_both_parameters_have_their_bounds():
    assert search_space(spec()) == {
        "a": FloatDistribution(-0.5, 3.0),
        "b": FloatDistribution(-6.0, 0.0),
    }


def test_normalised_weights_are_one_number():
    assert search_space(spec(weights=NORMALISED)) == {"a": FloatDistribution(-0.5, 3.0)}


def test_learned_weights_are_a_rule_and_its_strength():
    learned = {**LEARNED, "rules": ["gradient-norm"], "strength": {"low": 0.5, "high": 2.0}}
    assert search_space(spec(weights=learned)) == {
        "rule": CategoricalDistribution(("gradient-norm",)),
        "strength": FloatDistribution(0.5, 2.0),
    }


@pytest.mark.parametrize("name", ["tpe", "gp", "random"])
def test_every_sampler_can_choose_a_rule(name):
    study_spec = spec(weights="learned", sampler={"name": name, "startup_trials": 2})
    study = optuna.create_study(sampler=make_sampler(study_spec, 0))
    for value in (3.0, 1.0, 2.0):
        trial = study.ask(search_space(study_spec))
        assert trial.params["rule"] in RULES
        assert -1.0 <= trial.params["strength"] <= 1.5
        study.tell(trial, value)


def test_equal_bounds_fix_a_parameter():
    fixed = spec(weights__b={"low": -4.0, "high": -4.0})
    assert {params["b"] for params in suggestions(fixed, 0)} == {-4.0}


def test_baselines_are_plain_sfd_and_uniform_weights():
    assert baseline_space() == {"method": CategoricalDistribution(("sfd", "uniform"))}


# ---- samplers ----


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("tpe", optuna.samplers.TPESampler),
        ("gp", optuna.samplers.GPSampler),
        ("random", optuna.samplers.RandomSampler),
    ],
)
def test_samplers_by_name(name, kind):
    assert type(make_sampler(spec(sampler={"name": name}), 0)) is kind


@pytest.mark.parametrize("name", ["tpe", "random"])
def test_a_suggestion_repeats_with_its_offset_and_differs_with_another(name):
    study = spec(sampler={"name": name})
    first = suggestions(study, 0)
    assert suggestions(study, 0) == first
    drawn = [suggestions(study, offset, 1)[0]["a"] for offset in range(8)]
    assert len(set(drawn)) == 8
    assert all(-0.5 <= a <= 3.0 for a in drawn)


def test_the_offset_is_added_to_the_studys_seed():
    shifted = spec(seeds={"sampler": 5}, sampler={"name": "random"})
    plain = spec(sampler={"name": "random"})
    assert suggestions(shifted, 2) == suggestions(plain, 7)
    largest = spec(seeds={"sampler": 2**31 - 1}, sampler={"name": "random"})
    assert suggestions(largest, 1) == suggestions(plain, 0)


# ---- weights ----


def test_log_linear_parameters_are_the_weights_own():
    num_branches, weights = branches_and_weights(spec(), {"a": math.log(2), "b": -1.0})
    assert num_branches == 4
    assert (weights.a, weights.b) == (math.log(2), -1.0)
    expected = [2 / math.e, 4 / math.e, 8 / math.e, 16 / math.e]
    assert weights(4).tolist() == pytest.approx(expected)


def test_normalised_weights_sum_to_k():
    study = spec(weights=NORMALISED, student__substeps=3)
    num_branches, weights = branches_and_weights(study, {"a": math.log(2)})
    assert num_branches == 3
    assert weights(3).tolist() == pytest.approx([3 / 7, 6 / 7, 12 / 7])
    assert weights.b == pytest.approx(math.log(3 / 14))


def test_learned_weights_start_from_the_trials_parameters_and_the_studys_memory():
    study = spec(weights={**LEARNED, "memory": 7}, student__substeps=3)
    num_branches, weights = branches_and_weights(study, {"rule": RULES[1], "strength": -0.5})
    assert (num_branches, weights.num_branches) == (3, 3)
    assert weights.describe() == {"rule": RULES[1], "strength": -0.5, "memory": 7}


def test_baselines_are_one_branch_or_all_alike():
    for study in (spec(), spec(weights=NORMALISED), spec(weights="learned")):
        one, plain = branches_and_weights(study, {"method": "sfd"})
        assert (one, plain(one).tolist()) == (1, [1.0])
        four, uniform = branches_and_weights(study, {"method": "uniform"})
        assert (four, uniform(four).tolist()) == (4, [1.0] * 4)


def test_the_excess_is_measured_from_the_largest_weight():
    """a < 0 makes w_1 the largest, a > 0 w_K."""
    bounded = spec(weights__largest=2.0)
    assert excess_weight(bounded, {"a": math.log(2), "b": -math.log(2)}) == pytest.approx(8 - 2)
    assert excess_weight(bounded, {"a": -1.0, "b": 1.0}) == pytest.approx(1 - 2)
    assert excess_weight(bounded, {"a": 0.0, "b": math.log(2)}) == pytest.approx(0, abs=1e-12)
    normalised = spec(weights={**NORMALISED, "largest": 3.0})
    # w_4 = 4 * 27 / (1 + 3 + 9 + 27).
    assert excess_weight(normalised, {"a": math.log(3)}) == pytest.approx(2.7 - 3)


def test_without_a_bound_nothing_is_in_excess():
    assert excess_weight(spec(), {"a": 100.0, "b": 100.0}) == 0.0
    learned = {"rule": RULES[0], "strength": 1.0}
    assert excess_weight(spec(weights="learned"), learned) == 0.0
