"""A study as a page, for the dashboard's note and for both files of a report."""

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from optuna.trial import TrialState

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
from search.storage.engine import retrying
from search.storage.own_study import CHANGES
from search.storage.studies import read_studies
from search.study.curve import curve_line, curve_rows
from search.study.results import sample_command
from search.study.study import FINGERPRINT, Study
from search.study.summary import failures, headline
from search.study.wording import TIMINGS, timings_text, weights_text

# What the provenance reads of a row, and the packages that it names.
_KEYS = ("device", "worker", "versions", "timings")
_SHOWN = ("bdense", "torch", "python")


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
        Section("Provenance", [Bullets(_provenance(study))]),
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


def _provenance(study: Study) -> list[str]:
    """Lines about the rows that have a result, baselines included; none before there is one."""
    rows = [
        row.user_attrs
        for ledger in study.ledgers
        for state in (TrialState.COMPLETE, TrialState.PRUNED)
        for row in ledger.rows(_KEYS, state=state)
        if "worker" in row.user_attrs
    ]
    if not rows:
        return []
    engine, names = study.main.storage.engine, [each.name for each in study.ledgers]
    found = [each for each in retrying(lambda: read_studies(engine)) if each.name in names]
    begun = min(each.started for each in found if each.started is not None)
    ended = max((each.ended for each in found if each.ended is not None), default=begun)
    spent: Counter[str] = Counter()
    for row in rows:
        spent.update({key: row.get("timings", {}).get(key, 0.0) for key in TIMINGS})
    hosts = _listed(str(row["worker"]).rpartition(":")[0] for row in rows)
    versions = [
        f"{name} {_listed(row.get('versions', {}).get(name, '') for row in rows)}"
        for name in _SHOWN
    ]
    cost = timings_text({key: seconds for key, seconds in spent.items() if seconds})
    return [
        f"from {begun:%Y-%m-%d %H:%M} to {ended:%Y-%m-%d %H:%M} UTC",
        f"on {hosts}: {_listed(str(row.get('device', '')) for row in rows)}",
        f"by {'; '.join(versions)}",
        f"cost of {len(rows)} rows, all workers together: {cost or 'not measured'}",
    ]


def _listed(values: Iterable[str]) -> str:
    """The different values in their order."""
    return ", ".join(filter(None, dict.fromkeys(values)))
