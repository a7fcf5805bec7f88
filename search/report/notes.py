"""Markdown about a study: the dashboard's notes of each trial and of the study, and ``report.md``.

Every text from the database is escaped: anyone with write access may have chosen it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from bdense.weights import space_of
from search.analysis.comparison import table_rows
from search.report.markdown import escaped, fenced, markdown_table
from search.report.overview import Overview
from search.study.results import MeasuredFID, TrialResult
from search.study.wording import duration

# What a trial's seconds were spent on, by their names in its row.
TIMINGS = {
    "student_seconds": "training",
    "evaluation_seconds": "evaluation",
    "intermediate_seconds": "intermediate evaluations",
    "service_seconds": "service",
}


def trial_note(title: str, result: TrialResult, pictures: Sequence[tuple[str, str]]) -> str:
    """A finished row: weights, FID and its conditions or why it was pruned, timings, pictures.

    ``pictures`` are pairs of file name and address.
    """
    lines = [f"## {escaped(title)}"]
    if result.value is not None and result.fid is not None:
        lines.append(f"**FID {result.value:.4f}** {escaped(conditions(result.fid))}")
    elif result.reason is not None:
        at = f" at {result.pruned_at:g} of its budget" if result.pruned_at is not None else ""
        lines.append(f"**Pruned{at}**: {escaped(result.reason)}")
    if result.weights:
        header = [f"w_{k}" for k in range(1, len(result.weights) + 1)]
        lines.append(markdown_table([header, [f"{w:.4g}" for w in result.weights]]))
    if result.parameters:
        lines.append(escaped(space_of(result.parameters).label(result.parameters)))
    if result.fids:
        rows = [("NFE", "FID"), *((nfe, f"{fid.value:.3f}") for nfe, fid in result.fids.items())]
        lines.append(markdown_table(rows))
    lines.append(escaped(timings_text(result.timings)))
    lines += [f"{escaped(name)}:\n\n![]({address})" for name, address in pictures]
    return _paragraphs(lines)


def study_note(
    overview: Overview,
    grids: Sequence[tuple[str, str]],
    *,
    plots: Sequence[tuple[str, str]] = (),
    trials: Sequence[Sequence[str]] = (),
) -> str:
    """A study: its result and how far to trust it, pictures, failures, changes, spec.

    Args:
        overview: Of the study.
        grids: Title and address of sample grids.
        plots: The same of plots.
        trials: Cells of a table of all trials.
    """
    now = overview.now
    lines = [f"# {escaped(overview.study.name)}"]
    if now is not None and now.best is not None:
        lines.append(
            f"**Best: FID {now.best.fid:.3f}**, trial {now.best.number}, "
            f"{escaped(now.best.label)}; {escaped(overview.confidence())}."
        )
    lines.append(f"{escaped(overview.headline())}.")
    lines.append(escaped(overview.facts()))
    if len(rows := overview.table()) > 1:
        lines.append(markdown_table(rows))
    if overview.verdict is not None:
        lines += ["Under fresh seeds:", markdown_table(table_rows([overview.verdict.comparison]))]
    lines += [escaped(line) for line in overview.remarks()]
    lines += [f"![{escaped(title)}]({address})" for title, address in plots]
    if trials:
        lines.append(markdown_table(trials))
    if grids:
        header = [escaped(title) for title, _ in grids]
        cells = [f"![]({address})" for _, address in grids]
        table = "\n".join(f"| {' | '.join(r)} |" for r in (header, ["---"] * len(grids), cells))
        lines += ["The first 64 images of each, from the same latents:", table]
    for title, texts in (
        ("Failures", overview.failures),
        ("Changes", changes_text(overview.changes)),
    ):
        if texts:
            lines += [f"**{title}**", "\n".join(f"- {escaped(text)}" for text in texts)]
    lines += [
        f"**Spec**, fingerprint {escaped(overview.fingerprint)}",
        fenced(overview.spec, "yaml"),
        f"Written at {overview.written}.",
    ]
    return _paragraphs(lines)


def conditions(fid: MeasuredFID) -> str:
    """The conditions of a FID, which is never shown without them."""
    seeds = ", ".join(f"{what} {seed}" for what, seed in fid.seeds.items())
    return (
        f"of {fid.images} images at NFE {fid.nfe}, features of {fid.extractor} "
        f"({fid.extractor_sha256[:8]}), against {fid.reference_images} of {fid.reference}, "
        f"seeds: {seeds}"
    )


def timings_text(timings: Mapping[str, float]) -> str:
    """What a trial's time was spent on."""
    spent = {what: timings[name] for name, what in TIMINGS.items() if name in timings}
    return ", ".join(
        f"{what} {seconds:.1f} s" if seconds < 60 else f"{what} {duration(seconds)}"
        for what, seconds in spent.items()
    )


def changes_text(changes: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each setting that was changed."""
    return [f"{c['time']}: {c['key']} from {c['old']} to {c['new']}" for c in changes]


def _paragraphs(lines: Sequence[str]) -> str:
    return "\n\n".join(line for line in lines if line) + "\n"
