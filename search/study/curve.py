"""A search's one-shot training as the study sees it: its curve, and the trials that follow."""

from typing import Any

from bdense.weights.space import BASELINE, UNIFORM
from search.study.arms import one_shot_arm
from search.study.results import Curve, CurvePoint, TrialResult
from search.study.study import Study

_MOST_POINTS = 16  # of a table for people


def curve_of(study: Study) -> Curve | None:
    """The curve that the plan of a search asks for; None without one, or before it is complete."""
    if (arm := one_shot_arm(study.spec)) is None:
        return None
    for measured, _, trial in study.complete_arms():
        if measured == arm:
            return TrialResult.of(trial.value, trial.user_attrs).curve
    return None


def one_shot_json(study: Study) -> dict[str, Any]:
    """``one_shot``, the curve or None, as ``status --json`` and ``best --json`` print it.

    Nothing for a study whose plan has none.
    """
    if study.spec.plan.one_shot is None:
        return {}
    curve = curve_of(study)
    return {"one_shot": None if curve is None else curve.as_dict()}


def one_shot_pending(study: Study) -> bool:
    """Whether a one-shot training has still to end before the trials of a search start."""
    arms, own = study.arms, one_shot_arm(study.spec)
    return any(not ended and arms[row.arm] == own for row, ended in study.rows())


def enqueue_best(study: Study) -> list[CurvePoint]:
    """Plan the best points of the curve as trials, each once however often this is called.

    Uniform weights are left out, which a search measures anyway, and points beyond the bound of
    the space.

    Returns:
        The points; none where there is no curve.
    """
    curve, spec = curve_of(study), study.spec
    if curve is None or spec.search.one_shot is None:
        return []
    space, branches = spec.space, spec.resolved.num_branches
    uniform = space.coordinates({BASELINE: UNIFORM})
    usable = [
        point
        for point in curve.ranked
        if tuple(point.coordinates) != uniform and space.excess(point.params, branches) <= 0
    ]
    best = usable[: spec.search.one_shot.best]
    for point in best:
        study.search.enqueue(point.params)
    return best


def curve_rows(curve: Curve) -> list[tuple[str, ...]]:
    """A header and a line for each point as cells: along one axis, else the lowest FIDs first."""
    points = curve.ranked[:_MOST_POINTS]
    if len(curve.axes) == 1:
        points = sorted(curve.points, key=lambda each: each.coordinates)
    rows = [(*curve.axes, "FID", "above the lowest", "s.e.")]
    for point in points:
        above, error = point.fid - curve.ranked[0].fid, point.error
        figures = f"{point.fid:.3f}", f"{above:+.3f}", "-" if error is None else f"{error:.3f}"
        rows.append((*(f"{x:.3f}" for x in point.coordinates), *figures))
    return rows


def curve_line(curve: Curve) -> str:
    """Where the curve is lowest, and under which conditions."""
    best, told = curve.ranked[0], curve.conditions
    at = ", ".join(f"{axis} {x:.3f}" for axis, x in zip(curve.axes, best.coordinates, strict=True))
    return (
        f"one-shot curve: FID {best.fid:.3f} at {at}, the lowest of {len(curve.points)} points; "
        f"of one student that is told them, by {told['images']} images at NFE {told['nfe']} from "
        "latents that no trial is judged on"
    )
