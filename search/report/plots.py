"""A study's plots as charts, which ``render`` draws for reports and the dashboard.

FIDs are lower-is-better; K branches, k = 1..K.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from bdense.weights.spaces import PLAIN, UNIFORM, Uniform
from search.analysis.comparison import Comparison
from search.report.charts import OWN_COLOUR, Chart, Series
from search.study.results import MeasuredFID
from search.study.summary import Measured, Summary

PLAIN_COLOUR, UNIFORM_COLOUR = "#333333", "#e08214"
BEST_COLOUR = "#b2182b"
_RULES = (OWN_COLOUR, "#4d9221", "#762a83")
_ARMS = {PLAIN: PLAIN_COLOUR, UNIFORM: UNIFORM_COLOUR}
# A study's plots live in its rows of the database, in pieces; more could not be told apart anyhow.
MOST_POINTS, MOST_LINES = 400, 60
# From this ratio of the worst FID to the best one on, an axis is logarithmic.
_WIDE = 8.0


def study_charts(
    measured: Sequence[Measured], hours: Mapping[int, float], now: Summary
) -> list[Chart]:
    """A search's plots.

    Args:
        measured: Complete trials, at least one.
        hours: From the study's first start to the end of each, by number.
        now: The search, with its baselines.
    """
    trials = [
        each.as_dict() | {"label": each.label, "hours": hours.get(each.number, 0.0)}
        for each in measured
    ]
    baselines = {each.label: each.as_dict() for each in now.baselines.values()}
    distributions = now.spec.space.distributions()
    numbers = [name for name, each in distributions.items() if isinstance(each, Uniform)]
    word = next((name for name in distributions if name not in numbers), "")
    charts = [fid_over(trials, baselines, name, word) for name in numbers[:1]]
    return [*charts, weights_of(trials), fid_over_time(trials, baselines)]


def fid_over(
    trials: Sequence[Mapping[str, Any]],
    baselines: Mapping[str, Mapping[str, Any]],
    axis: str,
    word: str = "",
) -> Chart:
    """FID of each trial over one of its parameters, beside the baselines.

    Args:
        trials: At least one.
        baselines: By their labels.
        axis: The parameter.
        word: A parameter that is a word; each of them has points of its own.
    """
    shown, remark = thinned(trials, MOST_POINTS)
    series = _levels(baselines)
    words = sorted({str(trial.get(word, "")) for trial in shown})
    for each, colour in zip(words, _cycle(len(words)), strict=True):
        own = [trial for trial in shown if str(trial.get(word, "")) == each]
        series.append(_points(own, axis, "fid", f"B-DENSE, {each}" if each else "B-DENSE", colour))
    return Chart(
        key=f"fid-over-{axis}",
        title=f"FID over {axis}",
        x="slope a of log w_k = a k + b" if axis == "a" else axis,
        y=_fid_label(trials),
        series=[*series, _best(shown, axis, "fid")],
        log_y=_is_wide(trials),
        remark=remark,
    )


def weights_of(trials: Sequence[Mapping[str, Any]]) -> Chart:
    """w_k over k, a line for each trial, coloured by its FID; the best above the others."""
    shown, remark = thinned(trials, MOST_LINES)
    branches = len(shown[0]["weights"])
    k = list(range(1, branches + 1))
    series = [Series(name="uniform", kind="level", y=[1.0], colour=UNIFORM_COLOUR, dashed=True)]
    for trial in sorted(shown, key=lambda t: float(t["fid"]), reverse=True):
        series.append(
            Series(
                name=_label(trial),
                kind="line",
                x=k,
                y=trial["weights"],
                value=trial["fid"],
                labels=[_label(trial)] * branches,
                quiet=True,
            )
        )
    best = min(shown, key=lambda t: float(t["fid"]))
    name = f"best: trial {best['number']}"
    series.append(Series(name=name, kind="line", x=k, y=best["weights"], colour=BEST_COLOUR))
    last = {k[-1]: f"{k[-1]} (end point)"}
    return Chart(
        key="weights",
        title="Branch weights, by FID",
        x="branch k",
        y="weight w_k",
        series=series,
        log_y=True,
        ticks={float(i): str(i) for i in k} | last,
        scale="FID",
        remark=remark,
    )


def fid_over_time(
    trials: Sequence[Mapping[str, Any]], baselines: Mapping[str, Mapping[str, Any]]
) -> Chart:
    """FID of each trial over the hours since the study began, and the best until then."""
    unit, of_an_hour = ("hours", 1) if max(t["hours"] for t in trials) > 1 else ("minutes", 60)
    ordered = sorted(
        ({**trial, unit: trial["hours"] * of_an_hour} for trial in trials),
        key=lambda t: float(t[unit]),
    )
    times: list[float] = []
    best: list[float] = []
    for trial in ordered:
        if not best or trial["fid"] < best[-1]:
            times.append(trial[unit])
            best.append(trial["fid"])
    times.append(ordered[-1][unit])
    best.append(best[-1])
    shown, remark = thinned(ordered, MOST_POINTS)
    return Chart(
        key="fid-over-time",
        title="FID over time",
        x=f"{unit} since the first trial began",
        y=_fid_label(trials),
        series=[
            *_levels(baselines),
            _points(shown, unit, "fid", "B-DENSE", "#92c5de"),
            Series(name="best so far", kind="steps", x=times, y=best, colour=BEST_COLOUR),
        ],
        log_y=_is_wide(trials),
        remark=remark,
    )


def arms_of(comparison: Comparison, title: str, key: str) -> Chart:
    """FID of each arm under each seed, with its mean and standard error."""
    names = [result.arm.name for result in comparison.results]
    each = [
        (i, fid, f"{name}, seed {seed}: {fid:.3f}")
        for i, (name, result) in enumerate(zip(names, comparison.results, strict=True))
        for seed, fid in sorted(result.values.items())
    ]
    summaries = [result.summary() for result in comparison.results]
    return Chart(
        key=key,
        title=title,
        x="",
        y=f"FID, {comparison.results[0].conditions.images} images",
        series=[
            Series(
                name="one seed",
                kind="points",
                x=[float(i) for i, _, _ in each],
                y=[fid for _, fid, _ in each],
                labels=[label for *_, label in each],
                colour="#92c5de",
            ),
            Series(
                name="mean and s.e.",
                kind="points",
                x=[i + 0.15 for i in range(len(names))],
                y=[found.mean for found in summaries],
                spread=[found.standard_error or 0.0 for found in summaries],
                labels=names,
                colour=BEST_COLOUR,
            ),
        ],
        ticks={float(i): name for i, name in enumerate(names)},
    )


def fid_over_nfe(stages: Sequence[Comparison], teacher: MeasuredFID | None, title: str) -> Chart:
    """FID over the evaluations of each stage, a line for each arm, bars of one standard error."""
    first = stages[0]
    series = []
    for result in first.results:
        own = {
            match.conditions.nfe: match.summary()
            for stage in stages
            for match in stage.results
            if match.arm == result.arm
        }
        baseline = result.arm.baseline
        series.append(
            Series(
                name=result.arm.name if baseline else f"B-DENSE, {result.arm.name}",
                kind="line",
                x=list(own),
                y=[found.mean for found in own.values()],
                spread=[found.standard_error or 0.0 for found in own.values()],
                colour=_ARMS.get(baseline or "", OWN_COLOUR),
                dashed=baseline == UNIFORM,
            )
        )
    if teacher is not None:
        series.append(
            Series(
                name="teacher",
                kind="points",
                x=[teacher.nfe],
                y=[teacher.value],
                colour="#000000",
            )
        )
    places = [*([teacher.nfe] if teacher else []), *(s.results[0].conditions.nfe for s in stages)]
    return Chart(
        key="fid",
        title=title,
        x="network evaluations (NFE)",
        y=f"FID, {first.results[0].conditions.images} images",
        series=series,
        log_x=True,
        ticks={float(n): str(n) for n in places},
    )


def thinned(
    trials: Sequence[Mapping[str, Any]], most: int
) -> tuple[Sequence[Mapping[str, Any]], str]:
    """At most so many trials in their order: the best half, and of the others evenly many."""
    if len(trials) <= most:
        return trials, ""
    ranked = sorted(range(len(trials)), key=lambda i: float(trials[i]["fid"]))
    best, others = ranked[: most // 2], sorted(ranked[most // 2 :])
    left = most - len(best)
    chosen = {*best, *(others[i * len(others) // left] for i in range(left))}
    remark = f"Shown are the best {len(best)} of {len(trials)} trials and {left} of the others."
    return [trials[i] for i in sorted(chosen)], remark


def _points(
    trials: Sequence[Mapping[str, Any]],
    x: str,
    y: str,
    name: str,
    colour: str = OWN_COLOUR,
) -> Series:
    return Series(
        name=name,
        kind="points",
        x=[trial[x] for trial in trials],
        y=[trial[y] for trial in trials],
        colour=colour,
        labels=[_label(trial) for trial in trials],
    )


def _best(trials: Sequence[Mapping[str, Any]], x: str, y: str) -> Series:
    best = min(trials, key=lambda t: (float(t["fid"]), t["number"]))
    return Series(
        name=f"best: trial {best['number']}",
        kind="points",
        x=[best[x]],
        y=[best[y]],
        colour=BEST_COLOUR,
        labels=[_label(best)],
    )


def _levels(baselines: Mapping[str, Mapping[str, Any]]) -> list[Series]:
    return [
        Series(
            name=f"{label} {result['fid']:.3f}",
            kind="level",
            y=[result["fid"]],
            colour=PLAIN_COLOUR if label.startswith("plain") else UNIFORM_COLOUR,
            dashed=not label.startswith("plain"),
        )
        for label, result in baselines.items()
    ]


def _label(trial: Mapping[str, Any]) -> str:
    return f"trial {trial['number']}, FID {trial['fid']:.3f}, {trial['label']}"


def _fid_label(trials: Sequence[Mapping[str, Any]]) -> str:
    return f"FID, {trials[0]['images']} images"


def _is_wide(trials: Sequence[Mapping[str, Any]]) -> bool:
    fids = [float(trial["fid"]) for trial in trials]
    return min(fids) > 0 and max(fids) / min(fids) > _WIDE


def _cycle(count: int) -> list[str]:
    return [_RULES[i % len(_RULES)] for i in range(count)]
