"""What the dashboard says beside the numbers: a note of each trial, one of each study.

Markdown. Every text that is not ours is escaped: anyone who may write to the database could have
written it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from search.analysis.comparison import table_rows
from search.report.markdown import escaped, fenced, markdown_table
from search.report.overview import Overview
from search.study.results import MeasuredFID, TrialResult
from search.study.wording import duration

# What a trial's seconds went to, by the names that its row has for them.
TIMINGS = {
    "student_seconds": "training",
    "evaluation_seconds": "evaluation",
    "intermediate_seconds": "intermediate evaluations",
    "service_seconds": "service",
}


def trial_note(title: str, result: TrialResult, pictures: Sequence[tuple[str, str]]) -> str:
    """A finished row's weights, FID and its conditions or why it was pruned, timings, pictures.

    Args:
        title: What it is.
        result: What it came to.
        pictures: (file name, address) of each.
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
    lines.append(escaped(_origin(result.parameters)))
    if result.fids:
        rows = [("NFE", "FID"), *((nfe, f"{fid.value:.3f}") for nfe, fid in result.fids.items())]
        lines.append(markdown_table(rows))
    lines.append(escaped(timings_text(result.timings)))
    lines += [f"{escaped(name)}:\n\n![]({address})" for name, address in pictures]
    return "\n\n".join(line for line in lines if line) + "\n"


def study_note(overview: Overview, pictures: Sequence[tuple[str, str]]) -> str:
    """A study: its result and how much it is to be trusted, counts, spec.

    Args:
        overview: Of the study.
        pictures: (title, address) of sample grids.
    """
    now = overview.now
    lines = [f"# {escaped(overview.study.name)}"]
    if now is not None and now.best is not None:
        lines.append(
            f"**Best: FID {now.best.fid:.3f}**, trial {now.best.number}, "
            f"{escaped(now.best.label)}; {escaped(overview.confidence())}."
        )
    lines.append(f"{escaped(overview.headline())}.")
    if facts := overview.study.facts:
        lines.append(escaped(", ".join(f"{key}: {value}" for key, value in facts.items())))
    if len(rows := overview.table()) > 1:
        lines.append(markdown_table(rows))
    if overview.verdict is not None:
        lines += ["Under fresh seeds:", markdown_table(table_rows([overview.verdict.comparison]))]
    lines += [escaped(line) for line in overview.remarks()]
    if pictures:
        header = [escaped(title) for title, _ in pictures]
        cells = [f"![]({address})" for _, address in pictures]
        lines.append("The first 64 images of each, from the same latents:")
        lines.append("\n".join(_row(r) for r in (header, ["---"] * len(header), cells)))
    if overview.failures:
        lines += ["**Failures**", "\n".join(f"- {escaped(line)}" for line in overview.failures)]
    if overview.changes:
        changed = changes_text(overview.changes)
        lines += ["**Changes**", "\n".join(f"- {escaped(text)}" for text in changed)]
    lines += [
        f"**Spec**, fingerprint {escaped(overview.fingerprint)}",
        fenced(overview.spec, "yaml"),
        f"Written by the launcher at {overview.written}.",
    ]
    return "\n\n".join(line for line in lines if line) + "\n"


def conditions(fid: MeasuredFID) -> str:
    """Under which a FID was measured; no FID is shown without them."""
    seeds = ", ".join(f"{what} {seed}" for what, seed in fid.seeds.items())
    return (
        f"of {fid.images} images at NFE {fid.nfe}, features of {fid.extractor} "
        f"({fid.extractor_sha256[:8]}), against {fid.reference_images} of {fid.reference}, "
        f"seeds: {seeds}"
    )


def timings_text(timings: Mapping[str, float]) -> str:
    """What a trial's time went to."""
    return ", ".join(
        f"{what} {_spent(float(timings[name]))}"
        for name, what in TIMINGS.items()
        if name in timings
    )


def changes_text(changes: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each setting that was changed."""
    return [f"{c['time']}: {c['key']} from {c['old']} to {c['new']}" for c in changes]


def _spent(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else duration(seconds)


def _origin(parameters: Mapping[str, Any]) -> str:
    """Where the weights come from."""
    if "rule" in parameters:
        return f"learned by {parameters['rule']}, strength {parameters['strength']:.4f}"
    if "a" in parameters:
        a, b = parameters["a"], parameters["b"]
        return f"log w_k = a k + b with a = {a:.5f}, b = {b:.5f}"
    return ", ".join(f"{name} {value}" for name, value in parameters.items())


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
