"""``enqueue``: a point planned by hand, checked against the study's weight space."""

from collections.abc import Mapping
from typing import Any

from bdense.weights.spaces import require_point
from search.storage.ledger import MENDABLE
from search.study.study import Study


def enqueue(study: Study, given: Mapping[str, Any]) -> list[str]:
    """Plan a point before any that the sampler suggests; returns lines for people.

    Raises:
        InputError: The study has no such parameters, or they lie outside its bounds.
    """
    spec, trials = study.spec, study.search
    params = require_point(spec.space, given, spec.resolved.num_branches)
    text = ", ".join(f"{k} {v:g}" if isinstance(v, float) else str(v) for k, v in params.items())
    if not trials.enqueue(params, again=MENDABLE):
        return [f"{text} is a trial of study {study.name} already; nothing is planned"]
    counts = trials.counts()
    left = trials.budget - counts.ended - counts.running
    lines = [f"planned in study {study.name}: {text}, before any other point"]
    if counts.waiting > left:
        needed = counts.ended + counts.running + counts.waiting
        lines.append(
            f"the budget of {trials.budget} trials is too small for the {counts.waiting} that are "
            f"planned: bdense-search launch STUDY.yaml --trials {needed}"
        )
    elif not counts.running:
        lines.append("it runs next; if no launcher is running: bdense-search launch STUDY.yaml")
    return lines
