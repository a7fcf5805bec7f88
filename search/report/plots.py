"""A study's plots as charts, which ``showing/drawing.py`` draws for reports and the dashboard.

FIDs are lower-is-better; K branches, k = 1..K.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from bdense.weights.spaces import normalised_weights
from search.analysis.comparison import Comparison
from search.report.charts import OWN_COLOUR, Chart, Series
from search.study.summary import TITLES, in_short

PLAIN_COLOUR, UNIFORM_COLOUR = "#333333", "#e08214"
BEST_COLOUR = "#b2182b"
_BASELINES = {"sfd": PLAIN_COLOUR, "uniform": UNIFORM_COLOUR}
_RULES = (OWN_COLOUR, "#4d9221", "#762a83")
_ARMS = {"plain PD": PLAIN_COLOUR, "plain SFD": PLAIN_COLOUR, "uniform weights": UNIFORM_COLOUR}
# A study's plots live in its rows of the database, in pieces; more could not be told apart anyhow.
MOST_POINTS, MOST_LINES = 400, 60
# From this ratio of the worst FID to the best one on, an axis is logarithmic.
_WIDE = 8.0


def study_charts(
    trials: Sequence[Mapping[str, Any]],
    baselines: Mapping[str, Mapping[str, Any]],
    importance: Mapping[str, float],
) -> list[Chart]:
    """A search's plots.

    Args:
        trials: Complete, at least one: ``number``, ``fid``, ``images``, ``weights``, ``hours``
            from the study's first start to the trial's end; ``a`` and ``b``, or ``rule`` and
            ``strength``.
        baselines: By method, each with its ``fid``.
        importance: Parameter -> share; empty where it says nothing.
    """
    learned = "rule" in trials[0]
    charts = [fid_over(trials, baselines, "strength" if learned else "a")]
    if not learned:
        charts.append(fid_over_both(trials))
    charts.append(weights_of(trials))
    if importance:
        charts.append(importance_of(importance))
    charts.append(fid_over_time(trials, baselines))
    return charts


def fid_over(
    trials: Sequence[Mapping[str, Any]], baselines: Mapping[str, Mapping[str, Any]], axis: str
) -> Chart:
    """FID of each trial over one of its parameters, beside the baselines."""
    shown, remark = thinned(trials, MOST_POINTS)
    series = _levels(baselines)
    rules = sorted({trial.get("rule", "") for trial in shown})
    for rule, colour in zip(rules, _cycle(len(rules)), strict=True):
        own = [trial for trial in shown if trial.get("rule", "") == rule]
        series.append(_points(own, axis, "fid", f"B-DENSE, {rule}" if rule else "B-DENSE", colour))
    return Chart(
        key="fid-over-a" if axis == "a" else f"fid-over-{axis}",
        title=f"FID over {axis}",
        x="slope a of log w_k = a k + b" if axis == "a" else axis,
        y=_fid_label(trials),
        series=[*series, _best(shown, axis, "fid")],
        log_y=_is_wide(trials),
        remark=remark,
    )


def fid_over_both(trials: Sequence[Mapping[str, Any]]) -> Chart:
    """FID over (a, b) by colour; where b was not searched, the line that it follows from a."""
    shown, remark = thinned(trials, MOST_POINTS)
    series: list[Series] = []
    searched = "b" in trials[0].get("searched", ("a", "b"))
    if not searched:
        low, high = (f(trial["a"] for trial in shown) for f in (min, max))
        steps = [low + (high - low) * i / 60 for i in range(61)]
        branches = len(shown[0]["weights"])
        line = [normalised_weights(a, branches).b for a in steps]
        name = "b = ln K - ln sum exp(a k)"
        series.append(Series(name=name, kind="line", x=steps, y=line, colour="#999999"))
        held = "b was not searched: it follows from a, as the weights' sum is held at K."
        remark = f"{held} {remark}".strip()
    series.append(_points(shown, "a", "b", "B-DENSE", values=[t["fid"] for t in shown]))
    series.append(
        Series(name="uniform weights", kind="points", x=[0.0], y=[0.0], colour=UNIFORM_COLOUR)
    )
    return Chart(
        key="fid-over-a-b",
        title="FID over (a, b)" if searched else "FID over a and the b that follows",
        x="a",
        y="b",
        series=[*series, _best(shown, "a", "b")],
        scale="FID",
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
                values=[trial["fid"]],
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


def importance_of(importance: Mapping[str, float]) -> Chart:
    """Share of each parameter in where the best trials lie."""
    ordered = sorted(importance.items(), key=lambda pair: -pair[1])
    return Chart(
        key="importance",
        title="Importance of the parameters",
        x="parameter",
        y="share",
        series=[
            Series(
                name="importance",
                kind="bars",
                x=[name for name, _ in ordered],
                y=[share for _, share in ordered],
                quiet=True,
            )
        ],
        remark="PED-ANOVA: how much each parameter separates the best tenth from all trials.",
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
        for seed, fid in sorted(result.fids.items())
    ]
    summaries = [result.summary() for result in comparison.results]
    return Chart(
        key=key,
        title=title,
        x="",
        y=f"FID, {comparison.results[0].conditions['images']} images",
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


def fid_over_steps(
    rounds: Mapping[int, Comparison], teacher: Mapping[str, Any] | None, title: str
) -> Chart:
    """FID over a chain's number of steps, a line for each arm, bars of one standard error."""
    first = next(iter(rounds.values()))
    series = []
    for result in first.results:
        own = {
            steps: match.summary()
            for steps, comparison in rounds.items()
            for match in comparison.results
            if match.arm == result.arm
        }
        series.append(
            Series(
                name=result.arm.name if result.arm.is_baseline else f"B-DENSE, {result.arm.name}",
                kind="line",
                x=list(own),
                y=[found.mean for found in own.values()],
                spread=[found.standard_error or 0.0 for found in own.values()],
                colour=_ARMS.get(result.arm.name, OWN_COLOUR),
                dashed=result.arm.name == "uniform weights",
            )
        )
    if teacher is not None:
        series.append(
            Series(
                name="teacher",
                kind="points",
                x=[teacher["nfe"]],
                y=[teacher["value"]],
                colour="#000000",
            )
        )
    steps = [*([teacher["nfe"]] if teacher else []), *rounds]
    return Chart(
        key="fid",
        title=title,
        x="DDIM steps",
        y=f"FID, {first.results[0].conditions['images']} images",
        series=series,
        log_x=True,
        ticks={float(n): str(n) for n in steps},
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
    values: Sequence[float] = (),
) -> Series:
    return Series(
        name=name,
        kind="points",
        x=[trial[x] for trial in trials],
        y=[trial[y] for trial in trials],
        colour=colour,
        values=values,
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
            name=f"{TITLES[method]} {result['fid']:.3f}",
            kind="level",
            y=[result["fid"]],
            colour=_BASELINES[method],
            dashed=method == "uniform",
        )
        for method, result in baselines.items()
    ]


def _label(trial: Mapping[str, Any]) -> str:
    return f"trial {trial['number']}, FID {trial['fid']:.3f}, {in_short(trial)}"


def _fid_label(trials: Sequence[Mapping[str, Any]]) -> str:
    return f"FID, {trials[0]['images']} images"


def _is_wide(trials: Sequence[Mapping[str, Any]]) -> bool:
    fids = [float(trial["fid"]) for trial in trials]
    return min(fids) > 0 and max(fids) / min(fids) > _WIDE


def _cycle(count: int) -> list[str]:
    return [_RULES[i % len(_RULES)] for i in range(count)]
