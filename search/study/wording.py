"""Counts, weights, seconds and tables as text."""

import math
from collections.abc import Sequence

from bdense.weights.space import BranchWeights, by_interval
from search.storage.queries import Counts


def counts_line(counts: Counts, rows: str) -> str:
    """Rows by state, in words."""
    return (
        f"{counts.complete} of {counts.planned} {rows} complete, "
        f"{counts.pruned} pruned, {counts.failed} failed, {counts.running} running"
    )


def weights_text(weights: BranchWeights) -> str:
    """Three digits of each; a bar between intervals that have weights of their own."""
    return " | ".join(" ".join(f"{w:.3g}" for w in row) for row in by_interval(weights))


def grid_legend(prompts: Sequence[str]) -> str:
    """What the first row of a sample grid shows; "" without prompts."""
    return f"First row: {', '.join(prompts)}." if prompts else ""


def align(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Cells in columns, the first and the last left-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i in (0, len(row) - 1) else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def duration(seconds: float) -> str:
    """Seconds as text, such as ``2 min 05 s``."""
    if not math.isfinite(seconds):
        return "unknown"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
