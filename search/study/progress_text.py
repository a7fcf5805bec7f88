"""The progress of a running row as text, and the share of the row that a text means."""

import re

# The rest is evaluation.
_TRAINING_SHARE = 0.9
_WORDS = re.compile(
    r"(?:stage (?P<stage>\d+)/(?P<stages>\d+): )?"
    r"(?P<what>training|evaluating) (?P<done>\d+)/(?P<total>\d+)"
)


def training(done: int, iterations: int, loss: float) -> str:
    """Iterations of a training."""
    return f"training {done}/{iterations}, loss {loss:.3g}"


def measuring(trained: int, iterations: int, done: int, images: int) -> str:
    """Images of an intermediate evaluation."""
    return f"training {trained}/{iterations}, measuring {done}/{images} images"


def evaluating(done: int, images: int) -> str:
    """Images of the last evaluation."""
    return f"evaluating {done}/{images} images"


def in_stage(number: int, stages: int, text: str) -> str:
    """One of the texts above, of one of several stages, from 1."""
    return f"stage {number}/{stages}: {text}"


def share_done(text: str) -> float:
    """How much of a row is done, 0 to 1, by one of the texts above; 0 by any other.

    Evaluation is the last tenth. Each of several stages is an equal share.
    """
    found = _WORDS.match(text)
    if found is None:
        return 0.0
    share = int(found["done"]) / int(found["total"])
    if found["what"] == "training":
        own = _TRAINING_SHARE * share
    else:
        own = _TRAINING_SHARE + (1 - _TRAINING_SHARE) * share
    if found["stage"] is None:
        return own
    return (int(found["stage"]) - 1 + own) / int(found["stages"])
