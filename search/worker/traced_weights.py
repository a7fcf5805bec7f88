"""Branch weights that keep their own history where they are learned, and its picture.

The history is part of the state in the training's checkpoint: a run that is taken over has
exactly the past that it does not repeat. K branches.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdense.files import atomic_write
from bdense.training.loop import IterationReport
from bdense.weights.weighting import BranchWeighting, Observed
from search.study.results import WeightHistory

# Rows of a trial are read whole by every look at the study: its history has to stay small.
MAX_POINTS = 100
_PAST = "past"


class TracedWeights:
    """A weighting that, where its weights are learned, remembers those of every iteration.

    Args:
        given: What decides the weights.
    """

    def __init__(self, given: BranchWeighting) -> None:
        self._given = given
        self._past: list[Tensor] = []

    @property
    def num_branches(self) -> int:
        """K."""
        return self._given.num_branches

    @property
    def learns(self) -> bool:
        """As in the weighting."""
        return self._given.learns

    @property
    def needs_gradients(self) -> bool:
        """As in the weighting."""
        return self._given.needs_gradients

    def observe(self, seen: Observed) -> None:
        """As in the weighting."""
        self._given.observe(seen)

    def weights(self) -> Tensor:
        """[K] float64 w_1..w_K of the next update."""
        return self._given.weights()

    def note(self, done: IterationReport) -> None:
        """Remember an iteration, by the weights of its last update."""
        if self.learns:
            assert done.iteration == len(self._past)
            self._past.append(done.weights[-1])

    def history(self) -> WeightHistory | None:
        """How the weights changed; None for fixed ones.

        Its iterations are evenly spread from the first to the last, at most ``MAX_POINTS``.
        """
        if not self.learns:
            return None
        count = len(self._past)
        spread = torch.linspace(0, count - 1, min(count, MAX_POINTS), dtype=torch.float64)
        points = spread.round().int().tolist()
        weights = [[round(w, 6) for w in self._past[i].tolist()] for i in points]
        return WeightHistory(points, weights)

    def state(self) -> dict[str, Tensor]:
        """What ``restore`` needs, the past included."""
        past = {_PAST: torch.stack(self._past)} if self._past else {}
        return self._given.state() | past

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from ``state``."""
        self._given.restore({name: value for name, value in state.items() if name != _PAST})
        self._past = list(state[_PAST].cpu()) if _PAST in state else []

    def describe(self) -> dict[str, Any]:
        """As in the weighting."""
        return self._given.describe()


def draw_history(history: WeightHistory, title: str, path: Path) -> None:
    """A PNG of each branch's weight over the iterations.

    Args:
        history: From ``TracedWeights.history``.
        title: Above it.
        path: The file.
    """
    # Half a second, for learned weights alone. Figure, not pyplot: no window, no global state.
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    columns = list(zip(*history.weights, strict=True))
    figure = Figure(figsize=(7.5, 4.0), layout="constrained")
    axes = figure.subplots()
    axes.axhline(1.0, color="0.6", linewidth=0.8, linestyle="--", label="uniform")
    colours = colormaps["viridis"].resampled(len(columns) + 1)
    for k, weights in enumerate(columns, 1):
        name = f"k = {k}" + (" (end point)" if k == len(columns) else "")
        axes.plot(history.iterations, weights, color=colours(k - 1), label=name)
    axes.set(xlabel="iteration", ylabel="branch weight $w_k$", title=title)
    figure.legend(loc="outside right center")
    with atomic_write(path) as scratch:
        figure.savefig(scratch, format="png", dpi=150)
