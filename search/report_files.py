"""A study's result as files to show: a page with its table, the curve of FID, sample grids.

Reads the storage and the trials' folders; writes nothing but the folder it is given.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdense.errors import InputError
from bdense.files import atomic_write
from search.chain_report import chain_figure, chain_table
from search.comparison import Comparison, compare, complete_rows
from search.planned import Planned, Row
from search.report import TITLES, Standing, complete_trials, headline, standing, table
from search.storage import runs_folder
from search.study import Study, baselines_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE, CURVE, CHAIN = "report.md", "curve.png", "fid.png"
SAMPLES = "samples.png"


def write_report(study: Study, folder: Path) -> Path:
    """Write ``report.md``, ``curve.png`` and a grid of samples for each student that is shown.

    Args:
        study: With at least one complete trial.
        folder: Made where it is not there; files of the same names are replaced.

    Returns:
        The page.

    Raises:
        InputError: No trial is complete.
    """
    now = standing(study)
    if now.best is None:
        raise InputError(
            f"{headline(now)}: there is nothing to report yet; run bdense-search launch first"
        )
    folder.mkdir(parents=True, exist_ok=True)
    trials = complete_trials(study)
    axis = "strength" if "rule" in now.best else "a"
    with atomic_write(folder / CURVE) as scratch:
        curve(now, trials, axis).savefig(scratch, format="png", dpi=150)
    grids = _copy_grids(now, folder)
    pictures = "\n\n".join(f"{title}:\n\n![{title}]({name})" for title, name in grids)
    lines = [
        f"# {now.study}",
        f"{headline(now)}.",
        f"```\n{table(now)}\n```",
        f"![FID over {axis}]({CURVE})",
        _rows(trials, axis),
        "The first 64 images of each student, from the same latents.",
        pictures,
    ]
    with atomic_write(folder / PAGE) as scratch:
        scratch.write_text("\n\n".join(line for line in lines if line) + "\n")
    return folder / PAGE


def write_planned_report(planned: Planned, folder: Path) -> Path:
    """Write ``report.md``, a grid of each arm, and of a chain ``fid.png``: FID over steps.

    Raises:
        InputError: No row is complete.
    """
    comparison = compare(planned)
    if not comparison.results:
        raise InputError(f"{planned.headline()}: there is nothing to report yet")
    folder.mkdir(parents=True, exist_ok=True)
    if planned.kind == "progressive":
        table_text, axis = chain_table(planned), "DDIM steps"
        with atomic_write(folder / CHAIN) as scratch:
            chain_figure(planned).savefig(scratch, format="png", dpi=150)
    else:
        table_text, axis = _tables(planned), ""
    grids = _copy_arms(planned, comparison, folder)
    pictures = "\n\n".join(f"{title}:\n\n![{title}]({name})" for title, name in grids)
    lines = [
        f"# {planned.name}",
        f"{planned.headline()}.",
        f"```\n{table_text}\n```",
        f"![FID over {axis}]({CHAIN})" if axis else "",
        "The first 64 images of each arm's last student, from the same latents.",
        pictures,
    ]
    with atomic_write(folder / PAGE) as scratch:
        scratch.write_text("\n\n".join(line for line in lines if line) + "\n")
    return folder / PAGE


def _tables(planned: Planned) -> str:
    """A table for each budget and NFE that rows were trained for."""
    rows = {(r.kimg, r.nfe) for r in (Row.of(t.params) for t in complete_rows(planned))}
    tables = []
    for kimg, nfe in sorted(rows, key=lambda pair: (pair[1] or 0, pair[0] or 0)):
        found = compare(planned, kimg=kimg, nfe=nfe)
        title = f"{kimg:g} kimg, NFE {nfe}"
        tables.append("\n".join([title, *found.table(), found.conditions_line()]))
    return "\n\n".join(tables)


def _copy_arms(planned: Planned, comparison: Comparison, folder: Path) -> list[tuple[str, str]]:
    """(title, file name) of each arm's grid under the first seed, where it is still there."""
    found = []
    for index, result in enumerate(comparison.results):
        seed = min(result.rows)
        row = runs_folder() / planned.name / f"{result.rows[seed]:05d}"
        grids = [row / SAMPLES, *sorted(row.glob(f"*-{SAMPLES}"))]
        if (source := next((grid for grid in grids if grid.is_file()), None)) is not None:
            name = f"samples-{index}.png"
            with atomic_write(folder / name) as scratch:
                shutil.copyfile(source, scratch)
            found.append((f"{result.arm.name}, seed {seed}", name))
    return found


def curve(now: Standing, trials: list[dict[str, Any]], axis: str) -> "Figure":
    """FID of every complete trial over one of its parameters, beside the baselines."""
    # Half a second, for reports alone. Figure, not pyplot: no window, no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.subplots()
    for rule in sorted({trial.get("rule", "") for trial in trials}):
        own = [trial for trial in trials if trial.get("rule", "") == rule]
        label = f"B-DENSE, {rule}" if rule else "B-DENSE"
        axes.plot([t[axis] for t in own], [t["fid"] for t in own], "o", label=label)
    styles = {"sfd": ("0.2", "-"), "uniform": ("tab:orange", "--")}
    for method, result in now.baselines.items():
        colour, line = styles[method]
        axes.axhline(result["fid"], color=colour, linestyle=line, label=TITLES[method])
    axes.set(xlabel=axis, ylabel=f"FID, {trials[0]['images']} images", title=now.study)
    axes.legend()
    return figure


def _copy_grids(now: Standing, folder: Path) -> list[tuple[str, str]]:
    """(title, file name) of the sample grids that were still there to copy."""
    assert now.best is not None
    sources = [
        (TITLES[method], runs_folder() / baselines_name(now.study) / f"{result['number']:05d}")
        for method, result in now.baselines.items()
    ]
    best = now.best["number"]
    sources.append((f"best trial ({best})", runs_folder() / now.study / f"{best:05d}"))
    found = []
    for title, source in sources:
        if (source / SAMPLES).is_file():
            name = f"samples-{title.split()[0].lower()}.png"
            with atomic_write(folder / name) as scratch:
                shutil.copyfile(source / SAMPLES, scratch)
            found.append((title, name))
    return found


def _rows(trials: list[dict[str, Any]], axis: str) -> str:
    """Every complete trial, the best first."""
    names = ["rule", axis] if axis == "strength" else ["a", "b"]
    header = ["trial", *names, "FID", "w_1 .. w_K"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for trial in sorted(trials, key=lambda t: float(t["fid"])):
        cells = [
            str(trial["number"]),
            *(f"{trial[n]:.3f}" if isinstance(trial[n], float) else str(trial[n]) for n in names),
            f"{trial['fid']:.3f}",
            " ".join(f"{w:.3g}" for w in trial["weights"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
