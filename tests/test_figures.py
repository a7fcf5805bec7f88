"""A study's own plots: what is drawn of its numbers, and how names of any origin are shown."""

import numpy as np
import pytest

from search.analysis.surrogate import Observation, posterior_means
from search.report.overview import overview_of
from search.report.plots import Plot, plain
from search.study.study import Study
from tests.measured import VALLEY, created, finish, normalised, search
from tests.studies import LEARNED, PROMOTION, spec


def lines(study: Study) -> dict[str, tuple[list[float], list[float]]]:
    """x and y of each line of its one plot, by its name in the legend; the curve has none."""
    (plot,) = overview_of(study).plots()
    (axes,) = plot.figure().axes
    drawn = {line.get_label(): line for line in axes.get_lines()}
    return {name: (list(each.get_xdata()), list(each.get_ydata())) for name, each in drawn.items()}


def test_fid_over_a_with_its_baselines_its_best_and_the_surrogates_curve(url):
    assert not any(name.startswith("_") for name in lines(search(url, VALLEY[:3])))  # no curve
    found = lines(search(url, VALLEY))
    places, fids = [params["a"] for params, _ in VALLEY], [fid for _, fid in VALLEY]
    assert found["B-DENSE"] == (places, pytest.approx(fids))
    assert found["best: trial 3"] == ([1.25], [pytest.approx(fids[3])])
    assert found["plain SFD 12.000"][1] == [12.0, 12.0]
    assert found["uniform weights 11.000"][1] == [11.0, 11.0]
    (curve,) = (each for name, each in found.items() if name.startswith("_"))
    assert (curve[0][0], curve[0][-1]) == (min(places), max(places))
    evaluations = [
        Observation(point={"a": a}, value=fid, group="search")
        for a, fid in zip(places, fids, strict=True)
    ]
    asked = [{"a": float(a)} for a in curve[0]]
    assert curve[1] == pytest.approx(posterior_means(evaluations, asked))
    assert 0.5 < curve[0][int(np.argmin(curve[1]))] < 1.7


def test_learned_weights_have_points_and_a_curve_for_each_rule(url):
    rules = ("uncertainty", "gradient-norm")
    trials = [
        ({"rule": rule, "strength": strength}, 9.0 + strength**2 + rules.index(rule))
        for rule in rules
        for strength in (-0.5, 0.5, 1.0)
    ]
    found = lines(search(url, trials, study=spec(weights=LEARNED)))
    for rule in rules:
        assert found[f"B-DENSE, {rule}"][0] == [-0.5, 0.5, 1.0]
    assert sum(name.startswith("_") for name in found) == 2


def test_very_different_fids_have_a_logarithmic_axis(url):
    (plot,) = overview_of(search(url, [*VALLEY, ({"a": 2.9}, 900.0)])).plots()
    assert plot.figure().axes[0].get_yscale() == "log"


def test_arms_have_a_point_for_each_seed_and_their_mean(url):
    arms = normalised(plan={"arms": ["plain", "uniform"], "seeds": [1, 2]}, name="arms")
    study = created(url, arms)
    finish(study, lambda arm, row: 4.0 + 2 * row.seed if arm.baseline == "plain" else 3.0)
    (plot,) = overview_of(study).plots()
    (axes,) = plot.figure().axes
    each = [list(line.get_ydata()) for line in axes.get_lines() if line.get_marker() == "o"]
    assert [6.0, 8.0] in each
    assert [7.0] in each
    assert [3.0, 3.0] in each
    assert [text.get_text() for text in axes.get_xticklabels()] == ["plain SFD", "uniform weights"]


def test_a_method_of_several_stages_has_a_line_for_each_arm_over_nfe(url):
    study = created(url, spec(PROMOTION, plan={"arms": ["plain", "uniform"], "seeds": [0, 1]}))
    finish(study, lambda arm, row: (20.0 if arm.baseline == "plain" else 10.0) + row.seed)
    (plot,) = overview_of(study).plots()
    (axes,) = plot.figure().axes
    drawn = [
        (list(line.get_xdata()), list(line.get_ydata()))
        for line in axes.get_lines()
        if len(line.get_xdata()) == 2 and line.get_marker() == "o"
    ]
    # The last stage, of 2 steps, has the row's FID; the one before it 1 less.
    assert drawn == [([4, 2], [19.5, 20.5]), ([4, 2], [9.5, 10.5])]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("$x_1$", r"\$x_1\$"),
        ("_hidden\n", "hidden "),
        ("a" * 60, "a" * 60),
        ("a" * 61, "a" * 59 + "…"),
    ],
)
def test_names_are_no_mathematics_and_not_too_long(text, shown):
    assert plain(text) == shown
    plot = Plot("key", text, lambda axes: axes.plot([1], [1], "o", label=plain(text)))
    figure = plot.figure()
    figure.draw_without_rendering()
    assert figure.axes[0].get_title() == shown
