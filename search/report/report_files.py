"""A study's report: report.html, which needs no other file, report.md, and their pictures.

Reads the storage and the rows' folders, and writes only to the folder it is given.
"""

import functools
import shutil
from collections.abc import Sequence
from pathlib import Path

from bdense.errors import InputError
from bdense.files import atomic_write, require_output
from search.report.document import Picture, as_html, as_markdown, generator
from search.report.overview import Overview, overview_of
from search.report.pages import study_page
from search.report.plots import study_plots
from search.study.folders import GRID, LOSS_PLOT, WEIGHTS_PLOT, pictures, row_folder
from search.study.study import Study
from search.study.summary import Measured, cell, headline
from search.study.wording import TIMINGS, weights_text

PAGE, HTML_PAGE = "report.md", "report.html"
_SAMPLES = "samples-"


def write_report(study: Study, folder: Path, *, force: bool = False) -> Path:
    """Write both pages, a picture of each plot and the sample grids that are still there.

    Args:
        study: With at least one complete row.
        folder: Made where it is missing; an earlier report of the study is replaced.
        force: Replace other files of the same names too.

    Returns:
        The page of Markdown; ``report.html`` lies beside it.

    Raises:
        InputError: No row is complete, or the folder cannot be written or has other files of the
            same names.
    """
    overview = overview_of(study)
    if overview.is_empty:
        raise InputError(
            f"{headline(study)}: there is nothing to report yet; run bdense-search launch first"
        )
    shown = study_plots(overview)
    names = [PAGE, HTML_PAGE, *(f"{plot.key}.png" for plot in shown)]
    other = functools.partial(_other_files, study.name, names)
    require_output(folder, problem=other, force=force, folder=True)
    plots = []
    for plot in shown:
        plots.append(Picture(plot.title, f"{plot.key}.png"))
        plot.save(folder / plots[-1].address)
    copied = _copy_pictures(overview, folder)
    grids = [each for each in copied if each.address.startswith(_SAMPLES)]
    plots += [each for each in copied if each not in grids]
    page = study_page(overview, grids, plots, _trial_rows(overview.trials))
    for name, text in (
        (PAGE, as_markdown(study.name, page)),
        (HTML_PAGE, as_html(study.name, page, folder)),
    ):
        with atomic_write(folder / name) as scratch:
            scratch.write_text(text)
    return folder / PAGE


def _other_files(study: str, names: Sequence[str], folder: Path) -> str:
    """Which file of another report or study is in the way; "" if there is none."""
    there = [name for name in names if (folder / name).exists()]
    there += sorted(path.name for path in folder.glob(f"{_SAMPLES}*.png"))
    page = folder / HTML_PAGE
    ours = page.is_file() and generator(study).encode() in page.read_bytes()
    return f"has a {there[0]} that is not of this study's report" if there and not ours else ""


def _trial_rows(trials: Sequence[Measured]) -> list[tuple[str, ...]]:
    """A header and every complete trial as cells, the best first; [] without trials."""
    if not trials:
        return []
    names = list(trials[0].parameters)
    timed = [name for name in TIMINGS if any(name in each.result.timings for each in trials)]
    titles = [f"{TIMINGS[name]}, s" for name in timed]
    metric, has_weights = trials[0].metric, any(each.result.weights for each in trials)
    last = ("w_1 .. w_K",) if has_weights else ()
    rows: list[tuple[str, ...]] = [("trial", *names, metric.name, *titles, *last)]
    for trial in sorted(trials, key=lambda each: metric.loss(each.value)):
        seconds = (trial.result.timings.get(name) for name in timed)
        rows.append(
            (
                str(trial.number),
                *(cell(trial.parameters[name]) for name in names),
                metric.text(trial.value),
                *("-" if each is None else f"{each:.1f}" for each in seconds),
                *((weights_text(trial.result.weights),) if last else ()),
            )
        )
    return rows


def _copy_pictures(overview: Overview, folder: Path) -> list[Picture]:
    """Copy the sample grids that exist, and the best trial's losses and learned weights."""
    sources = []
    for title, ledger, number, name in overview.shown():
        its = row_folder(ledger.name, number)
        # Of several stages the last one's.
        grid = next((path for path in pictures(its) if path.name.endswith(GRID)), None)
        sources.append((title, grid, f"{_SAMPLES}{name}.png"))
        if name == "best":
            over_time = f"weights of trial {number} over its training"
            sources.append((f"loss of trial {number}", its / LOSS_PLOT, "loss-best.png"))
            sources.append((over_time, its / WEIGHTS_PLOT, "weights-best.png"))
    found = []
    for title, source, copy in sources:
        if source is not None and source.is_file():
            with atomic_write(folder / copy) as scratch:
                shutil.copyfile(source, scratch)
            found.append(Picture(title, copy))
    return found
