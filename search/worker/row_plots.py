"""A row's plots: its losses, from its log, and its learned weights over the training."""

import math
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from search.study.folders import LOSS_PLOT
from search.study.plot import Plot
from search.study.results import WeightHistory
from search.study.trial_log import LOG_FILE, read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_losses(folder: Path) -> None:
    """Write the plot to a row's folder; nothing where its log has no finite loss.

    A line for each stage: the loss of the batch, branches weighted, over the iterations.
    """
    events, _ = read_log(folder / LOG_FILE)
    losses: dict[str, dict[int, float]] = defaultdict(dict)
    for each in events:
        # A training that was resumed repeats a few iterations.
        if each["event"] == "training" and math.isfinite(loss := float(each["loss"])):
            losses[str(each.get("stage", ""))][int(each["iteration"])] = loss
    if not losses:
        return

    def draw(axes: "Axes") -> None:
        from matplotlib.ticker import LogFormatter

        for stage, by_iteration in losses.items():
            axes.plot(*zip(*sorted(by_iteration.items()), strict=True), linewidth=1.0, label=stage)
        if min(loss for each in losses.values() for loss in each.values()) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(LogFormatter())  # 20, not 2 x 10^1
            axes.yaxis.set_minor_formatter(LogFormatter())
        axes.set(xlabel="iteration", ylabel="loss of the batch")

    Plot("loss", "", draw).save(folder / LOSS_PLOT)


def draw_history(history: WeightHistory, title: str, path: Path) -> None:
    """Write a plot of each branch's weight over the iterations."""

    def draw(axes: "Axes") -> None:
        from matplotlib import colormaps

        columns = list(zip(*history.weights, strict=True))
        axes.axhline(1.0, color="0.6", linewidth=0.8, linestyle="--", label="uniform")
        colours = colormaps["viridis"].resampled(len(columns) + 1)
        for k, weights in enumerate(columns, 1):
            name = f"k = {k}" + (" (end point)" if k == len(columns) else "")
            axes.plot(history.iterations, weights, color=colours(k - 1), label=name)
        axes.set(xlabel="iteration", ylabel="branch weight $w_k$")
        axes.figure.legend(loc="outside right center")

    Plot("weights", title, draw).save(path)
