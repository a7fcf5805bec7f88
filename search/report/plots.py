"""A study's own plots, which Optuna's dashboard does not draw."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from bdense.metrics.records import FID
from bdense.weights.space import PLAIN, UNIFORM, Choice
from search.analysis.comparison import ArmResult, Comparison
from search.analysis.observations import point_of
from search.analysis.surrogate import MIN_EVALUATIONS, Observation, posterior_means
from search.spec.command import DEFAULTS
from search.study.plot import Plot, plain
from search.study.results import Curve, Judged
from search.study.summary import Measured, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from search.report.overview import Overview

_BEST, _OTHERS = "#b2182b", ("#2166ac", "#4d9221", "#762a83")
_BASELINES = {
    PLAIN: ("#333333", "-"),
    UNIFORM: ("#e08214", "--"),
    DEFAULTS: ("#333333", "-"),
}
_CURVE_POINTS = 200
# From this ratio of the worst FID to the best one on, an axis is logarithmic.
_WIDE = 8.0


def metric_over(
    axis: str, trials: Sequence[Measured], now: Summary, one_shot: Curve | None
) -> Plot:
    """The metric of complete trials over a coordinate, with the surrogate's curve.

    The curve is drawn through points that differ in nothing else. A one-shot curve over that
    coordinate alone is drawn too.
    """
    placed = [
        (p, each) for each in trials if (p := point_of(now.spec, each.parameters)) is not None
    ]
    best, metric, space = now.best, now.spec.metric, now.spec.space
    assert best is not None
    drawn = space.distributions()
    chosen = [name for name, each in drawn.items() if isinstance(each, Choice)]
    groups = dict.fromkeys(tuple(e.parameters[name] for name in chosen) for _, e in placed)

    def draw(axes: "Axes") -> None:
        for name, baseline in now.baselines.items():
            colour, style = _BASELINES[name]
            label = plain(f"{baseline.label} {metric.text(baseline.value)}")
            axes.axhline(baseline.value, color=colour, linestyle=style, linewidth=1.2, label=label)
        for number, group in enumerate(groups):
            colour = _OTHERS[number % len(_OTHERS)]
            own = [
                (p, e) for p, e in placed if tuple(e.parameters[name] for name in chosen) == group
            ]
            name = "B-DENSE" if now.spec.workload.has_students else "trials"
            x, y = [point[axis] for point, _ in own], [each.value for _, each in own]
            axes.plot(x, y, "o", color=colour, label=plain(", ".join([name, *map(str, group)])))
            # Over the latents; a training under another seed differs by more.
            errors = [(e.result.fid.noise if e.result.fid else None) or 0.0 for _, e in own]
            axes.errorbar(x, y, errors, fmt="none", elinewidth=0.8, ecolor=colour, zorder=1)
            example = own[0][0]
            elsewhere = {tuple(v for name, v in p.items() if name != axis) for p, _ in own}
            if len(placed) >= MIN_EVALUATIONS and min(x) < max(x) and len(elsewhere) == 1:
                curve = np.linspace(min(x), max(x), _CURVE_POINTS)
                asked = [{**example, axis: float(at)} for at in curve]
                measured = [Observation(point=p, value=e.value, group="search") for p, e in placed]
                axes.plot(curve, posterior_means(measured, asked), color=colour, linewidth=1.0)
        if one_shot is not None and one_shot.axes == [axis]:
            points = sorted((each.coordinates[0], each.fid) for each in one_shot.points)
            label = plain(f"one student, told {axis}")
            axes.plot(*zip(*points, strict=True), "x:", color="#777777", label=label)
        place = next(point[axis] for point, each in placed if each.number == best.number)
        axes.plot(place, best.value, "o", color=_BEST, label=f"best: trial {best.number}")
        values = [each.value for each in trials]
        if min(values) > 0 and max(values) / min(values) > _WIDE:
            axes.set_yscale("log")
        axes.set_xlabel(axis)
        axes.set_ylabel(_of_images(best.result.figure))

    key = f"{metric.name.lower()}-over-{axis.replace(' ', '-')}"
    return Plot(key, f"{metric.name} over {axis}", draw)


def metric_of_arms(comparison: Comparison, key: str) -> Plot:
    """The metric of each arm under each seed, with its mean and standard error."""
    results = comparison.results

    def draw(axes: "Axes") -> None:
        for number, result in enumerate(results):
            found, seeds = result.mean(), list(result.values.values())
            each, mean = ("", "") if number else ("one seed", "mean and standard error")
            axes.plot([number] * len(seeds), seeds, "o", color="#92c5de", label=each)
            axes.errorbar(
                number + 0.15,
                found.mean,
                yerr=found.standard_error or 0.0,
                fmt="o",
                capsize=3,
                color=_BEST,
                label=mean,
            )
        axes.set_xticks(range(len(results)), [plain(result.arm.name) for result in results])
        axes.set_ylabel(_of_images(results[0].figure))

    of = f"of each arm{comparison.title and ', '}{comparison.title}"
    return Plot(key, f"{comparison.metric.name} {of}", draw)


def fid_over_nfe(stages: Sequence[Comparison], teacher: FID | None, title: str) -> Plot:
    """FID with its standard error over the NFE of each stage, a line for each arm."""

    def draw(axes: "Axes") -> None:
        for number, first in enumerate(stages[0].results):
            arm, own = first.arm, [r for s in stages for r in s.results if r.arm == first.arm]
            found = [result.mean() for result in own]
            other = (_OTHERS[number % len(_OTHERS)], "-")
            colour, style = _BASELINES.get(arm.baseline or "", other)
            axes.errorbar(
                [_nfe(result) for result in own],
                [each.mean for each in found],
                yerr=[each.standard_error or 0.0 for each in found],
                marker="o",
                markersize=4,
                capsize=3,
                color=colour,
                linestyle=style,
                label=plain(arm.name if arm.baseline else f"B-DENSE, {arm.name}"),
            )
        places = [_nfe(stage.results[0]) for stage in stages]
        if teacher is not None:
            places.append(teacher.nfe)
            axes.plot(teacher.nfe, teacher.value, "o", color="black", label="teacher")
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, [str(place) for place in places])
        axes.set_xlabel("network evaluations (NFE)")
        axes.set_ylabel(_of_images(stages[0].results[0].figure))

    return Plot("fid", title, draw)


def study_plots(overview: "Overview") -> list[Plot]:
    """A study's own plots; none before anything was measured."""
    now, comparisons = overview.now, overview.comparisons
    if overview.is_empty:
        return []
    if now is not None:
        axes = now.spec.space.axes
        if now.spec.workload.has_students:
            axes = axes[:1]  # of branch weights only the first
        return [metric_over(axis, overview.trials, now, overview.curve) for axis in axes]
    stages = [each for each in comparisons if each.variant == comparisons[0].variant]
    if len({each.stage for each in stages}) > 1:
        return [fid_over_nfe(stages, overview.teacher, overview.study.name)]
    return [metric_of_arms(each, f"arms-{index}") for index, each in enumerate(comparisons)]


def _nfe(result: ArmResult) -> int:
    assert result.figure.nfe is not None  # a FID
    return result.figure.nfe


def _of_images(figure: Judged | None) -> str:
    """A figure's name on an axis, with its number of images, which a FID depends on."""
    assert figure is not None  # of complete rows
    of = "" if figure.images is None else f", {figure.images} images"
    return plain(figure.metric) + of
