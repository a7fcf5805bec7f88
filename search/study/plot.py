"""Pictures by matplotlib, and those of a row: its losses and its learned weights.

Anyone with write access to the database chooses names: matplotlib must not read them as maths.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bdense.files import atomic_write
from search.study.folders import LOSS_PLOT
from search.study.markdown import printable
from search.study.results import WeightHistory
from search.study.trial_log import LOG_FILE, read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
_LONGEST = 60  # characters of a title or name: more would leave no room for the plot


@dataclass(frozen=True, slots=True)
class Plot:
    """One picture: the name of its file, its title, and what draws it on empty axes."""

    key: str
    title: str
    draw: "Callable[[Axes], None]"

    def figure(self) -> "Figure":
        """The picture, 1050 x 630 pixels at ``DPI``."""
        # Imported here, as it takes half a second. Figure, not pyplot: no window, no global state.
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        with rc_context({"font.size": 11.5}):
            figure = Figure(figsize=(7.0, 4.2), layout="constrained")
            axes = figure.subplots()
            axes.grid(which="both", color="0.9", linewidth=0.6)
            axes.set_axisbelow(True)
            self.draw(axes)
            axes.set_title(plain(self.title))
            if axes.get_legend_handles_labels()[1] and not figure.legends:
                axes.legend(fontsize="small")
        return figure

    def save(self, path: Path) -> None:
        """As a PNG file."""
        with atomic_write(path) as scratch:
            self.figure().savefig(scratch, format="png", dpi=DPI)


def plain(text: str) -> str:
    """Text for matplotlib, which reads $...$ as mathematics and leaves out what begins with _."""
    short = printable(text)
    if len(short) > _LONGEST:
        short = short[: _LONGEST - 1].rstrip() + "…"
    return short.replace("$", r"\$").removeprefix("_")


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
