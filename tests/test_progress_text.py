"""What a worker says of its progress, and what is read out of it."""

import pytest

from search.study.progress_text import evaluating, in_stage, measuring, share_done, training


@pytest.mark.parametrize(
    ("text", "share"),
    [
        (training(1, 50, 1e-9), 0.9 / 50),
        (training(50, 50, float("nan")), 0.9),
        (measuring(25, 50, 128, 256), 0.45),  # the training says how far, not the images
        (evaluating(0, 256), 0.9),
        (evaluating(128, 256), 0.95),
        (evaluating(256, 256), 1.0),
        (in_stage(1, 4, training(50, 100, 1.0)), 0.45 / 4),
        (in_stage(2, 4, training(50, 100, 1.0)), 1.45 / 4),
        (in_stage(4, 4, evaluating(256, 256)), 1.0),
        ("", 0.0),
        ("starting", 0.0),
        ("iteration 10 of 160", 0.0),
    ],
)
def test_the_share_is_read_from_what_was_written(text, share):
    """Training is nine tenths of a row, and each stage an equal part of it."""
    assert share_done(text) == pytest.approx(share)
