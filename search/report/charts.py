"""What a plot is, apart from who draws it: points, lines and levels with names and numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["points", "line", "steps", "level"]
OWN_COLOUR = "#2166ac"


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Numbers that are drawn alike.

    Attributes:
        name: For the legend.
        kind: ``level`` is a horizontal line at y[0].
        x, y: Of equal length, but for a level.
        colour: #rrggbb.
        value: Colours a line by the chart's scale instead.
        labels: Of each point, for whoever points at it.
        spread: Half of each point's error bar.
        dashed: Of lines.
        quiet: Not in the legend.
    """

    name: str
    kind: Kind
    y: Sequence[float]
    x: Sequence[float] = ()
    colour: str = OWN_COLOUR
    value: float | None = None
    labels: Sequence[str] = ()
    spread: Sequence[float] = ()
    dashed: bool = False
    quiet: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One plot.

    Attributes:
        key: Letters and hyphens; names the file and the dashboard's plot.
        title, x, y: For people.
        series: What is drawn, the last above the others.
        log_x, log_y: Logarithmic axes.
        ticks: Of x, where they are not to be chosen: place -> text.
        scale: What colours stand for; "" where nothing is coloured by value.
        remark: What to know of it, below.
    """

    key: str
    title: str
    x: str
    y: str
    series: Sequence[Series]
    log_x: bool = False
    log_y: bool = False
    ticks: Mapping[float, str] = field(default_factory=dict)
    scale: str = ""
    remark: str = ""

    def bounds(self) -> tuple[float, float]:
        """Between which values colours are spread; what is among the worst tenth has the last."""
        values = sorted(each.value for each in self.series if each.value is not None)
        last = math.ceil(0.9 * len(values)) if len(values) >= 10 else len(values)
        return values[0], max(values[last - 1], values[0] + 1e-9)
