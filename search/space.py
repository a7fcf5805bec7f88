"""What a study samples, its baselines, and who proposes."""

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from search.model_spec import FloatRange
from search.spec import LearnedSpace, LogLinearSpace, StudySpec

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
