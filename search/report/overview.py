"""A study as the dashboard's notes and the report show it, read once from the storage."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bdense.metrics.records import FID
from search.analysis.assessment import Assessment, assess
from search.analysis.comparison import (
    Comparison,
    comparison_rows,
    comparisons_of,
    replicates_of,
    teacher_of,
)
from search.analysis.confirmation import Verdict, judged_summary
from search.analysis.recommendation import Recommendation
from search.storage.ledger import Ledger
from search.study import summary
from search.study.curve import curve_of
from search.study.results import Curve
from search.study.study import Study
from search.study.summary import Measured, Summary
from search.study.wording import grid_legend


class ShownRow(NamedTuple):
    """A row whose samples are shown, and a name for their file."""

    title: str
    ledger: Ledger
    number: int
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """One reading of a study.

    A search has ``now`` (else None), its complete ``trials``, the ``verdict`` of its confirmation,
    perhaps the ``curve`` of its one-shot training, and the ``assessment`` of its results; given
    arms and the replicates of a search have ``comparisons``, and given arms perhaps the
    ``teacher``'s FID. ``legend`` says what the sample grids show.
    """

    study: Study
    now: Summary | None
    trials: Sequence[Measured]
    verdict: Verdict | None
    assessment: Assessment | None
    curve: Curve | None
    comparisons: Sequence[Comparison]
    teacher: FID | None
    legend: str

    @property
    def recommended(self) -> Recommendation | None:
        """The arm to use."""
        return None if self.assessment is None else self.assessment.recommended

    @property
    def is_empty(self) -> bool:
        """Whether nothing was measured yet."""
        return not self.comparisons if self.now is None else self.now.best is None

    def table(self) -> list[tuple[str, ...]]:
        """The result: a header and lines of cells."""
        if self.now is not None:
            return summary.summary_rows(self.now)
        return comparison_rows(self.comparisons, self.teacher)

    def remarks(self) -> list[str]:
        """Remarks on the result."""
        if self.now is not None:
            assert self.assessment is not None
            return [*summary.remarks(self.now), *self.assessment.lines()]
        return list(dict.fromkeys(each.conditions_line() for each in self.comparisons))

    def shown(self) -> list[ShownRow]:
        """A search's baselines and best trial; else each arm under the first seed."""
        study, now = self.study, self.now
        found = []
        if now is None:
            for index, each in enumerate(self.comparisons[-1].results if self.comparisons else ()):
                seed, number = min(each.rows.items())
                title = f"{each.arm.name}, seed {seed}"
                found.append(ShownRow(title, study.main, number, str(index)))
            return found
        for name, baseline in now.baselines.items():
            assert study.given is not None
            found.append(ShownRow(baseline.label, study.given, baseline.number, name))
        if now.best is not None:
            title = f"best: trial {now.best.number}"
            found.append(ShownRow(title, study.search, now.best.number, "best"))
        return found

    def confidence(self) -> str:
        """How much a search's best can be trusted."""
        if self.verdict is not None:
            return self.verdict.sentence()
        metric = self.study.spec.metric
        if self.now is not None and self.now.by_mean:
            return (
                f"not confirmed: {metric.best} by the mean over the most seeds, its {metric.name} "
                "under one of them"
            )
        return f"one training seed, not confirmed: the {metric.best} of several noisy values"


def overview_of(study: Study) -> Overview:
    """Read a study."""
    now, found, assessment, trials = None, None, None, []
    if study.is_search:
        now, found = judged_summary(study)
        assessment = assess(study, found)
        trials = summary.complete_trials(study)
        replicates = replicates_of(study)
        comparisons = [] if replicates is None else [replicates]
    else:
        comparisons = comparisons_of(study)
    rows = study.main.rows(("prompts",))
    legends = [grid_legend(row.user_attrs.get("prompts", [])) for row in rows]
    return Overview(
        study=study,
        now=now,
        trials=trials,
        verdict=found,
        curve=curve_of(study),
        assessment=assessment,
        comparisons=comparisons,
        teacher=teacher_of(study),
        legend=next(filter(None, legends), ""),
    )
