"""All there is to say of a study, read once: for the dashboard's notes and plots, and the report.

Reads the storage alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from optuna.trial import FrozenTrial

from search.analysis.comparison import Comparison, comparisons_of, table_rows, teacher_of
from search.analysis.confirmation import Verdict, verdict
from search.report.charts import Chart
from search.report.plots import arms_of, fid_over_nfe, study_charts
from search.spec.file import as_yaml
from search.storage.engine import retrying
from search.storage.settings import CHANGES
from search.study import summary
from search.study.results import MeasuredFID
from search.study.study import FINGERPRINT, Study
from search.study.summary import Measured, Summary


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """One reading of a study.

    Attributes:
        study: Which.
        now: Of a search: counts, best trial and baselines.
        trials: Of a search: the complete ones; ``hours`` from the study's first start to the end
            of each.
        verdict: Of a search: its confirmation's, where there is one.
        comparisons: Of given arms: each stage and variant.
        teacher: Its FID, where the method measures it.
        spec: As YAML.
        fingerprint: Of the conditions.
        failures: A line for each failed row.
        changes: ``time``, ``key``, ``old`` and ``new`` of each setting that was changed.
        written: When this was read, UTC.
    """

    study: Study
    now: Summary | None
    trials: Sequence[Measured]
    hours: Mapping[int, float]
    verdict: Verdict | None
    comparisons: Sequence[Comparison]
    teacher: MeasuredFID | None
    spec: str
    fingerprint: str
    failures: Sequence[str]
    changes: Sequence[Mapping[str, Any]]
    written: str

    @property
    def is_empty(self) -> bool:
        """Whether nothing was measured yet."""
        return not self.comparisons if self.now is None else self.now.best is None

    def headline(self) -> str:
        """Counts on one line."""
        return summary.headline(self.study)

    def table(self) -> list[tuple[str, ...]]:
        """The result: a header and lines of cells."""
        if self.now is not None:
            return summary.table_rows(self.now)
        return table_rows(self.comparisons, self.teacher)

    def remarks(self) -> list[str]:
        """What the result means, and what not."""
        if self.now is not None:
            return summary.remarks(self.now)
        return list(dict.fromkeys(each.conditions_line() for each in self.comparisons))

    def charts(self) -> list[Chart]:
        """Its plots; none before anything was measured."""
        if self.is_empty:
            return []
        if self.now is not None:
            return study_charts(self.trials, self.hours, self.now)
        stages = [each for each in self.comparisons if each.variant == self.comparisons[0].variant]
        if len({each.stage for each in stages}) > 1:
            return [fid_over_nfe(stages, self.teacher, self.study.name)]
        return [
            arms_of(each, f"FID of each arm{each.title and ', '}{each.title}", f"arms-{index}")
            for index, each in enumerate(self.comparisons)
        ]

    def confidence(self) -> str:
        """How much the best of a search is to be trusted."""
        if self.verdict is not None:
            return self.verdict.sentence()
        return "one training seed, not confirmed: the lowest of several noisy values"


def overview_of(study: Study) -> Overview:
    """Read a study."""
    record = study.main.study
    attributes = retrying(lambda: record.user_attrs)
    now, found, trials = None, None, []
    if study.is_search:
        now, found = summary.summary_of(study), verdict(study)
        trials = summary.complete_trials(study)
        if now.best is not None and found is not None and found.ended:
            is_winner = found.winner.arm.trial == now.best.number
            now = replace(now, confirmed=is_winner)
    return Overview(
        study=study,
        now=now,
        trials=trials,
        hours=_hours(retrying(lambda: record.get_trials(deepcopy=False))) if trials else {},
        verdict=found,
        comparisons=[] if study.is_search else comparisons_of(study),
        teacher=teacher_of(study),
        spec=as_yaml(study.spec),
        fingerprint=str(attributes.get(FINGERPRINT, "")),
        failures=summary.failures(study),
        changes=list(attributes.get(CHANGES, [])),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _hours(trials: Sequence[FrozenTrial]) -> dict[int, float]:
    """From the first start to each trial's end."""
    starts = [trial.datetime_start for trial in trials if trial.datetime_start is not None]
    return {
        trial.number: (trial.datetime_complete - min(starts)).total_seconds() / 3600
        for trial in trials
        if trial.datetime_complete is not None and starts
    }
