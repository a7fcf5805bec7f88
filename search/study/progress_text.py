"""How far a running row is, in its worker's words, and the share of it that they mean.

``share_done`` reads what the functions beside it write: a change of words is made here alone.
"""

import re

# The rest is evaluation's.
_TRAINING_SHARE = 0.9
_WORDS = re.compile(
    r"(?:stage (?P<stage>\d+)/(?P<stages>\d+): )?"
    r"(?P<what>training|evaluating) (?P<done>\d+)/(?P<total>\d+)"
)


def training(done: int, iterations: int, loss: float) -> str:
    """So many iterations are done."""
    return f"training {done}/{iterations}, loss {loss:.3g}"


def measuring(trained: int, iterations: int, done: int, images: int) -> str:
    """After so many iterations the student is measured, and so many of its images are drawn."""
    return f"training {trained}/{iterations}, measuring {done}/{images} images"


def evaluating(done: int, images: int) -> str:
    """So many images of the student are drawn."""
    return f"evaluating {done}/{images} images"


def in_stage(number: int, stages: int, text: str) -> str:
    """One of the texts above, of a stage of several; numbers begin with 1."""
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
