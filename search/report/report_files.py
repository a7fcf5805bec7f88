"""A study's result as files to show: report.html, whole in itself, report.md, and their pictures.

Reads the storage and the rows' folders; writes nothing but the folder it is given.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from bdense.errors import InputError
from bdense.files import atomic_write
from search.analysis.comparison import Comparison, table_rows
from search.analysis.confirmation import Verdict
from search.report.markdown import escaped, fenced, markdown_table
from search.report.notes import TIMINGS, changes_text, conditions
from search.report.overview import Overview, overview_of
from search.report.plots import Plot
from search.report.report_html import (
    Picture,
    Section,
    bullets,
    figures,
    folded,
    highlighted,
    page,
    paragraph,
    preformatted,
    rows_table,
)
from search.storage.ledger import Ledger
from search.study.folders import GRID, WEIGHTS_PLOT, pictures, row_folder
from search.study.study import Study
from search.study.summary import Measured
from search.study.wording import align, weights_text

PAGE, HTML_PAGE = "report.md", "report.html"
SAME_LATENTS = "The first 64 images of each student, from the same latents."


def write_report(study: Study, folder: Path) -> Path:
    """Write the two pages, a picture of each plot and a grid of samples of the students shown.

    Args:
        study: With at least one complete row.
        folder: Made where it is not there; files of the same names are replaced.

    Returns:
        The page of Markdown; ``report.html`` lies beside it.

    Raises:
        InputError: No row is complete.
    """
    overview = overview_of(study)
    if overview.is_empty:
        raise InputError(
            f"{overview.headline()}: there is nothing to report yet; run bdense-search launch "
            "first"
        )
    plots, grids = _draw(overview.plots(), folder), _copy_grids(overview, folder)
    trials = trial_rows(overview.trials) if overview.trials else []
    facts = ", ".join(f"{key}: {value}" for key, value in study.facts.items())
    _write(
        folder / PAGE,
        f"# {escaped(study.name)}",
        f"{escaped(overview.headline())}.",
        escaped(facts),
        fenced("\n".join([*align(overview.table()), *overview.remarks()])),
        *_in_markdown(plots),
        markdown_table(trials) if trials else "",
        SAME_LATENTS if grids else "",
        *_in_markdown(grids),
    )
    html = page(
        study.name,
        [paragraph(f"{overview.headline()}.", "lead"), paragraph(facts), *_best(overview)],
        [
            Section(
                title="Result",
                parts=[
                    rows_table(overview.table(), left=overview.now is not None),
                    *(paragraph(line, "quiet") for line in overview.remarks()),
                    *(_under_fresh_seeds(overview.verdict) if overview.verdict else []),
                ],
            ),
            Section(title="Plots", parts=[figures(plots, "plots")]),
            Section(title="Samples", parts=[figures(grids, "grids")] if grids else []),
            Section(title="Trials", parts=[rows_table(trials)] if trials else []),
            Section(title="Failures", parts=[bullets(overview.failures)]),
            Section(title="Changes", parts=[bullets(changes_text(overview.changes))]),
            Section(
                title="Spec",
                parts=[folded(f"fingerprint {overview.fingerprint}", preformatted(overview.spec))],
            ),
        ],
        overview.written,
    )
    _write(folder / HTML_PAGE, html)
    return folder / PAGE


def _best(overview: Overview) -> list[str]:
    """A search's best trial, in large letters."""
    if overview.now is None or overview.now.best is None:
        return []
    best = overview.now.best
    assert best.result.fid is not None
    return [
        highlighted(
            f"FID {best.fid:.3f}",
            [
                f"trial {best.number}, {best.label}: w_1 .. w_K = "
                f"{weights_text(best.result.weights)}",
                conditions(best.result.fid),
                f"{overview.confidence()}.",
            ],
        )
    ]


def trial_rows(trials: Sequence[Measured]) -> list[tuple[str, ...]]:
    """A header and every complete trial as cells, the best first."""
    names = list(trials[0].parameters)
    timed = [name for name in TIMINGS if any(name in each.result.timings for each in trials)]
    titles = [f"{TIMINGS[name]}, s" for name in timed]
    rows: list[tuple[str, ...]] = [("trial", *names, "FID", *titles, "w_1 .. w_K")]
    for trial in sorted(trials, key=lambda each: each.fid):
        where = (trial.parameters[name] for name in names)
        seconds = (trial.result.timings.get(name) for name in timed)
        rows.append(
            (
                str(trial.number),
                *(f"{each:.3f}" if isinstance(each, float) else str(each) for each in where),
                f"{trial.fid:.3f}",
                *("-" if each is None else f"{each:.1f}" for each in seconds),
                weights_text(trial.result.weights),
            )
        )
    return rows


def _under_fresh_seeds(found: Verdict) -> list[str]:
    return [
        paragraph(f"Under fresh seeds, at {found.budget}:"),
        rows_table(table_rows([found.comparison]), left=False),
        paragraph(found.comparison.conditions_line(), "quiet"),
    ]


def _draw(plots: Sequence[Plot], folder: Path) -> list[Picture]:
    """Each plot as a picture in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for plot in plots:
        path = folder / f"{plot.key}.png"
        plot.save(path)
        drawn.append(Picture(path=path, caption="", alt=plot.title))
    return drawn


def _copy_grids(overview: Overview, folder: Path) -> list[Picture]:
    """Sample grids that are still there: of a search its baselines and best, else of each arm."""
    if overview.now is None:
        return _copy_arms(overview.study, overview.comparisons[-1], folder)
    study, now = overview.study, overview.now
    best = now.best
    assert best is not None
    sources = [
        (each.label, study.given, each.number, name) for name, each in now.baselines.items()
    ]
    sources.append((f"best: trial {best.number}", study.trials, best.number, "best"))
    found = []
    for title, ledger, number, name in sources:
        grid = _grid(ledger, number)
        if grid is not None:
            found.append(_copy(grid, folder / f"samples-{name}.png", title))
    weights = row_folder(study.name, best.number) / WEIGHTS_PLOT
    if weights.is_file():
        title = f"weights of trial {best.number} over its training"
        found.append(_copy(weights, folder / "weights-best.png", title))
    return found


def _copy_arms(study: Study, comparison: Comparison, folder: Path) -> list[Picture]:
    """Each arm's grid under the first seed, where it is still there."""
    found = []
    for index, result in enumerate(comparison.results):
        seed = min(result.rows)
        grid = _grid(study.given, result.rows[seed])
        if grid is not None:
            title = f"{result.arm.name}, seed {seed}"
            found.append(_copy(grid, folder / f"samples-{index}.png", title))
    return found


def _grid(ledger: Ledger | None, number: int) -> Path | None:
    """A row's grid, of several stages the last one's."""
    assert ledger is not None
    found = pictures(row_folder(ledger.study.study_name, number))
    return next((path for path in found if path.name.endswith(GRID)), None)


def _copy(source: Path, to: Path, title: str) -> Picture:
    with atomic_write(to) as scratch:
        shutil.copyfile(source, scratch)
    return Picture(path=to, caption=title, alt=title)


def _in_markdown(shown: Sequence[Picture]) -> list[str]:
    """Below each other, with their captions."""
    lines = []
    for each in shown:
        lines.append(f"![{escaped(each.alt)}]({each.path.name})")
        if each.caption:
            lines.append(escaped(each.caption))
    return lines


def _write(path: Path, *parts: str) -> None:
    with atomic_write(path) as scratch:
        scratch.write_text("\n\n".join(part for part in parts if part) + "\n")
