"""A point of a search that somebody wants tried: checked against the bounds of the study."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bdense.errors import InputError
from bdense.weights.spaces import LogLinearWeights, normalised_weights
from search.spec.model_spec import FloatRange
from search.spec.study_spec import LearnedSpace, LogLinearSpace, StudySpec
from search.storage.ledger import MENDABLE
from search.study.study import Study

_WIDEN = "widen the bounds in the study's file and launch it, then plan it again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """As asked for; what was not given is None."""

    a: float | None = None
    b: float | None = None
    rule: str | None = None
    strength: float | None = None

    def given(self) -> dict[str, Any]:
        """What was given."""
        values = {"a": self.a, "b": self.b, "rule": self.rule, "strength": self.strength}
        return {name: value for name, value in values.items() if value is not None}


def enqueue(study: Study, spec: StudySpec, point: Point) -> list[str]:
    """Plan a point before any other that is suggested; lines that say what will become of it.

    Raises:
        InputError: The study has no such parameters, or they lie outside its bounds.
    """
    params = checked(spec, point)
    text = ", ".join(f"{k} {v:g}" if isinstance(v, float) else str(v) for k, v in params.items())
    if not study.trials.enqueue(params, again=MENDABLE):
        return [f"{text} is a trial of study {study.name} already; nothing is planned"]
    counts = study.trials.counts()
    left = study.trials.budget - counts.ended - counts.running
    lines = [f"planned in study {study.name}: {text}, before any other point"]
    if counts.waiting > left:
        needed = counts.ended + counts.running + counts.waiting
        lines.append(
            f"the budget of {study.trials.budget} trials does not suffice for the "
            f"{counts.waiting} that are planned: bdense-search launch STUDY.yaml "
            f"--trials {needed}"
        )
    elif not counts.running:
        lines.append(
            "it is the next to run; if no launcher is at work: bdense-search launch STUDY.yaml"
        )
    return lines


def checked(spec: StudySpec, point: Point) -> dict[str, Any]:
    """The parameters of a trial at that point.

    Raises:
        InputError: They are not those of the space, or lie outside its bounds.
    """
    given, weights = point.given(), spec.weights
    if isinstance(weights, LearnedSpace):
        _require_names(spec, given, ("rule", "strength"))
        if given["rule"] not in weights.rules:
            raise InputError(
                f"--rule {given['rule']}: study {spec.name} has {', '.join(weights.rules)}"
            )
        return {
            "rule": given["rule"],
            "strength": _within("strength", given["strength"], weights.strength),
        }
    if isinstance(weights, LogLinearSpace):
        _require_names(spec, given, ("a", "b"))
        bounds = {"a": weights.a, "b": weights.b}
    else:
        _require_names(spec, given, ("a",))
        bounds = {"a": weights.a}
    params = {name: _within(name, given[name], bounds[name]) for name in bounds}
    largest = largest_weight(params, spec.student.substeps)
    if weights.largest is not None and largest > weights.largest:
        raise InputError(
            f"{_text(given)}: the largest branch weight would be {largest:.4g}, and "
            f"weights.largest is {weights.largest:g}; raise it in the study's file and launch it, "
            "then plan the point again"
        )
    return params


def largest_weight(params: Mapping[str, float], substeps: int) -> float:
    """max_k w_k of log w_k = a k + b, k = 1..K; without b the sum of w_k is K."""
    a = params["a"]
    if "b" in params:
        return max(LogLinearWeights(a=a, b=params["b"]).values(substeps))
    return max(normalised_weights(a, substeps).values(substeps))


def _require_names(spec: StudySpec, given: Mapping[str, Any], names: tuple[str, ...]) -> None:
    space = spec.weights.parameterisation
    asked = " and ".join(f"--{name}" for name in names)
    for name in given:
        if name not in names:
            why = ": b follows from a there" if name == "b" and space == "normalised" else ""
            raise InputError(
                f"--{name} {given[name]}: the weights of study {spec.name} are {space}{why}; "
                f"give {asked} alone"
            )
    for name in names:
        if name not in given:
            raise InputError(
                f"--{name} is missing: the weights of study {spec.name} are {space}; give {asked}"
            )


def _within(name: str, value: float, bounds: FloatRange) -> float:
    if not bounds.low <= value <= bounds.high:  # nor is NaN
        raise InputError(
            f"--{name} {value:g} lies outside weights.{name} of the study, {bounds.low:g} to "
            f"{bounds.high:g}; {_WIDEN}"
        )
    return float(value)


def _text(given: Mapping[str, Any]) -> str:
    return " ".join(f"--{name} {value:g}" for name, value in given.items())
