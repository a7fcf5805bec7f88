"""What a search samples, who proposes it and who ends a trial: Optuna's own classes, by name."""

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

from bdense.weights.learned import SCALE_RULES
from search.errors import SpecError
from search.spec.space import make_pruner, make_sampler, search_space
from tests.studies import LEARNED, METHODS, NORMALISED, of_kind, spec

# What those need that cannot be made without.
ARGUMENTS = {
    "GridSampler": {"search_space": {"rule": list(SCALE_RULES), "strength": [0.0, 1.0]}},
    "PartialFixedSampler": {
        "fixed_params": {"strength": 1.0},
        "base_sampler": {"name": "RandomSampler"},
    },
    "PatientPruner": {"wrapped_pruner": {"name": "MedianPruner"}, "patience": 1},
}


def member(name: str, **arguments) -> dict:
    return {"name": name, **ARGUMENTS.get(name, {}), **arguments}


def suggestions(study_spec, offset: int, count: int = 3) -> list[dict[str, float]]:
    """What a sampler proposes first, in an empty study."""
    study = optuna.create_study(sampler=make_sampler(study_spec, offset))
    return [study.ask(search_space(study_spec)).params for _ in range(count)]


@pytest.mark.parametrize("method", METHODS)
def test_the_space_is_the_weights_whatever_the_method(method):
    tree = of_kind(method, "search")
    a, b = FloatDistribution(-0.5, 3.0), FloatDistribution(-6.0, 0.0)
    assert search_space(spec(tree)) == {"a": a}
    both = {"name": "log-linear", "b": {"low": -6.0, "high": 0.0}}
    assert search_space(spec(tree, weights=both)) == {"a": a, "b": b}
    learned = {**LEARNED, "rules": ["gradient-norm"], "strength": {"low": 0.5, "high": 2.0}}
    assert search_space(spec(tree, weights=learned)) == {
        "rule": CategoricalDistribution(("gradient-norm",)),
        "strength": FloatDistribution(0.5, 2.0),
    }


@pytest.mark.parametrize("name", ["TPESampler", "GPSampler", "GridSampler", "PartialFixedSampler"])
def test_any_sampler_of_optunas_proposes_rules_and_strengths(name):
    study_spec = spec(weights=LEARNED, plan__sampler=member(name))
    sampler = make_sampler(study_spec, 0)
    assert type(sampler) is getattr(optuna.samplers, name)
    study = optuna.create_study(sampler=sampler)
    for value in (3.0, 1.0, 2.0):
        trial = study.ask(search_space(study_spec))
        assert trial.params["rule"] in SCALE_RULES
        assert -1.0 <= trial.params["strength"] <= 1.5
        study.tell(trial, value)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("GridSampler", {"search_space": {"a": [-0.4, 0.0, 0.5, 1.0, 2.0, 2.5, 2.8, 3.0]}}),
        ("QMCSampler", {"scramble": True}),
    ],
)
def test_workers_share_one_sequence(name, arguments):
    """No point of a grid comes twice, and each eighth of the range has one of Sobol's points."""
    own = spec(weights=NORMALISED, plan__sampler=member(name, **arguments))
    study, drawn = optuna.create_study(), []
    for offset in range(8 if name == "GridSampler" else 9):
        study.sampler = make_sampler(own, offset)
        drawn.append(study.ask(search_space(own)).params["a"])
    if name == "GridSampler":
        assert sorted(drawn) == arguments["search_space"]["a"]
    else:
        # Optuna's first trial, which tells it the space, is drawn at random.
        assert sorted(int((a + 0.5) / 3.5 * 8) for a in drawn[1:]) == list(range(8))


@pytest.mark.parametrize("name", ["TPESampler", "RandomSampler", "PartialFixedSampler"])
def test_a_suggestion_repeats_with_its_offset_and_differs_with_another(name):
    fixed = {"fixed_params": {"b": -1.0}} if name == "PartialFixedSampler" else {}
    study = spec(plan__sampler=member(name, **fixed))
    assert suggestions(study, 0) == suggestions(study, 0)
    drawn = [suggestions(study, offset, 1)[0]["a"] for offset in range(8)]
    assert len(set(drawn)) == 8
    assert all(-0.5 <= a <= 3.0 for a in drawn)


def test_the_offset_is_added_to_the_studys_seed():
    def seeded(sampler: int):
        return spec(seeds={"sampler": sampler}, plan__sampler=member("RandomSampler"))

    assert suggestions(seeded(5), 2) == suggestions(seeded(0), 7)
    assert suggestions(seeded(2**31 - 1), 1) == suggestions(seeded(0), 0)


@pytest.mark.parametrize("name", ["MedianPruner", "PatientPruner", "WilcoxonPruner"])
def test_any_pruner_of_optunas_ends_trials(name):
    study = spec(plan__pruner=member(name), plan__at=[0.25, 0.5])
    assert type(make_pruner(study)) is getattr(optuna.pruners, name)


def test_without_one_nothing_is_pruned():
    assert type(make_pruner(spec())) is optuna.pruners.NopPruner


def test_a_sampler_that_needs_a_missing_package_names_it():
    try:
        import cmaes  # noqa: F401
    except ImportError:
        with pytest.raises(SpecError, match=r"^study.yaml: plan\.sampler: CmaEsSampler: .*cmaes"):
            spec(weights=NORMALISED, plan__sampler=member("CmaEsSampler"))
    else:
        assert spec(plan__sampler=member("CmaEsSampler")).search.sampler.name == "CmaEsSampler"
