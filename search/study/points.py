"""Plan a point that a user asks for in a search, checked against the study's weight space."""

import contextlib
from collections.abc import Mapping
from typing import Any

from bdense.weights.spaces import Uniform, require_point
from search.storage.ledger import MENDABLE
from search.study.study import Study


def enqueue(study: Study, given: Mapping[str, Any]) -> list[str]:
    """Plan a point before any suggested one.

    Args:
        study: A search.
        given: A value for each parameter of its weight space; a number may be a text.

    Returns:
        Lines for the user: what happens to the point.

    Raises:
        InputError: The space has no such parameters, or they lie outside its bounds.
    """
    spec, trials = study.spec, study.search
    distributions = spec.space.distributions()
    read = {
        name: _number(value) if isinstance(distributions.get(name), Uniform) else value
        for name, value in given.items()
    }
    params = require_point(spec.space, read, spec.resolved.num_branches)
    text = ", ".join(f"{k} {v:g}" if isinstance(v, float) else str(v) for k, v in params.items())
    if not trials.enqueue(params, again=MENDABLE):
        return [f"{text} is a trial of study {study.name} already; nothing is planned"]
    counts = trials.counts()
    left = trials.budget - counts.ended - counts.running
    lines = [f"planned in study {study.name}: {text}, before any other point"]
    if counts.waiting > left:
        needed = counts.ended + counts.running + counts.waiting
        lines.append(
            f"the budget of {trials.budget} trials does not suffice for the {counts.waiting} that "
            f"are planned: bdense-search launch STUDY.yaml --trials {needed}"
        )
    elif not counts.running:
        lines.append(
            "it is the next to run; if no launcher is at work: bdense-search launch STUDY.yaml"
        )
    return lines


def _number(value: Any) -> Any:  # noqa: ANN401  as the user gave it
    """A text as the number that it names; anything else is left to ``require_point``."""
    with contextlib.suppress(TypeError, ValueError):
        return float(value)
    return value
