"""The plot of a row's losses over its training, drawn from its log."""

import math
from collections import defaultdict
from pathlib import Path

from bdense.files import atomic_write
from search.study.folders import LOSS_PLOT
from search.study.trial_log import LOG_FILE, read_log


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
    # Figure, not pyplot: no window, no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 3.2), layout="constrained")
    axes = figure.subplots()
    for stage, by_iteration in losses.items():
        axes.plot(*zip(*sorted(by_iteration.items()), strict=True), linewidth=1.0, label=stage)
    if min(loss for each in losses.values() for loss in each.values()) > 0:
        axes.set_yscale("log")
    axes.grid(color="0.9", linewidth=0.6)
    axes.set(xlabel="iteration", ylabel="loss of the batch")
    if any(losses):
        axes.legend(fontsize="small")
    with atomic_write(folder / LOSS_PLOT) as scratch:
        figure.savefig(scratch, format="png", dpi=110)
