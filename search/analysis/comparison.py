"""Planned rows side by side: each arm's FIDs over the seeds, against both baselines, as a table.

Reads the storage alone. A difference is told only where its paired interval excludes 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from search.analysis.paired import Paired, Summary, paired_difference, summary
from search.study.arms import Arm, Planned, PlannedRow
from search.study.summary import COMPARED_KEYS
from search.study.wording import align

PLAIN_METHODS = ("sfd", "pd")


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmResult:
    """One arm, as far as it was measured.

    Attributes:
        arm: Which.
        fids: FID by training seed.
        rows: Numbers of the rows, by training seed.
        conditions: Those of its FIDs but for the seed; a comparison says where they differ.
    """

    arm: Arm
    fids: dict[int, float]
    rows: dict[int, int]
    conditions: dict[str, Any]

    def summary(self) -> Summary:
        """Mean and standard error over the seeds."""
        return summary(list(self.fids.values()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Arms that were trained under the same seeds, in the order of their study.

    Attributes:
        results: Of the arms that were measured at least once.
    """

    results: tuple[ArmResult, ...]

    def baseline(self, *methods: str) -> ArmResult | None:
        """The first baseline of one of these methods."""
        found = (r for r in self.results if r.arm.params.get("method") in methods)
        return next(found, None)

    @property
    def plain(self) -> ArmResult | None:
        """The student with one branch."""
        return self.baseline(*PLAIN_METHODS)

    @property
    def uniform(self) -> ArmResult | None:
        """All branches alike."""
        return self.baseline("uniform")

    @property
    def differing(self) -> list[str]:
        """Conditions in which these FIDs differ, so that they are not compared."""
        first = self.results[0].conditions if self.results else {}
        return sorted(
            {key for r in self.results for key in COMPARED_KEYS if r.conditions[key] != first[key]}
        )

    def against(self, result: ArmResult, other: ArmResult | None) -> Paired | None:
        """The paired difference, where there is something to pair."""
        if other is None or other is result or self.differing:
            return None
        return paired_difference(result.fids, other.fids)

    def table(self) -> list[str]:
        """For people: a line for each arm."""
        return align(self.rows())

    def rows(self) -> list[tuple[str, ...]]:
        """A header and the same lines as cells."""
        seeds = sorted({seed for result in self.results for seed in result.fids})
        header = ("", *(f"seed {s}" for s in seeds), "mean", "s.e.", *_AGAINST)
        rows = [header]
        for result in self.results:
            each = [f"{result.fids[s]:.3f}" if s in result.fids else "-" for s in seeds]
            found = result.summary()
            pairs = [self.against(result, other) for other in (self.plain, self.uniform)]
            texts = [difference_text(pair) for pair in pairs]
            mean, error = f"{found.mean:.3f}", found.error_text()
            rows.append((result.arm.name, *each, mean, error, *texts))
        return rows

    def conditions_line(self) -> str:
        """What these FIDs have in common."""
        first = self.results[0].conditions
        if self.differing:
            return (
                f"These FIDs were measured under different conditions "
                f"({', '.join(self.differing)}): no comparison."
            )
        of_all = {result.conditions["nfe"] for result in self.results} == {first["nfe"]}
        return fid_line(first, f" at NFE {first['nfe']}" if of_all else "")


def fid_line(fid: Mapping[str, Any], at: str = "") -> str:
    """The conditions of a FID, and how differences are told."""
    return (
        f"FID: {fid['images']} images{at}, features of {fid['extractor']}, against "
        f"{fid['reference']}. Differences are paired by seed, in [] their 95 % t interval; a tie "
        "where it spans 0."
    )


_AGAINST = ("vs plain", "vs uniform")


def difference_text(pair: Paired | None) -> str:
    """``-23.1 %, -0.83 [-1.02, -0.64]``."""
    return "-" if pair is None else f"{100 * pair.relative:+.1f} %, {pair.text()}"


def compare(
    planned: Planned,
    *,
    kimg: float | None = None,
    nfe: int | None = None,
    steps: int | None = None,
) -> Comparison:
    """The complete rows of one budget and NFE, or one number of steps of their chains.

    Args:
        planned: The study.
        kimg, nfe: Of students of SFD; None takes rows of any.
        steps: Of a chain's round; None is the last.
    """
    arms = planned.arms
    fids: dict[int, dict[int, float]] = {}
    rows: dict[int, dict[int, int]] = {}
    conditions: dict[int, dict[str, Any]] = {}
    for trial in planned.complete():
        row = PlannedRow.of(trial.params)
        if (kimg is not None and row.kimg != kimg) or (nfe is not None and row.nfe != nfe):
            continue
        fid = fid_of(trial.user_attrs, steps)
        if fid is None:
            continue
        fids.setdefault(row.arm, {})[row.seed] = float(fid["value"])
        rows.setdefault(row.arm, {})[row.seed] = trial.number
        known = conditions.setdefault(row.arm, dict(fid))
        # An arm that is not alike in itself is like no other either.
        known |= {key: None for key in COMPARED_KEYS if known[key] != fid[key]}
    return Comparison(
        results=tuple(
            ArmResult(arm=arms[i], fids=fids[i], rows=rows[i], conditions=conditions[i])
            for i in sorted(fids)
        )
    )


def fid_of(attrs: Mapping[str, Any], steps: int | None) -> dict[str, Any] | None:
    """A row's FID with its conditions, at a chain's number of steps where one is asked for."""
    if steps is None:
        found: dict[str, Any] = attrs["fid"]
        return found
    of_round: dict[str, Any] | None = attrs.get("fids", {}).get(str(steps))
    return of_round
