"""What a worker says of its progress, and what is read out of it."""

import pytest

from search.study.progress_text import evaluating, in_round, looking, share_done, training


def test_people_read_how_far_a_row_is():
    assert training(77, 100, 13.7321) == "training 77/100, loss 13.7"
    assert looking(25, 100, 128, 256) == "training 25/100, looking at 128/256 images"
    assert evaluating(128, 256) == "evaluating 128/256 images"
    assert in_round(2, 3, evaluating(128, 256)) == "round 2/3: evaluating 128/256 images"


@pytest.mark.parametrize(
    ("text", "share"),
    [
        (training(1, 50, 1e-9), 0.9 / 50),
        (training(50, 50, float("nan")), 0.9),
        (looking(25, 50, 128, 256), 0.45),  # the budget says how far, not the images
        (evaluating(0, 256), 0.9),
        (evaluating(128, 256), 0.95),
        (evaluating(256, 256), 1.0),
        (in_round(1, 4, training(50, 100, 1.0)), 0.45 / 4),
        (in_round(2, 4, training(50, 100, 1.0)), 1.45 / 4),
        (in_round(4, 4, evaluating(256, 256)), 1.0),
    ],
)
def test_the_share_is_read_from_what_was_written(text, share):
    """Training is nine tenths of a row, and a round its part of a chain."""
    assert share_done(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "starting", "iteration 10 of 160"])
def test_other_words_mean_nothing(text):
    assert share_done(text) == 0.0
