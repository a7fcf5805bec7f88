"""A study as a page, for the dashboard's note and for both files of a report."""

from collections.abc import Sequence
from datetime import UTC, datetime

from search.analysis.comparison import comparison_rows
from search.report.document import (
    Best,
    Block,
    Bullets,
    Code,
    Picture,
    Pictures,
    Section,
    Table,
    Text,
)
from search.report.overview import Overview
from search.spec.file import as_yaml
from search.storage.own_study import CHANGES
from search.study.curve import curve_line, curve_rows
from search.study.provenance import provenance_of
from search.study.results import sample_command
from search.study.study import FINGERPRINT
from search.study.summary import failures, headline
from search.study.wording import weights_text


def study_page(
    overview: Overview,
    grids: Sequence[Picture],
    plots: Sequence[Picture] = (),
    trials: Sequence[Sequence[str]] = (),
) -> list[Block]:
    """A study: its result and how far to trust it, pictures, failures, changes, spec.

    ``trials`` are the cells of a table of all trials.
    """
    found = overview.verdict
    result: list[Block] = [Table(overview.table(), words=overview.now is not None)]
    use = overview.recommended
    shown = () if use is None else (use.text(),)
    result += [Text(each, quiet=True) for each in overview.remarks() if each not in shown]
    if overview.now is not None and overview.comparisons:
        result += [
            Text("Replicated points, under the baselines' seeds:"),
            Table(comparison_rows(overview.comparisons), words=False),
        ]
    if found is not None:
        result += [
            Text(f"Under fresh seeds, at {found.budget}:"),
            Table(comparison_rows([found.comparison]), words=False),
            Text(found.comparison.conditions_line(), quiet=True),
        ]
    study, written = overview.study, datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    stored = study.main.attribute(CHANGES) or []
    changes = ["{time}: {key} from {old} to {new}".format(**change) for change in stored]
    fingerprint = study.main.attribute(FINGERPRINT) or ""
    return [
        Text(f"{headline(study)}."),
        Text("" if study.of is None else f"of: {study.of}"),
        *_best(overview),
        Section("Result", result),
        *_curve(overview),
        Section("Plots", [Pictures(plots, "plots")]),
        Section(
            "Samples, from the same latents",
            [Text(overview.legend if grids else "", quiet=True), Pictures(grids, "grids")],
        ),
        Section("Trials", [Table(trials)]),
        Section("Failures", [Bullets(failures(study))]),
        Section("Provenance", [Bullets(provenance_of(study))]),
        Section("Changes", [Bullets(changes)]),
        Section("Spec", [Text(f"fingerprint {fingerprint}"), Code(as_yaml(study.spec))]),
        Text(f"Written by bdense-search, {written}.", quiet=True),
    ]


def _best(overview: Overview) -> list[Block]:
    """A search's recommended arm, and its best trial."""
    found: list[Block] = []
    if (use := overview.recommended) is not None:
        head, _, why = use.text().partition("; ")
        found.append(Best(head[0].upper() + head[1:], [why]))
    if overview.now is None or (best := overview.now.best) is None:
        return found
    figure, weights = best.result.figure, weights_text(best.result.weights)
    assert figure is not None
    title = f"trial {best.number}, {best.label}" + (f": w_1 .. w_K = {weights}" if weights else "")
    lines = [title, figure.in_full(), overview.confidence()]
    value = f"{best.metric.best.capitalize()} of the trials: {figure.metric} "
    found.append(Best(value + best.metric.text(best.value), lines))
    if command := sample_command(best.result):
        found.append(Code(command, "sh"))
    return found


def _curve(overview: Overview) -> list[Block]:
    """What a search's one-shot training found."""
    if overview.curve is None:
        return []
    shown: list[Block] = [
        Text(curve_line(overview.curve)),
        Table(curve_rows(overview.curve), words=False),
        Text("s.e.: of the difference from the lowest, over the latents of both.", quiet=True),
    ]
    return [Section("One-shot curve", shown)]
