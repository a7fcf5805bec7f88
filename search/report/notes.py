"""What the dashboard says beside the numbers: a note of each trial, one of each study.

Markdown. Every text that is not ours is escaped: whoever may write to the database could have
written it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from search.report.markdown import escaped, fenced, markdown_table
from search.report.overview import Overview, PlannedOverview
from search.study.summary import headline, in_short, remarks, table_rows
from search.study.wording import counts_line, duration

# What a trial's seconds went to, by the names that its row has for them.
TIMINGS = {
    "student_seconds": "training",
    "evaluation_seconds": "evaluation",
    "looks_seconds": "looks",
    "service_seconds": "service",
}


def trial_note(
    title: str,
    value: float | None,
    attrs: Mapping[str, Any],
    pictures: Sequence[tuple[str, str]],
) -> str:
    """A finished trial's weights, FID and its conditions or why it was pruned, timings, pictures.

    Args:
        title: What it is.
        value: Its FID, None of one that is pruned.
        attrs: What its row stores.
        pictures: (file name, address) of each.
    """
    weights = attrs.get("weights", [])
    lines = [f"## {escaped(title)}"]
    if value is not None:
        lines.append(f"**FID {value:.4f}** {escaped(conditions(attrs['fid']))}")
    elif "reason" in attrs:
        at = f" at {attrs['pruned_at']:g} of its budget" if "pruned_at" in attrs else ""
        lines.append(f"**Pruned{at}**: {escaped(str(attrs['reason']))}")
    if weights:
        header = [f"w_{k}" for k in range(1, len(weights) + 1)]
        lines.append(markdown_table([header, [f"{w:.4g}" for w in weights]]))
    lines.append(escaped(_origin(attrs)))
    if "fids" in attrs:
        rows = [("steps", "FID")]
        rows += [(steps, f"{fid['value']:.3f}") for steps, fid in attrs["fids"].items()]
        lines.append(markdown_table(rows))
    lines.append(escaped(timings_text(attrs.get("timings", {}))))
    lines += [f"{escaped(name)}:\n\n![]({address})" for name, address in pictures]
    return "\n\n".join(line for line in lines if line) + "\n"


def study_note(overview: Overview, pictures: Sequence[tuple[str, str]]) -> str:
    """A search: best and its confidence, baselines, counts, spec.

    Args:
        overview: Of the study.
        pictures: (title, address) of the grids of baselines and the best.
    """
    now = overview.now
    lines = [f"# {escaped(now.study)}"]
    if now.best is not None:
        lines.append(
            f"**Best: FID {now.best['fid']:.3f}**, trial {now.best['number']}, "
            f"{escaped(in_short(now.best))}; {escaped(overview.confidence())}."
        )
    lines.append(f"{escaped(headline(now))}.")
    if len(rows := table_rows(now)) > 1:
        lines.append(markdown_table(rows))
    if overview.verdict is not None:
        lines += ["Under fresh seeds:", markdown_table(overview.verdict.comparison.rows())]
    lines += [escaped(line) for line in remarks(now)]
    if overview.importance_remark and overview.trials:
        lines.append(escaped(overview.importance_remark))
    if pictures:
        header = [escaped(title) for title, _ in pictures]
        cells = [f"![]({address})" for _, address in pictures]
        lines.append("The first 64 images of each, from the same latents:")
        lines.append("\n".join(_row(r) for r in (header, ["---"] * len(header), cells)))
    return _ended(lines, overview)


def planned_note(overview: PlannedOverview) -> str:
    """Planned rows: what they are of, arms, spec."""
    planned = overview.planned
    lines = [
        f"# {escaped(planned.name)}",
        f"{escaped(counts_line(planned.ledger.counts(), 'rows'))}.",
    ]
    if planned.facts:
        told = ", ".join(f"{key}: {value}" for key, value in planned.facts.items())
        lines.append(escaped(told))
    for title, rows in overview.tables:
        lines += [f"**{escaped(title)}**" if title else "", markdown_table(rows)]
    lines += [escaped(line) for line in overview.conditions]
    return _ended(lines, overview)


def _ended(lines: list[str], overview: Overview | PlannedOverview) -> str:
    """What every study's note ends with."""
    if overview.failures:
        lines += ["**Failures**", "\n".join(f"- {escaped(line)}" for line in overview.failures)]
    if overview.changes:
        lines += [
            "**Changes**",
            "\n".join(f"- {escaped(t)}" for t in changes_text(overview.changes)),
        ]
    lines += [
        f"**Spec**, fingerprint {escaped(overview.fingerprint)}",
        fenced(overview.spec, "yaml"),
        f"Written by the launcher at {overview.written}.",
    ]
    return "\n\n".join(line for line in lines if line) + "\n"


def conditions(fid: Mapping[str, Any]) -> str:
    """Under which a FID was measured; no FID is shown without them."""
    seeds = ", ".join(f"{what} {seed}" for what, seed in fid["seeds"].items())
    return (
        f"of {fid['images']} images at NFE {fid['nfe']}, features of {fid['extractor']} "
        f"({fid['extractor_sha256'][:8]}), against {fid['reference_images']} of "
        f"{fid['reference']}, seeds: {seeds}"
    )


def timings_text(timings: Mapping[str, float]) -> str:
    """What a trial's time went to."""
    return ", ".join(
        f"{what} {_spent(float(timings[name]))}"
        for name, what in TIMINGS.items()
        if name in timings
    )


def _spent(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else duration(seconds)


def changes_text(changes: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each setting that was changed."""
    return [f"{c['time']}: {c['key']} from {c['old']} to {c['new']}" for c in changes]


def _origin(attrs: Mapping[str, Any]) -> str:
    """Where its weights come from."""
    if "rule" in attrs:
        return f"learned by {attrs['rule']}, strength {attrs['strength']:.4f}"
    if "a" in attrs:
        return f"log w_k = a k + b with a = {attrs['a']:.5f}, b = {attrs['b']:.5f}"
    return ""


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
