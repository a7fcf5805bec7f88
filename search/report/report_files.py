"""A study's result as files to show: report.html, whole in itself, report.md, and their pictures.

Reads the storage and the trials' folders; writes nothing but the folder it is given.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bdense.errors import InputError
from bdense.files import atomic_write
from search.analysis.comparison import Comparison
from search.analysis.confirmation import Verdict
from search.report.charts import Chart
from search.report.markdown import escaped, fenced, markdown_table
from search.report.notes import TIMINGS, changes_text, conditions
from search.report.overview import Overview, PlannedOverview, overview_of, planned_overview_of
from search.report.render import save_png
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
from search.study.arms import Planned
from search.study.folders import GRID, WEIGHTS_PLOT, pictures, row_folder
from search.study.study import Study, baselines_name
from search.study.summary import TITLES, headline, in_short, remarks, table, table_rows
from search.study.wording import align, weights_text

PAGE, HTML_PAGE = "report.md", "report.html"
SAME_LATENTS = "The first 64 images of each student, from the same latents."


def write_report(study: Study, folder: Path) -> Path:
    """Write the two pages, a picture of each plot and a grid of samples of the students shown.

    Args:
        study: With at least one complete trial.
        folder: Made where it is not there; files of the same names are replaced.

    Returns:
        The page of Markdown; ``report.html`` lies beside it.

    Raises:
        InputError: No trial is complete.
    """
    overview = overview_of(study)
    now = overview.now
    if now.best is None or not overview.trials:
        raise InputError(
            f"{headline(now)}: there is nothing to report yet; run bdense-search launch first"
        )
    plots, grids = _draw(overview.charts(), folder), _copy_grids(overview, folder)
    rows = trial_rows(overview.trials)
    _write(
        folder / PAGE,
        f"# {escaped(now.study)}",
        f"{escaped(headline(now))}.",
        fenced(table(now)),
        *_in_markdown(plots),
        markdown_table(rows),
        SAME_LATENTS,
        *_in_markdown(grids),
    )
    html = page(
        now.study,
        [
            paragraph(f"{headline(now)}.", "lead"),
            highlighted(
                f"FID {now.best['fid']:.3f}",
                [
                    f"trial {now.best['number']}, {in_short(now.best)}: "
                    f"w_1 .. w_K = {weights_text(now.best['weights'])}",
                    conditions(now.best),
                    f"{overview.confidence()}.",
                ],
            ),
        ],
        [
            Section(
                title="Result",
                parts=[
                    rows_table(table_rows(now)),
                    *(paragraph(line, "quiet") for line in remarks(now)),
                    *(_under_fresh_seeds(overview.verdict) if overview.verdict else []),
                ],
            ),
            Section(
                title="Plots",
                parts=[figures(plots, "plots"), paragraph(overview.importance_remark, "quiet")],
            ),
            Section(title="Samples", parts=[figures(grids, "grids")] if grids else []),
            Section(title="Trials", parts=[rows_table(rows)]),
            *_last_sections(overview),
        ],
        overview.written,
    )
    _write(folder / HTML_PAGE, html)
    return folder / PAGE


def write_planned_report(planned: Planned, folder: Path) -> Path:
    """The same of planned rows: a grid of each arm, and plots of their FIDs.

    Raises:
        InputError: No row is complete.
    """
    overview = planned_overview_of(planned)
    if not overview.comparison.results:
        raise InputError(f"{planned.headline()}: there is nothing to report yet")
    plots = _draw(overview.charts(), folder)
    grids = _copy_arms(planned, overview.comparison, folder)
    about = "The first 64 images of each arm's last student, from the same latents."
    table_text = "\n\n".join(
        "\n".join([*([title] if title else []), *align(rows)]) for title, rows in overview.tables
    )
    _write(
        folder / PAGE,
        f"# {escaped(planned.name)}",
        f"{escaped(planned.headline())}.",
        fenced("\n".join([table_text, *overview.conditions])),
        *_in_markdown(plots),
        about,
        *_in_markdown(grids),
    )
    facts = ", ".join(f"{key}: {value}" for key, value in planned.facts.items())
    tables = [paragraph(title) + rows_table(rows, left=False) for title, rows in overview.tables]
    html = page(
        planned.name,
        [paragraph(f"{planned.headline()}.", "lead"), paragraph(facts)],
        [
            Section(title="Plots", parts=[figures(plots, "plots")]),
            Section(
                title="Result",
                parts=[*tables, *(paragraph(line, "quiet") for line in overview.conditions)],
            ),
            Section(
                title="Samples",
                parts=[paragraph(about), figures(grids, "grids")] if grids else [],
            ),
            *_last_sections(overview),
        ],
        overview.written,
    )
    _write(folder / HTML_PAGE, html)
    return folder / PAGE


def trial_rows(trials: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A header and every complete trial as cells, the best first."""
    names = ("rule", "strength") if "rule" in trials[0] else ("a", "b")
    timed = [name for name in TIMINGS if any(name in trial["timings"] for trial in trials)]
    titles = [f"{TIMINGS[name]}, s" for name in timed]
    rows: list[tuple[str, ...]] = [("trial", *names, "FID", *titles, "w_1 .. w_K")]
    for trial in sorted(trials, key=lambda t: float(t["fid"])):
        where = (trial[name] for name in names)
        seconds = (trial["timings"].get(name) for name in timed)
        rows.append(
            (
                str(trial["number"]),
                *(f"{each:.3f}" if isinstance(each, float) else str(each) for each in where),
                f"{trial['fid']:.3f}",
                *("-" if each is None else f"{each:.1f}" for each in seconds),
                weights_text(trial["weights"]),
            )
        )
    return rows


def _under_fresh_seeds(found: Verdict) -> list[str]:
    return [
        paragraph(f"Under fresh seeds, at {found.kimg:g} kimg:"),
        rows_table(found.comparison.rows(), left=False),
        paragraph(found.comparison.conditions_line(), "quiet"),
    ]


def _last_sections(overview: Overview | PlannedOverview) -> list[Section]:
    """What every report ends with."""
    spec = preformatted(overview.spec)
    return [
        Section(title="Failures", parts=[bullets(overview.failures)]),
        Section(title="Changes", parts=[bullets(changes_text(overview.changes))]),
        Section(
            title="Spec",
            parts=[folded(f"fingerprint {overview.fingerprint}", spec)] if spec else [],
        ),
    ]


def _draw(charts: Sequence[Chart], folder: Path) -> list[Picture]:
    """Each plot as a picture in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for chart in charts:
        path = folder / f"{chart.key}.png"
        save_png(chart, path)
        drawn.append(Picture(path=path, caption=chart.remark, alt=chart.title))
    return drawn


def _copy_grids(overview: Overview, folder: Path) -> list[Picture]:
    """The sample grids of baselines and best that are still there."""
    now = overview.now
    assert now.best is not None
    best = now.best["number"]
    sources = [
        (TITLES[method], row_folder(baselines_name(now.study), result["number"]), method)
        for method, result in now.baselines.items()
    ]
    sources.append((f"best: trial {best}", row_folder(now.study, best), "best"))
    found = [
        _copy(source / GRID, folder / f"samples-{name}.png", title)
        for title, source, name in sources
        if (source / GRID).is_file()
    ]
    weights = row_folder(now.study, best) / WEIGHTS_PLOT
    if weights.is_file():
        title = f"weights of trial {best} over its training"
        found.append(_copy(weights, folder / "weights-best.png", title))
    return found


def _copy_arms(planned: Planned, comparison: Comparison, folder: Path) -> list[Picture]:
    """Each arm's grid under the first seed, where it is still there."""
    found = []
    for index, result in enumerate(comparison.results):
        seed = min(result.rows)
        grids = [
            path
            for path in pictures(row_folder(planned.name, result.rows[seed]))
            if path.name != WEIGHTS_PLOT
        ]
        if grids:
            title = f"{result.arm.name}, seed {seed}"
            found.append(_copy(grids[0], folder / f"samples-{index}.png", title))
    return found


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
