"""Branch weights that keep their own history where they are learned.

The history is part of the state in the training's checkpoint: a run that is taken over has
exactly the past that it does not repeat. K branches.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bdense.training.loop import IterationReport
from bdense.weights.weighting import BranchWeighting
from search.study.results import WeightHistory

# Rows of a trial are read whole by every look at the study: its history has to stay small.
MAX_POINTS = 100
_PAST = "past"


class TracedWeights:
    """A weighting that, where its weights are learned, remembers those of every iteration.

    A ``BranchWeighting`` itself, whose other members are those of ``given``.
    """

    def __init__(self, given: BranchWeighting) -> None:
        self._given = given
        self._past: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  all else is the weighting's
        if name == "_given":  # not there yet, as in unpickling
            raise AttributeError(name)
        return getattr(self._given, name)

    def note(self, done: IterationReport) -> None:
        """Remember an iteration's weights, those of its last update."""
        if self._given.learns:
            assert done.iteration == len(self._past)
            self._past.append(done.weights[-1])

    def history(self) -> WeightHistory | None:
        """How the weights changed; None for fixed ones.

        Its iterations are evenly spread from the first to the last, at most ``MAX_POINTS``.
        """
        if not self._given.learns:
            return None
        count = len(self._past)
        spread = torch.linspace(0, count - 1, min(count, MAX_POINTS), dtype=torch.float64)
        points = spread.round().int().tolist()
        weights = [[round(w, 6) for w in self._past[i].tolist()] for i in points]
        return WeightHistory(points, weights)

    def state(self) -> dict[str, Tensor]:
        """The state for ``restore``, including the past."""
        past = {_PAST: torch.stack(self._past)} if self._past else {}
        return self._given.state() | past

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from ``state``."""
        self._given.restore({name: value for name, value in state.items() if name != _PAST})
        self._past = list(state[_PAST].cpu()) if _PAST in state else []
