"""The section of a study that ends trials early."""

import re

import optuna
import pytest
import yaml
from search.analysis.retraining import variant
from search.spec.study_file import as_yaml, parse_spec

from search.errors import SpecError
from search.spec.space import make_pruner
from search.study.arms import PlannedRow
from tests.studies import changed, spec

AT = [0.25, 0.5]


def message(**keys) -> str:
    with pytest.raises(SpecError) as error:
        parse_spec(changed(**keys), source="study.yaml")
    return str(error.value)


def test_it_is_off_by_default():
    study = spec()
    assert (study.pruning.pruner, study.pruning.at, study.looks) == ("none", (), {})
    assert isinstance(make_pruner(study), optuna.pruners.NopPruner)


def test_it_does_not_change_what_a_trial_measures():
    """So that they may be changed later, and studies from before keep their fingerprint."""
    ended = spec(pruning={"pruner": "median", "at": AT, "images": 64})
    assert ended.fingerprint() == spec().fingerprint() == "80eeb77169b35e48"


@pytest.mark.parametrize(
    ("given", "resolved"),
    [
        ({"at": AT}, ("none", None, None, None, None)),
        ({"pruner": "median", "at": AT}, ("median", 5, None, None, None)),
        (
            {"pruner": "median", "at": AT, "startup_trials": 2},
            ("median", 2, None, None, None),
        ),
        ({"pruner": "percentile", "at": AT}, ("percentile", 5, 25.0, None, None)),
        ({"pruner": "successive-halving", "at": AT}, ("successive-halving", 5, None, 2, None)),
        ({"pruner": "hyperband", "at": AT, "factor": 3}, ("hyperband", 5, None, 3, None)),
        (
            {"pruner": "patient-median", "at": [0.25, 0.5, 0.75]},
            ("patient-median", 5, None, None, 1),
        ),
    ],
)
def test_a_pruner_has_its_own_options_and_their_defaults(given, resolved):
    study = spec(pruning=given)
    found = study.pruning
    options = (found.startup_trials, found.percentile, found.factor, found.patience)
    assert (found.pruner, *options) == resolved
    # What is stored, and printed, is read as the same.
    again = parse_spec(yaml.safe_load(as_yaml(study)), source="study.yaml")
    assert again.pruning == found


def test_looks_are_iterations_of_the_budget():
    """2.56 kimg at batch 64 are 40 iterations."""
    assert spec(pruning={"at": [0.1, 0.25, 0.5]}).looks == {4: 0.1, 10: 0.25, 20: 0.5}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (
            {"pruning": {"pruner": "median"}},
            r"pruning: pruner median compares FIDs on the way and at names none; .* \[0.25, 0.5\]",
        ),
        (
            {"pruning": {"pruner": "best", "at": AT}},
            "pruning.pruner: .* 'median'.* got 'best'",
        ),
        (
            {"pruning": {"pruner": "median", "at": AT, "factor": 3}},
            "pruning: pruner median has no factor; drop it or use successive-halving or hyperband",
        ),
        (
            {"pruning": {"pruner": "hyperband", "at": AT, "percentile": 20}},
            "pruning: pruner hyperband has no percentile; drop it or use percentile",
        ),
        (
            {"pruning": {"at": AT, "startup_trials": 3}},
            "pruning: pruner none has no startup_trials; drop it or use a pruner",
        ),
        ({"pruning": {"at": [0.5, 0.25]}}, r"pruning: at \[0.5, 0.25\] must ascend, .*; sort it"),
        ({"pruning": {"at": [0.5, 0.5]}}, r"pruning: at \[0.5, 0.5\] must ascend, each .* once"),
        ({"pruning": {"at": [1.0]}}, "pruning.at.0: .* less than 1, got 1.0"),
        ({"pruning": {"at": [0.0]}}, "pruning.at.0: .* greater than 0, got 0.0"),
        (
            {"pruning": {"at": [0.01]}},
            r"pruning.at \[0.01\] of 40 iterations are looks after \[0\] of them",
        ),
        ({"pruning": {"at": [0.99]}}, r"looks after \[40\] of them, which must be .* on the way"),
        (
            {"pruning": {"at": [0.5, 0.501]}},
            r"looks after \[20, 20\] .*; choose fractions further",
        ),
        (
            {"pruning": {"at": AT, "images": 512}},
            "pruning.images 512 is above evaluation.images 256; lower it, or leave it out",
        ),
        ({"pruning": {"at": AT, "images": 1}}, "pruning.images: .* equal to 2, got 1"),
        (
            {"pruning": {"images": 64}},
            r"pruning: images 64 are drawn at no fraction of the budget; give at: \[...\] or drop",
        ),
        (
            {"pruning": {"pruner": "patient-median", "at": AT}},
            "pruning: patience 1 decides at look 3 first and at has 2; give more fractions or",
        ),
        (
            {"pruning": {"pruner": "successive-halving", "at": AT, "factor": 1}},
            "pruning.factor: .* equal to 2, got 1",
        ),
        ({"pruning": {"at": AT, "bound": 1}}, "pruning.bound: unknown key; check the spelling"),
    ],
)
def test_what_is_wrong_is_named(keys, expected):
    assert re.search(expected, message(**keys))


def test_students_trained_again_are_not_looked_at():
    """At a smaller budget there may be no room for the looks."""
    study = spec(pruning={"pruner": "median", "at": AT})
    assert variant(study, PlannedRow(arm=0, seed=3, kimg=0.064)).looks == {}
