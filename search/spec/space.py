"""What a study samples, with which sampler and pruner: Optuna's own classes, by name."""

import inspect
import logging
import math
import warnings
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning

from bdense.errors import InputError, did_you_mean
from bdense.weights.space import Choice
from search.errors import SpecError, under
from search.log import optuna_says
from search.spec.sections import Member
from search.spec.study import StudySpec

# Each trial takes the next element of one sequence, whose order or scrambling the seed decides.
_SEQUENCES = ("GridSampler", "QMCSampler")


def search_space(spec: StudySpec) -> dict[str, BaseDistribution]:
    """The distributions of a trial's parameters."""
    return {
        name: CategoricalDistribution(each.options)
        if isinstance(each, Choice)
        else FloatDistribution(each.low, each.high, log=each.log)
        for name, each in spec.space.distributions().items()
    }


def make_sampler(spec: StudySpec, offset: int) -> optuna.samplers.BaseSampler:
    """The study's sampler, seeded for the ``offset``-th suggestion.

    The offset is the number of trials so far: reproducible, and never equal in two processes.
    """
    made: optuna.samplers.BaseSampler = _made(
        optuna.samplers, "plan.sampler", spec.search.sampler, seed=sampler_seed(spec, offset)
    )
    return made


def sampler_seed(spec: StudySpec, offset: int) -> int:
    """Seed of the ``offset``-th suggestion; grid and quasi-random samplers have one for all."""
    is_sequence = spec.search.sampler.name in _SEQUENCES
    return (spec.seeds.sampler + (0 if is_sequence else offset)) % 2**31


def _require_room(spec: StudySpec) -> None:
    """Refuse more trials than a grid has points, as the others would all repeat one."""
    sampler, trials = spec.search.sampler, spec.search.trials
    grid = sampler.options.get("search_space")
    if sampler.name == "GridSampler" and isinstance(grid, dict):
        points = math.prod(len(values) for values in grid.values())
        if trials > points:
            raise SpecError(
                f"plan.trials: {trials} are more than the {points} points of "
                "plan.sampler.search_space; lower it, or widen that"
            )


def require_sampler(spec: StudySpec) -> None:
    """Let the sampler propose two points of the space, the second after a result of the first.

    Raises:
        SpecError: There is no such sampler, it refuses its arguments or the space, or it needs a
            package that is not installed.
    """
    try:
        _require_room(spec)
        with optuna_says(logging.ERROR):
            study = optuna.create_study(sampler=make_sampler(spec, 0))
            for value in (1.0, 2.0):
                study.tell(study.ask(search_space(spec)), value)
    except SpecError:
        raise
    except Exception as error:  # Optuna's samplers raise what they like
        raise SpecError(f"plan.sampler: {spec.search.sampler.name}: {error}") from error


def make_pruner(spec: StudySpec) -> optuna.pruners.BasePruner:
    """The study's pruner; NopPruner where the plan names none."""
    if spec.search.pruner is None:
        return optuna.pruners.NopPruner()
    made: optuna.pruners.BasePruner = _made(optuna.pruners, "plan.pruner", spec.search.pruner)
    return made


def _made(module: ModuleType, key: str, member: Member, **own: Any) -> Any:  # noqa: ANN401
    """A class of Optuna's by its name, with its arguments as the file gives them.

    Args:
        module: Of the class.
        key: Of the study file, for errors.
        member: Name and arguments; a mapping with a ``name`` is a class of the same module.
        **own: Arguments of ours, such as ``seed``, for each class that takes them.
    """
    kinds = {name: getattr(module, name) for name in module.__all__}
    known = [
        n for n, kind in kinds.items() if inspect.isclass(kind) and not inspect.isabstract(kind)
    ]
    if member.name not in known:
        hint = did_you_mean(member.name, known)
        raise SpecError(
            f"{key}.name: {module.__name__} has no class {member.name}; choose from "
            f"{', '.join(known)}{hint}"
        )
    kind = kinds[member.name]
    options = {
        name: _made(module, f"{key}.{name}", Member.of(value, name), **own)
        if isinstance(value, dict) and "name" in value
        else value
        for name, value in member.options.items()
    }
    signature = inspect.signature(kind)
    own = {name: value for name, value in own.items() if name in signature.parameters}
    if clash := own.keys() & options.keys():
        raise SpecError(f"{key}: {', '.join(clash)} is set by seeds.sampler; leave it out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        try:
            return kind(**options, **own)
        except (TypeError, ValueError, ImportError) as error:
            arguments = ", ".join(signature.parameters)
            raise SpecError(
                f"{key}: {member.name}: {error}; its arguments are {arguments}"
            ) from error


def check_plan(spec: StudySpec, check_arm: Callable[[Mapping[str, Any]], None]) -> None:
    """Check the plan of a resolved study; ``check_arm`` refuses an arm's parameters.

    Raises:
        InputError: Names the setting.
    """
    variant = spec.workload.variant
    if not spec.is_search:
        for index, arm in enumerate(spec.given.arms):
            if not isinstance(arm, str) and "winner_of" not in arm:
                with under(f"plan.arms.{index}", TypeError):
                    check_arm(arm)
        for index, changes in enumerate(spec.given.variants):
            variant(changes, f"plan.variants.{index}")
        return
    if spec.space.is_one_point and spec.search.trials > 1:
        raise InputError(
            f"plan.trials: {spec.search.trials} trials would all be the same, as weights has one "
            "point; run 1, or widen weights"
        )
    if (change := spec.search.changes_when_short(spec)) is not None:
        variant(change, "plan.short")
    require_sampler(spec)
    make_pruner(spec)
    confirmed = variant(spec.confirm.method, "confirm.method")
    if confirmed.space.distributions().keys() != spec.space.distributions().keys():
        raise InputError(
            f"confirm.method {spec.confirm.method} changes the branches or intervals, which the "
            f"parameters of {spec.space.name} weights depend on; leave them as they are"
        )
