"""Given arms side by side: each one's figures over the seeds, against the baselines, as a table.

Reads the storage alone. A difference is claimed only where its paired interval excludes 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bdense.methods import StagePlan
from bdense.metrics.records import FID
from search.analysis.paired import Mean, Paired, mean_of, paired_difference, step_of
from search.spec.metric import Metric
from search.storage.queries import StoredTrial
from search.study.arms import Arm
from search.study.results import Judged, TrialResult
from search.study.study import Study
from search.study.wording import align

# A table of more seeds than this shows only their mean.
_MOST_SEEDS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmResult:
    """One arm's figures with their conditions, and row numbers, by training seed."""

    arm: Arm
    figures: dict[int, Judged]
    rows: dict[int, int]

    @property
    def values(self) -> dict[int, float]:
        """Values by training seed."""
        return {seed: figure.value for seed, figure in self.figures.items()}

    @property
    def figure(self) -> Judged:
        """The figure of the first seed, which stands for all in what they have in common."""
        return self.figures[min(self.figures)]

    def mean(self) -> Mean:
        """Mean and standard error over the seeds."""
        return mean_of(list(self.values.values()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Arms trained under the same seeds, as far as measured, in the order of their study.

    ``title`` names stage and variant of the method where there are several; ``variant`` holds
    changed settings, and ``baselines`` names what others are compared with.
    """

    metric: Metric
    baselines: tuple[str, ...]
    title: str = ""
    stage: str = ""
    variant: Mapping[str, Any]
    results: tuple[ArmResult, ...]

    def baseline(self, name: str) -> ArmResult | None:
        """A baseline, as far as it was measured."""
        return next((each for each in self.results if each.arm.baseline == name), None)

    def beside_baselines(self, arm: Arm) -> "Comparison":
        """One arm and the baselines alone."""
        kept = [each for each in self.results if each.arm.baseline or each.arm == arm]
        return replace(self, results=tuple(kept))

    @property
    def differing(self) -> list[str]:
        """Conditions in which these figures differ, so that they are not compared."""
        # All of one kind, which the type does not say.
        figures: list[Any] = [f for result in self.results for f in result.figures.values()]
        return sorted({key for each in figures for key in each.differing(figures[0])})

    def against(self, result: ArmResult, other: ArmResult | None) -> Paired | None:
        """The paired difference, where there is something to pair."""
        if other is None or other is result or self.differing:
            return None
        step = step_of(value for each in self.results for value in each.values.values())
        return paired_difference(result.values, other.values, step)

    def table(self) -> list[str]:
        """A line for each arm, for people."""
        return align(comparison_rows([self]))

    def conditions_line(self) -> str:
        """What these figures have in common."""
        if self.differing:
            return (
                f"These {self.metric.plural} were measured under different conditions "
                f"({', '.join(self.differing)}): no comparison."
            )
        shared = f"{self.metric.name}: {self.results[0].figure.in_short()}."
        return (
            f"{shared} Differences are paired by seed, in [] their 95 % t interval; a tie where "
            "it spans 0."
        )


def comparison_rows(
    comparisons: Sequence[Comparison], teacher: FID | None = None
) -> list[tuple[str, ...]]:
    """A header and a line for each arm of each comparison, as cells."""
    seeds = sorted({s for each in comparisons for r in each.results for s in r.figures})
    shown = seeds if len(seeds) <= _MOST_SEEDS else []
    at = ("at",) if len(comparisons) > 1 or teacher is not None else ()
    names = comparisons[0].baselines if comparisons else ()
    compared = [f"vs {name}" for name in names]
    titles = (*(f"seed {s}" for s in shown), "mean", "s.e.", *compared)
    rows: list[tuple[str, ...]] = [("", *at, *titles)]
    if teacher is not None:
        dashes = ["-"] * len(shown)
        rows.append(
            (
                *("teacher", f"NFE {teacher.nfe}", *dashes, f"{teacher.value:.3f}"),
                *["-"] * (1 + len(names)),
            )
        )
    for each in comparisons:
        for result in each.results:
            metric, values, found = each.metric, result.values, result.mean()
            own = [metric.text(values[s]) if s in values else "-" for s in shown]
            pairs = [each.against(result, each.baseline(name)) for name in names]
            place = (each.title,) if at else ()
            figures: tuple[str, ...] = (metric.text(found.mean), found.error_text(metric.form))
            figures += tuple(difference_text(pair, metric) for pair in pairs)
            rows.append((result.arm.name, *place, *own, *figures))
    return rows


def difference_text(pair: Paired | None, metric: Metric) -> str:
    """``-23.1 %, -0.83 [-1.02, -0.64]``."""
    if pair is None:
        return "-"
    share = "" if pair.relative is None else f"{100 * pair.relative:+.1f} %, "
    return share + pair.text(metric.form_of_difference)


def comparisons_of(study: Study) -> list[Comparison]:
    """Every stage and variant that given arms were measured at, in order."""
    spec, variants, found = study.spec, study.variants, []
    stages = spec.resolved.stages
    for index, changes in enumerate(variants):
        for stage in stages:
            each = compare(study, variant=index, stage=stage.name)
            if each.results:
                words = [stage.label] if len(stages) > 1 else []
                words += [settings_text(changes)] if len(variants) > 1 else []
                found.append(replace(each, title=", ".join(words)))
    return found


def settings_text(changes: Mapping[str, Any]) -> str:
    """A variant of the method's settings for people, such as ``kimg 38.4``."""
    return ", ".join(f"{name} {value}" for name, value in changes.items()) or "as the study"


def compare(study: Study, *, variant: int = 0, stage: str | None = None) -> Comparison:
    """The complete rows of one variant of given arms, at one stage; None is the last.

    Of a search they are its baselines, then its replicated points: most seeds first, then by mean.
    """
    spec, variants = study.spec, study.variants
    stages = spec.resolved.stages
    at = next(each for each in reversed(stages) if stage in (None, each.name))
    found: dict[int, ArmResult] = {}
    for arm, row, trial in study.complete_arms():
        if row.variant == variant and (figure := _figure_at(at, trial)) is not None:
            result = found.setdefault(row.arm, ArmResult(arm=arm, figures={}, rows={}))
            result.figures[row.seed], result.rows[row.seed] = figure, trial.number
    results = [found[index] for index in sorted(found)]
    return Comparison(
        metric=spec.metric,
        baselines=spec.baselines,
        stage=at.name,
        variant=variants[variant] if variants else {},
        results=tuple(_with_trials(study, at, results)),
    )


def _with_trials(
    study: Study, stage: StagePlan, results: Sequence[ArmResult]
) -> Sequence[ArmResult]:
    """A search's replicates with the figure of their trial, a training under the first seed."""
    raced = {each.arm.trial: each for each in results if each.arm.trial is not None}
    if not (study.is_search and raced):
        return results
    spec = study.spec
    for trial in study.search.rows(("fid", "fids", "score")):
        if trial.number in raced and (figure := _figure_at(stage, trial)) is not None:
            raced[trial.number].figures[spec.seeds.training] = figure
    loss = spec.metric.loss
    ranked = sorted(raced.values(), key=lambda each: (-len(each.figures), loss(each.mean().mean)))
    return [*(each for each in results if each.arm.trial is None), *ranked]


def replicates_of(study: Study) -> Comparison | None:
    """The replicated points of a search beside its baselines; None before there are any."""
    found = compare(study)
    return found if any(each.arm.baseline is None for each in found.results) else None


def _figure_at(stage: StagePlan, trial: StoredTrial) -> Judged | None:
    result = TrialResult.of(trial.value, trial.user_attrs)
    return result.fid_at(stage.nfe) if result.fids else result.figure


def teacher_of(study: Study) -> FID | None:
    """The teacher's FID, which all rows share, where the method measures it."""
    for _, _, trial in study.complete_arms():
        return TrialResult.of(trial.value, trial.user_attrs).teacher_fid
    return None
