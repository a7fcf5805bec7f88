"""What a study samples, its baselines, who proposes, and who ends a trial on its way."""

import warnings

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning

from search.spec.model_spec import FloatRange
from search.spec.study_spec import LearnedSpace, LogLinearSpace, StudySpec

# Plain SFD, and B-DENSE with every branch counting alike.
BASELINES = ("sfd", "uniform")


def search_space(spec: StudySpec) -> dict[str, BaseDistribution]:
    """The distributions of a trial's parameters."""
    weights = spec.weights
    if isinstance(weights, LearnedSpace):
        return {
            "rule": CategoricalDistribution(weights.rules),
            "strength": _float(weights.strength),
        }
    if isinstance(weights, LogLinearSpace):
        return {"a": _float(weights.a), "b": _float(weights.b)}
    return {"a": _float(weights.a)}


def baseline_space() -> dict[str, BaseDistribution]:
    """The one parameter of a baseline's row."""
    return {"method": CategoricalDistribution(BASELINES)}


def _float(bounds: FloatRange) -> FloatDistribution:
    return FloatDistribution(bounds.low, bounds.high)


def make_sampler(spec: StudySpec, offset: int) -> optuna.samplers.BaseSampler:
    """The study's sampler with a seed of its own for the ``offset``-th suggestion.

    Derived from the number of trials so far: reproducible, and never equal in two processes.
    """
    seed = (spec.seeds.sampler + offset) % 2**31
    startup = spec.sampler.startup_trials
    if spec.sampler.name == "gp":
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup)
    if spec.sampler.name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)


def make_pruner(spec: StudySpec) -> optuna.pruners.BasePruner:
    """The study's pruner.

    Those of successive halving count looks: their resource at look i = 0, 1, .. is factor^i.
    """
    given, pruners = spec.pruning, optuna.pruners
    startup = given.startup_trials or 0
    if given.pruner == "percentile":
        assert given.percentile is not None  # filled in
        return pruners.PercentilePruner(given.percentile, n_startup_trials=startup)
    if given.pruner == "successive-halving":
        assert given.factor is not None
        return pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=given.factor)
    if given.pruner == "hyperband":
        assert given.factor is not None
        # The logarithm of factor^n + 1 is n and a bit, however it is rounded: n + 1 brackets.
        most = given.factor ** len(given.at) + 1
        return pruners.HyperbandPruner(1, most, reduction_factor=given.factor)
    median = pruners.MedianPruner(n_startup_trials=startup)
    if given.pruner == "median":
        return median
    if given.pruner == "patient-median":
        assert given.patience is not None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return pruners.PatientPruner(median, patience=given.patience)
    return pruners.NopPruner()
