"""Plots as data, and that both who draw them draw just that."""

import dataclasses
import json
import math

import pytest

from search.analysis.comparison import ArmResult, Comparison
from search.report.charts import Chart, Series
from search.report.plots import arms_of, fid_over, fid_over_time, thinned, weights_of
from search.report.render import STOPS, interactive, picture, save_png, shade
from search.study.arms import Arm
from search.study.results import MeasuredFID
from tests.measured import fid as stored

BASELINES = {"plain SFD": {"fid": 4.0}, "uniform weights": {"fid": 3.5}}


def trial(number: int, a: float, fid: float, hours: float = 0.0, **others) -> dict:
    weights = [math.exp(a * k - 1.0) for k in (1, 2, 3, 4)]
    known = {"number": number, "a": a, "b": -1.0, "fid": fid, "images": 256, "hours": hours}
    return known | {"weights": weights, "label": f"a {a:.3f}"} | others


TRIALS = [trial(0, 0.5, 3.6, 0.5), trial(1, 1.0, 3.2, 1.5), trial(2, 2.0, 3.8, 1.0)]


def named(chart: Chart) -> dict[str, Series]:
    return {series.name: series for series in chart.series}


def arms(fids: dict[str, dict[int, float]]) -> Comparison:
    """Of ``plain`` and ``uniform``, by training seed."""
    results = []
    for name, values in fids.items():
        own = {s: MeasuredFID.of(stored(value, training=s)) for s, value in values.items()}
        arm = Arm(name=name, params={"baseline": name})
        results.append(ArmResult(arm=arm, fids=own, rows=dict.fromkeys(own, 0)))
    return Comparison(variant={}, results=tuple(results))


def test_fid_over_a_with_the_baselines_as_levels():
    series = named(fid_over(TRIALS, BASELINES, "a"))
    assert (series["B-DENSE"].x, series["B-DENSE"].y) == ([0.5, 1.0, 2.0], [3.6, 3.2, 3.8])
    assert (series["best: trial 1"].x, series["best: trial 1"].y) == ([1.0], [3.2])
    levels = {name: each.y for name, each in series.items() if each.kind == "level"}
    assert levels == {"plain SFD 4.000": [4.0], "uniform weights 3.500": [3.5]}


def test_each_word_has_points_of_its_own():
    learned = [
        {**trial(0, 0.0, 3.0), "rule": "uncertainty", "strength": 1.0},
        {**trial(1, 0.0, 3.1), "rule": "gradient-norm", "strength": -0.5},
    ]
    series = named(fid_over(learned, BASELINES, "strength", "rule"))
    assert series["B-DENSE, gradient-norm"].x == [-0.5]
    assert series["B-DENSE, uncertainty"].x == [1.0]


def test_weights_are_lines_in_the_order_of_their_fid_and_coloured_by_it():
    chart = weights_of(TRIALS)
    lines = [series for series in chart.series if series.value is not None]
    assert [line.value for line in lines] == [3.8, 3.6, 3.2]
    assert lines[-1].y == TRIALS[1]["weights"]
    assert named(chart)["best: trial 1"].y == TRIALS[1]["weights"]
    assert chart.ticks == {1.0: "1", 2.0: "2", 3.0: "3", 4: "4 (end point)"}
    assert (chart.scale, chart.bounds()) == ("FID", (3.2, 3.8))


def test_one_very_bad_trial_does_not_take_all_colours():
    chart = weights_of([trial(i, 0.1, 3.0 + i / 10) for i in range(10)] + [trial(10, 2, 1e6)])
    assert chart.bounds() == (3.0, pytest.approx(3.9))


def test_time_has_the_best_so_far():
    chart = fid_over_time(TRIALS, {})
    series = named(chart)
    assert chart.x == "hours since the first trial began"
    assert (series["B-DENSE"].x, series["B-DENSE"].y) == ([0.5, 1.0, 1.5], [3.6, 3.8, 3.2])
    best = series["best so far"]
    assert (best.x, best.y) == ([0.5, 1.5, 1.5], [3.6, 3.2, 3.2])


def test_a_short_study_is_told_in_minutes():
    chart = fid_over_time([trial(0, 1.0, 3.0, 0.25), trial(1, 1.0, 2.0, 0.5)], {})
    assert chart.x == "minutes since the first trial began"
    assert named(chart)["best so far"].x == [15.0, 30.0, 30.0]


def test_very_different_fids_have_a_logarithmic_axis():
    assert not fid_over(TRIALS, {}, "a").log_y
    assert fid_over([*TRIALS, trial(3, 0.0, 400.0)], {}, "a").log_y


def test_of_very_many_trials_the_best_half_is_shown_and_it_is_said():
    many = [trial(i, 0.1, float((i * 7919) % 1000)) for i in range(1000)]
    shown, remark = thinned(many, 100)
    assert len(shown) == 100
    assert "best 50 of 1000 trials and 50 of the others" in remark
    assert {each["fid"] for each in shown} >= set(map(float, range(50)))
    assert [each["number"] for each in shown] == sorted(each["number"] for each in shown)
    assert thinned(many[:100], 100) == (many[:100], "")


def test_arms_are_points_for_each_seed_and_their_mean():
    measured = arms({"plain": {1: 4.0, 2: 6.0}, "uniform": {1: 3.0, 2: 3.0}})
    series = named(arms_of(measured, "", "x"))
    points = list(zip(series["one seed"].x, series["one seed"].y, strict=True))
    assert points == [(0.0, 4.0), (0.0, 6.0), (1.0, 3.0), (1.0, 3.0)]
    mean = series["mean and s.e."]
    assert (mean.y, mean.spread) == ([5.0, 3.0], [1.0, 0.0])


@pytest.mark.parametrize(
    ("value", "colour"), [(0, STOPS[0]), (4, STOPS[-1]), (2, STOPS[2]), (9, STOPS[-1])]
)
def test_colours_go_from_stop_to_stop(value, colour):
    assert shade(value, 0, 4) == colour


def test_a_colour_between_two_stops_is_between_them():
    left, right, mixed = (
        [int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in (STOPS[0], STOPS[1], shade(0.5, 0, 4))
    )
    assert mixed == [round((a + b) / 2) for a, b in zip(left, right, strict=True)]


CHARTS = [fid_over(TRIALS, BASELINES, "a"), weights_of(TRIALS), fid_over_time(TRIALS, BASELINES)]
CHARTS += [dataclasses.replace(CHARTS[0], key="logarithmic", log_y=True)]
each_chart = pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.key)


@each_chart
def test_the_dashboard_draws_what_the_chart_says(chart):
    drawn = json.loads(interactive(chart).to_json())
    traces = {trace.get("name"): trace for trace in drawn["data"] if trace.get("name")}
    for series in chart.series:
        trace = traces[series.name]
        expected = list(series.y) * 2 if series.kind == "level" else list(series.y)
        assert trace["y"] == pytest.approx(expected, rel=1e-4)
        if series.kind != "level":
            assert trace["x"] == pytest.approx(list(series.x))
    assert drawn["layout"]["title"]["text"] == chart.title
    assert ("type" in drawn["layout"]["yaxis"]) == chart.log_y
    if chart.scale:
        (scaled,) = (t["marker"] for t in drawn["data"] if "colorbar" in t.get("marker", {}))
        assert (scaled["cmin"], scaled["cmax"]) == chart.bounds()


@each_chart
def test_the_picture_draws_what_the_chart_says(chart, tmp_path):
    axes, *scales = picture(chart).axes
    assert len(scales) == bool(chart.scale)
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [series.name for series in chart.series if not series.quiet]
    lines = [line.get_ydata() for line in axes.get_lines()]
    for series in chart.series:
        if series.kind in ("line", "steps"):
            assert any(list(line) == list(series.y) for line in lines)
    save_png(chart, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_texts_are_no_tags_and_no_mathematics():
    chart = Chart(
        key="x",
        title="<b>$x_1$</b>\n_",
        x="a & b",
        y="",
        series=[Series(name="_<a href='javascript:1'>", kind="points", x=[1.0], y=[1.0])],
    )
    drawn = interactive(chart)
    assert drawn.layout.title.text == "&lt;b&gt;$x_1$&lt;/b&gt; _"
    assert drawn.data[0].name == "_&lt;a href='javascript:1'&gt;"
    figure = picture(chart)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert axes.get_title() == r"<b>\$x_1\$</b> _"
    (label,) = axes.get_legend().get_texts()
    assert label.get_text() == "<a href='javascript:1'>"
