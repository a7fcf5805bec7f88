"""The state of a study: JSON for scripts and tables for people. Reads the storage alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from optuna.trial import TrialState

from bdense.weights.space import BASELINE
from search.redaction import redact
from search.spec.metric import Metric
from search.spec.study import StudySpec
from search.storage.ledger import Ledger
from search.storage.queries import Counts, StoredTrial
from search.storage.tables import SURPLUS
from search.study.arms import baseline_arms
from search.study.results import TrialResult
from search.study.study import BASELINE_RESULTS, Study
from search.study.wording import align, counts_line, weights_text

_FOREIGN_SHOWN = 5  # numbers of rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A complete row, with its weights or arm as ``label``.

    ``parameters`` are those sampled and those in the result; a given arm has none.
    """

    metric: Metric
    number: int
    label: str
    result: TrialResult
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """The study's metric of this row."""
        assert self.result.value is not None
        return self.result.value

    def as_dict(self) -> dict[str, Any]:
        """A trial as ``best --json`` prints it."""
        plot = self.result.weights_plot
        return {
            "number": self.number,
            **self.parameters,
            "weights": self.result.weights,
            **({} if plot is None else {"weights_plot": plot}),
            **self._figures(),
        }

    def baseline_dict(self) -> dict[str, Any]:
        """A baseline as ``best --json`` prints it."""
        return {**self._figures(), "weights": self.result.weights, "number": self.number}

    def differing(self, other: "Measured") -> list[str]:
        """Conditions that keep two figures from being compared."""
        figure: Any = other.result.figure  # of the same kind, in one study
        assert self.result.figure is not None
        return self.result.figure.differing(figure)

    def _figures(self) -> dict[str, Any]:
        result = self.result
        assert result.figure is not None
        others = {"kid": result.kid, "prc": result.prc, "clip_score": result.clip_score}
        measured = {name: each.as_dict() for name, each in others.items() if each is not None}
        return {self.metric.key: self.value, **result.figure.conditions(), **measured}


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One reading of a search.

    ``storage`` is a URL without password, ``best`` the complete trial of the best value, or if
    ``by_mean`` that of the best mean among those of the most seeds; ``baselines`` has each of
    ``StudySpec.baselines`` where measured, and ``confirmed`` is whether the best is the winner of
    a confirmation.
    """

    study: str
    storage: str
    spec: StudySpec
    counts: Counts
    best: Measured | None
    baselines: dict[str, Measured]
    confirmed: bool = False
    by_mean: bool = False

    @property
    def reference(self) -> Measured | None:
        """What others are compared with: plain distillation, or the defaults of a program."""
        return self.baselines.get(self.spec.baselines[0])


def summary_of(study: Study) -> Summary:
    """Read a search and its baselines."""
    spec, best = study.spec, study.search.best()
    return Summary(
        study=study.name,
        storage=redact(study.url),
        spec=spec,
        counts=study.search.counts(),
        best=None if best is None else measured(spec, best),
        baselines=baselines_of(study),
    )


def judged_by_mean(study: Study, now: Summary, number: int) -> Summary:
    """The summary with that replicated trial as its best."""
    trial = study.search.complete_row(number)
    return replace(now, best=measured(now.spec, trial), by_mean=True)


def measured(spec: StudySpec, trial: StoredTrial) -> Measured:
    """A complete trial of a search."""
    result = TrialResult.of(trial.value, trial.user_attrs)
    # memory is the whole study's.
    own = {name: value for name, value in result.parameters.items() if name != "memory"}
    return Measured(
        metric=spec.metric,
        number=trial.number,
        label=spec.space.label(trial.params),
        result=result,
        parameters=trial.params | own,
    )


def complete_trials(study: Study) -> list[Measured]:
    """The complete trials of a search, in order."""
    spec = study.spec
    return [measured(spec, trial) for trial in study.search.rows()]


def baselines_of(study: Study) -> dict[str, Measured]:
    """The complete baselines of a search by name, of the trials' own seed."""
    spec, found = study.spec, {}
    for arm, row, trial in study.complete_arms():
        is_own = row.seed == spec.seeds.training and not row.variant
        if arm.baseline is not None and is_own:
            found[arm.baseline] = Measured(
                metric=spec.metric,
                number=trial.number,
                label=arm.name,
                result=TrialResult.of(trial.value, trial.user_attrs),
            )
    return {name: found[name] for name in spec.baselines if name in found}


def counts_json(counts: Counts) -> dict[str, int]:
    """planned, complete, pruned, failed, running."""
    names = ("planned", "complete", "pruned", "failed", "running")
    return {name: getattr(counts, name) for name in names}


def best_json(now: Summary) -> dict[str, Any]:
    """What ``best --json`` prints; plain distillation under its method's name."""
    best = None
    if now.best is not None:
        own = {"confirmed": now.confirmed, "student": now.best.result.student}
        best = now.best.as_dict() | own
    return {
        "study": now.study,
        "storage": now.storage,
        "trials": counts_json(now.counts),
        "best": best,
        "baselines": {
            now.spec.baseline_key(name): each.baseline_dict()
            for name, each in now.baselines.items()
        },
    }


def copy_baselines(study: Study) -> None:
    """Store a search's baselines in its own attributes, where the dashboard shows them."""
    if not study.is_search:
        return
    found = {name: each.baseline_dict() for name, each in baselines_of(study).items()}
    if found and study.search.attribute(BASELINE_RESULTS) != found:
        study.search.store({BASELINE_RESULTS: found})


def table(now: Summary) -> str:
    """The search's result for people: baselines, the best trial, and remarks."""
    return "\n".join([*align(summary_rows(now)), *remarks(now)])


def summary_rows(now: Summary) -> list[tuple[str, ...]]:
    """A header, then baselines and the best trial, as cells."""
    space, reference, best = now.spec.space, now.reference, now.best
    names = tuple(space.distributions() if best is None else best.parameters)
    compared = f"vs {baseline_arms(now.spec)[0].name}"
    last = ("w_1 .. w_K",) if now.spec.workload.has_students else ()
    rows = [("", now.spec.metric.name, compared, *names, *last)]
    shown = [
        (each.label, each, space.shown({BASELINE: name})) for name, each in now.baselines.items()
    ]
    if best is not None:
        shown.append(
            (f"best of {now.counts.complete} (trial {best.number})", best, best.parameters)
        )
    for title, each, parameters in shown:
        cells = [cell(parameters.get(name)) for name in names]
        weights = "end point alone" if each is reference else weights_text(each.result.weights)
        own = (weights,) if last else ()
        rows.append(
            (title, now.spec.metric.text(each.value), _gain(each, reference), *cells, *own)
        )
    return rows


def cell(value: object) -> str:
    """A parameter in a table; ``-`` for one that a row does not have."""
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def remarks(now: Summary) -> list[str]:
    """How the table's figures are to be read."""
    lines, metric = [], now.spec.metric
    if now.best is not None and not now.confirmed:
        how = (
            f"has the {metric.best} mean of the points that were trained under the most seeds; "
            f"its {metric.name} here is of one of them"
            if now.by_mean
            else f"is the {metric.best} of several noisy values from one training seed: best of n"
        )
        lines.append(f"The best {how}, not confirmed.")
    named = now.baselines | ({} if now.best is None else {"best": now.best})
    shown = list(named.values())
    if differing := sorted({key for each in shown for key in each.differing(shown[0])}):
        lines.append(
            f"These {metric.plural} were measured under different conditions "
            f"({', '.join(differing)}): no comparison where they differ."
        )
    if shown and (figure := shown[-1].result.figure) is not None:
        lines.append(f"{metric.name}: {figure.in_short()}.")
    lines += [
        f"{name}: {clip.text()}."
        for name, each in named.items()
        if (clip := each.result.clip_score) is not None
    ]
    return lines


def headline(study: Study) -> str:
    """Counts on one line."""
    return f"{study.title}: {counts_line(study.counts(), f'{study.noun}s')}"


def failures(study: Study) -> list[str]:
    """A line for each row that failed and counts as one, with its reason; one for foreign rows."""
    lines = [line for ledger in study.ledgers for line in _failed(study, ledger)]
    foreign = {each.name: foreign_rows(each) for each in study.ledgers}
    return lines + [f"{name}: {rows}" for name, rows in foreign.items() if rows]


def foreign_rows(ledger: Ledger) -> str:
    """Rows that another program added to a ledger's Optuna study; "" without any."""
    found = [f"{number} ({state.name.lower()})" for number, state in ledger.foreign().items()]
    if len(found) > _FOREIGN_SHOWN:
        found[_FOREIGN_SHOWN:] = [f"and {len(found) - _FOREIGN_SHOWN} more"]
    rows = ", ".join(found)
    return rows and f"foreign rows, of another program, which count in no result: {rows}"


def _failed(study: Study, ledger: Ledger) -> Sequence[str]:
    lines = []
    is_baselines = ledger is study.baselines
    done = [each.params for _, _, each in study.complete_arms()] if is_baselines else []
    variants = study.variants
    for trial in ledger.rows(state=TrialState.FAIL):
        if SURPLUS in trial.user_attrs:
            continue
        arm = trial.user_attrs.get("arm")
        # A baseline that failed was tried again by the next launch.
        if trial.params in done:
            continue
        title = f"{study.noun} {trial.number}"
        if arm:
            changed = variants[trial.params["variant"]].items()
            settings = "".join(f", {name} {value}" for name, value in changed)
            of = f"{arm}, seed {trial.params['seed']}{settings}"
            title = of if is_baselines else f"{title} ({of})"
        reason, error = (trial.user_attrs.get(key, "") for key in ("reason", "error"))
        lines.append(f"{title} failed, {reason or 'unknown'}: {error}")
    return lines


def _gain(each: Measured, reference: Measured | None) -> str:
    """Against the first baseline, in per cent, where the two can be compared."""
    if reference is None or each.value == reference.value or each.differing(reference):
        return "-"
    if not reference.value:
        return "-"
    return f"{100 * (each.value - reference.value) / abs(reference.value):+.1f} %"
