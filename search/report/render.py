"""Charts as pictures (matplotlib) and as the dashboard's plots (plotly), in the same colours.

Texts of a chart may come from anybody who may write to the database: matplotlib is told not to
read mathematics in them, plotly not to read tags.
"""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdense.files import atomic_write
from search.report.charts import Chart, Series

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Low values, the good ones, dark. Viridis.
STOPS = ("#440154", "#3b528b", "#21918c", "#5ec962", "#fde725")
DPI = 150
_MARKS = 6.0
_LONGEST = 60  # characters of a title or label: more would leave no room for what is drawn


def shade(value: float, low: float, high: float) -> str:
    """#rrggbb of a value on the scale between two bounds; beyond them the last colour."""
    place = min(max((value - low) / (high - low), 0.0), 1.0) * (len(STOPS) - 1)
    index = min(int(place), len(STOPS) - 2)
    left, right = (_channels(STOPS[i]) for i in (index, index + 1))
    mixed = [round(a + (b - a) * (place - index)) for a, b in zip(left, right, strict=True)]
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def save_png(chart: Chart, path: Path) -> None:
    """A chart as a picture of 1050 x 630 pixels."""
    with atomic_write(path) as scratch:
        picture(chart).savefig(scratch, format="png", dpi=DPI)


def picture(chart: Chart) -> "Figure":
    """A chart drawn by matplotlib."""
    # Half a second, for reports alone.
    from matplotlib import rc_context

    with rc_context({"font.size": 11.5}):
        return _picture(chart)


def _picture(chart: Chart) -> "Figure":
    # Figure, not pyplot: no window, no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.subplots()
    for series in chart.series:
        _draw(axes, series, chart)
    if chart.log_x:
        axes.set_xscale("log", base=2)
    if chart.log_y:
        axes.set_yscale("log")
    if chart.ticks:
        axes.set_xticks(list(chart.ticks), [_plain(text) for text in chart.ticks.values()])
        axes.set_xticks([], minor=True)
    axes.set(xlabel=_plain(chart.x), ylabel=_plain(chart.y), title=_plain(chart.title))
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    if chart.scale:
        _draw_scale(figure, axes, chart)
    if any(not series.quiet for series in chart.series):
        axes.legend(fontsize="small")
    return figure


def _draw_scale(figure: "Figure", axes: "Axes", chart: Chart) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    colours = LinearSegmentedColormap.from_list("fid", STOPS)
    scale = ScalarMappable(Normalize(*chart.bounds()), colours)
    figure.colorbar(scale, ax=axes, label=_plain(chart.scale))


def _draw(axes: "Axes", series: Series, chart: Chart) -> None:
    label = "_" if series.quiet else _plain(series.name)
    dash = "--" if series.dashed else "-"
    if series.kind == "level":
        axes.axhline(series.y[0], color=series.colour, linestyle=dash, linewidth=1.2, label=label)
    elif series.kind == "steps":
        axes.step(series.x, series.y, where="post", color=series.colour, label=label)
    elif series.kind == "line":
        colour = _colour(series, chart)
        if series.spread:
            axes.errorbar(
                series.x,
                series.y,
                yerr=series.spread,
                color=colour,
                label=label,
                linestyle=dash,
                marker="o",
                markersize=4,
                capsize=3,
            )
        else:
            axes.plot(series.x, series.y, dash, color=colour, linewidth=1.3, label=label)
    elif series.spread:
        axes.errorbar(
            series.x,
            series.y,
            yerr=series.spread,
            fmt="o",
            color=series.colour,
            capsize=3,
            label=label,
        )
    else:
        axes.plot(series.x, series.y, "o", markersize=_MARKS, color=series.colour, label=label)


def interactive(chart: Chart) -> "go.Figure":
    """A chart as the dashboard shows it."""
    import plotly.graph_objects as go

    traces = [_trace(series, chart) for series in chart.series if series.kind != "level"]
    span = _span(chart)
    traces[:0] = [_level(series, span) for series in chart.series if series.kind == "level"]
    if chart.scale:
        # Lines have no scale of their own: a trace without points carries it.
        marker = {"color": [chart.bounds()[0]], **_scale(chart)}
        nothing = {"x": [None], "y": [None], "showlegend": False}
        traces.append({"type": "scatter", "mode": "markers", "marker": marker, **nothing})
    x: dict[str, Any] = {"title": {"text": _escaped(ellipsised(chart.x))}, "automargin": True}
    y: dict[str, Any] = {"title": {"text": _escaped(ellipsised(chart.y))}, "automargin": True}
    if chart.log_x:
        x["type"] = "log"
    if chart.log_y:
        y["type"] = "log"
    if chart.ticks:
        x["tickvals"] = list(chart.ticks)
        x["ticktext"] = [_escaped(ellipsised(text)) for text in chart.ticks.values()]
    grid = {"gridcolor": "#e6e6e6", "zeroline": False, "showline": True, "linecolor": "#999999"}
    return go.Figure(
        data=traces,
        layout={
            "template": "none",
            "title": {"text": _escaped(ellipsised(chart.title)), "font": {"size": 16}},
            "xaxis": x | grid,
            "yaxis": y | grid,
            "legend": {"orientation": "h", "y": -0.22, "font": {"size": 11}},
            "margin": {"l": 60, "r": 20, "t": 50, "b": 60},
            "hovermode": "closest",
        },
    )


def _trace(series: Series, chart: Chart) -> dict[str, Any]:
    trace: dict[str, Any] = {
        "type": "scatter",
        "name": _escaped(ellipsised(series.name)),
        "x": [_short(x) for x in series.x],
        "y": [_short(y) for y in series.y],
        "showlegend": not series.quiet,
    }
    if series.labels:
        trace |= {"text": [_escaped(text) for text in series.labels], "hoverinfo": "text"}
    if any(series.spread):
        trace["error_y"] = {"type": "data", "array": [_short(s) for s in series.spread]}
    if series.kind == "points":
        return trace | {"mode": "markers", "marker": {"size": 9, "color": series.colour}}
    line: dict[str, Any] = {"color": _colour(series, chart), "width": 1.5}
    if series.dashed:
        line["dash"] = "dash"
    if series.kind == "steps":
        line["shape"] = "hv"
    return trace | {"mode": "lines+markers" if series.spread else "lines", "line": line}


def _scale(chart: Chart) -> dict[str, Any]:
    low, high = chart.bounds()
    stops = [[i / (len(STOPS) - 1), colour] for i, colour in enumerate(STOPS)]
    bar = {"title": {"text": _escaped(ellipsised(chart.scale))}, "thickness": 12}
    return {
        "colorscale": stops,
        "cmin": _short(low),
        "cmax": _short(high),
        "showscale": True,
        "colorbar": bar,
    }


def _level(series: Series, span: tuple[float, float]) -> dict[str, Any]:
    line = {"color": series.colour, "width": 1.5, "dash": "dash" if series.dashed else "solid"}
    y = _short(series.y[0])
    return {
        "type": "scatter",
        "mode": "lines",
        "name": _escaped(ellipsised(series.name)),
        "x": [_short(x) for x in span],
        "y": [y, y],
        "line": line,
        "showlegend": not series.quiet,
    }


def _span(chart: Chart) -> tuple[float, float]:
    """From where to where levels go."""
    places = [x for series in chart.series for x in series.x]
    low, high = min(places, default=0.0), max(places, default=1.0)
    margin = 0.0 if chart.log_x else 0.03 * (high - low)
    return low - margin, high + margin


def _colour(series: Series, chart: Chart) -> str:
    """Of a line."""
    return series.colour if series.value is None else shade(series.value, *chart.bounds())


def _short(value: float) -> float:
    """Five digits: a plot is stored in the study's rows, and no eye sees more."""
    return float(f"{value:.5g}")


def _escaped(text: str) -> str:
    """Plotly reads some tags in texts."""
    return html.escape(printable(text), quote=False)


def _plain(text: str) -> str:
    """Matplotlib reads mathematics between dollars, and leaves out what begins with _."""
    return ellipsised(printable(text)).replace("$", r"\$").removeprefix("_")


def ellipsised(text: str) -> str:
    """Its beginning, with an ellipsis where that is not all."""
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1].rstrip() + "…"


def printable(text: str) -> str:
    """Without what would break a line or be no character of a text."""
    return "".join(c if c.isprintable() else " " for c in text)


def _channels(colour: str) -> Sequence[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
