"""The history of learned weights: short in a row, drawn; tests/test_evaluate.py interrupts it."""

import pickle
from itertools import pairwise

import torch
from PIL import Image

from bdense.training.loop import IterationReport
from bdense.weights.weighting import FixedWeights, LearnedWeights
from search.study.plot import draw_history
from search.study.results import WeightHistory
from search.worker.traced_weights import MAX_POINTS, TracedWeights


def noted(count: int) -> TracedWeights:
    """Weights i, i + 1, i + 2, i + 3 of the last update of iteration i."""
    weights = TracedWeights(LearnedWeights(4, rule="uncertainty", strength=1.0, memory=10))
    for i in range(count):
        used = torch.stack([torch.zeros(4), torch.arange(4) + i]).double()
        weights.note(IterationReport(i, count, 1e-3, torch.ones(2, 4), used, 1.0, 1.0))
    return weights


def test_a_short_history_is_whole():
    assert noted(3).history() == WeightHistory(
        iterations=[0, 1, 2],
        weights=[[0.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0]],
    )


def test_it_travels_to_the_other_processes_of_a_training():
    sent = pickle.loads(pickle.dumps(noted(3)))  # noqa: S301
    assert sent.history() == noted(3).history()
    assert sent.num_branches == 4


def test_fixed_weights_have_no_history():
    fixed = TracedWeights(FixedWeights(torch.ones(4, dtype=torch.float64)))
    fixed.note(IterationReport(0, 1, 1e-3, torch.ones(2, 4), torch.ones(2, 4), 1.0, 1.0))
    assert fixed.history() is None


def test_a_long_history_is_thinned_and_keeps_its_ends():
    history = noted(1001).history()
    points = history.iterations
    assert len(points) == len(history.weights) == MAX_POINTS
    assert (points[0], points[-1]) == (0, 1000)
    gaps = {after - before for before, after in pairwise(points)}
    assert gaps <= {10, 11}
    assert [row[0] for row in history.weights] == points


def test_the_picture(tmp_path):
    """One colour for each branch, whole or not at all."""
    path = tmp_path / "weights.png"
    draw_history(noted(50).history(), "uncertainty, strength 1", path)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.size == (1050, 630)
        colours = picture.convert("RGB").getcolors(2**24)
    # Lines are many pixels of one colour that is no grey; their smoothed edges are few of each.
    assert len([colour for count, colour in colours if count > 150 and len(set(colour)) > 1]) >= 4
    assert [p.name for p in tmp_path.iterdir()] == ["weights.png"]
