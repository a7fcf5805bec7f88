"""All there is to say of a study, read once: for the dashboard's notes and the report.

Reads the storage alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from search.analysis.comparison import Comparison, comparisons_of, table_rows, teacher_of
from search.analysis.confirmation import Verdict, verdict
from search.report.plots import Plot, study_plots
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
        trials: Of a search: the complete ones.
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

    def plots(self) -> list[Plot]:
        """Its own plots; none before anything was measured."""
        if self.is_empty:
            return []
        return study_plots(self.trials, self.now, self.comparisons, self.teacher, self.study.name)

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
        verdict=found,
        comparisons=[] if study.is_search else comparisons_of(study),
        teacher=teacher_of(study),
        spec=as_yaml(study.spec),
        fingerprint=str(attributes.get(FINGERPRINT, "")),
        failures=summary.failures(study),
        changes=list(attributes.get(CHANGES, [])),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
