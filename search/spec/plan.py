"""The checks of a plan that all methods share."""

from collections.abc import Callable, Mapping
from typing import Any

from bdense.errors import InputError
from search.errors import under
from search.spec.space import make_pruner, require_sampler
from search.spec.study import StudySpec


def check_plan(
    spec: StudySpec,
    variant: Callable[[StudySpec, dict[str, Any], str], StudySpec],
    check_arm: Callable[[Mapping[str, Any]], None],
) -> None:
    """Check the plan of a resolved study.

    Args:
        spec: The study.
        variant: The study with some of the method's settings replaced, under a key for errors.
        check_arm: Refuses an arm's parameters.

    Raises:
        InputError: Names the setting.
    """
    if not spec.is_search:
        for index, arm in enumerate(spec.given.arms):
            if not isinstance(arm, str) and "winner_of" not in arm:
                with under(f"plan.arms.{index}", TypeError):
                    check_arm(arm)
        for index, changes in enumerate(spec.given.variants):
            variant(spec, changes, f"plan.variants.{index}")
        return
    if spec.space.is_one_point and spec.search.trials > 1:
        raise InputError(
            f"plan.trials: {spec.search.trials} trials would all be the same, as weights has one "
            "point; run 1, or widen weights"
        )
    require_sampler(spec)
    make_pruner(spec)
    confirmed = variant(spec, spec.confirm.method, "confirm.method")
    if confirmed.space.distributions().keys() != spec.space.distributions().keys():
        raise InputError(
            f"confirm.method {spec.confirm.method} changes the branches or intervals, which the "
            f"parameters of {spec.space.name} weights depend on; leave them as they are"
        )
