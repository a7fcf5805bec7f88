"""Pictures by matplotlib.

Anyone with write access to the database chooses names: matplotlib must not read them as maths.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bdense.files import atomic_write
from search.study.markdown import printable

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
