"""The history of learned weights: whole after an interruption, short in a row, drawn."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

from bdense.training.loop import IterationReport
from bdense.weights.weighting import FixedWeights, LearnedWeights
from search.worker.traced_weights import MAX_POINTS, TracedWeights, draw_history
from tests.small import same_weights, sfd, small_teacher, small_trajectories

ITERATIONS = 6


def traced(rule="uncertainty") -> TracedWeights:
    return TracedWeights(LearnedWeights(4, rule=rule, strength=1.0, memory=10))


def noted(count: int) -> TracedWeights:
    """Weights i, i + 1, i + 2, i + 3 of the last update of iteration i."""
    weights = traced()
    for i in range(count):
        used = torch.stack([torch.zeros(4), torch.arange(4) + i]).double()
        weights.note(IterationReport(i, count, 1e-3, torch.ones(2, 4), used, 1.0, 1.0))
    return weights


class InterruptedRunError(Exception):
    pass


def train(weights: TracedWeights, checkpoint: Path | None, stop_at: int = ITERATIONS):
    """Distil, or be stopped after ``stop_at`` iterations, each of which saved a checkpoint."""
    teacher = small_teacher()

    def on_iteration(done: IterationReport) -> None:
        if done.iteration == stop_at:
            raise InterruptedRunError
        weights.note(done)

    return sfd(
        small_trajectories(teacher, count=ITERATIONS),
        weights,
        images=4 * ITERATIONS,
        checkpoint=checkpoint,
        checkpoint_seconds=0.0,
        on_iteration=on_iteration,
    )


@pytest.mark.parametrize("rule", ["uncertainty", "gradient-norm"])
def test_an_interruption_loses_no_history_and_repeats_none(tmp_path, rule):
    """Noted after the last checkpoint or not: what is repeated is noted once."""
    calm, path = traced(rule), tmp_path / "checkpoint.safetensors"
    student = train(calm, None)
    with pytest.raises(InterruptedRunError):
        train(traced(rule), path, stop_at=2)
    with pytest.raises(InterruptedRunError):
        train(traced(rule), path, stop_at=4)
    resumed = traced(rule)
    assert same_weights(train(resumed, path), student)
    assert resumed.history() == calm.history()
    assert calm.history()["iterations"] == list(range(ITERATIONS))
    assert torch.equal(resumed.weights(), calm.weights())


def test_the_history_ends_with_the_weights_of_the_last_update():
    weights = traced()
    train(weights, None)
    last = weights.history()["weights"][-1]
    assert last == pytest.approx(weights.weights().tolist(), abs=1e-6)
    assert sum(last) == pytest.approx(4, abs=1e-5)
    assert len(set(last)) == 4


def test_a_short_history_is_whole():
    assert noted(3).history() == {
        "iterations": [0, 1, 2],
        "weights": [[0.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0]],
    }


def test_fixed_weights_have_no_history():
    fixed = TracedWeights(FixedWeights(torch.ones(4, dtype=torch.float64)))
    train(fixed, None)
    assert fixed.history() is None


def test_a_long_history_is_thinned_and_keeps_its_ends():
    history = noted(1001).history()
    points = history["iterations"]
    assert len(points) == len(history["weights"]) == MAX_POINTS
    assert (points[0], points[-1]) == (0, 1000)
    gaps = {after - before for before, after in pairwise(points)}
    assert gaps <= {10, 11}
    assert [row[0] for row in history["weights"]] == points


def test_the_picture(tmp_path):
    """One colour for each branch, whole or not at all."""
    path = tmp_path / "weights.png"
    draw_history(noted(50).history(), "uncertainty, strength 1", path)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.size == (1125, 600)
        colours = picture.convert("RGB").getcolors(2**24)
    # Lines are many pixels of one colour that is no grey; their smoothed edges are few of each.
    assert len([colour for count, colour in colours if count > 150 and len(set(colour)) > 1]) >= 4
    assert [p.name for p in tmp_path.iterdir()] == ["weights.png"]
