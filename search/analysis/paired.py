"""Students compared seed by seed: a training seed moves both of a pair, their difference less."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bdense.errors import InputError

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """Mean of n values and its standard error, which a single one does not have."""

    mean: float
    standard_error: float | None
    n: int

    def error_text(self, form: str) -> str:
        """The standard error for a table's cell."""
        return "-" if self.standard_error is None else f"{self.standard_error:{form}}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """Mean difference over n seeds with its 95 % paired t interval.

    Attributes:
        low, high: Infinite for one seed, whose spread is unknown.
        relative: The mean difference in shares of the baseline's mean; None where that is 0.
    """

    mean: float
    low: float
    high: float
    n: int
    relative: float | None

    @property
    def tie(self) -> bool:
        """Whether the interval spans 0: the seeds do not show which of both is better."""
        return self.low <= 0 <= self.high

    def text(self, form: str) -> str:
        """For a table's cell: ``-0.61 [-0.80, -0.42]``, or ``-0.12 [-0.30, +0.06], tie``."""
        mean, low, high = (f"{x:{form}}" for x in (self.mean, self.low, self.high))
        spread = "one seed" if self.n == 1 else f"{low}, {high}"
        return f"{mean} [{spread}]" + ", tie" * self.tie


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and standard error, std (ddof = 1) / sqrt(n).

    Raises:
        InputError: No values, or one that is not finite.
    """
    if not values:
        raise InputError("no values to take the mean of; measure some first")
    _refuse_not_finite({f"number {index}": value for index, value in enumerate(values)})
    n = len(values)
    error = statistics.stdev(values) / math.sqrt(n) if n > 1 else None
    return Mean(mean=statistics.fmean(values), standard_error=error, n=n)


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Paired | None:
    """``values`` less ``baseline``, by training seed, over the seeds that both have.

    Raises:
        InputError: A value that is not finite.
    """
    for of, given in (("", values), ("baseline's ", baseline)):
        _refuse_not_finite({f"{of}seed {seed}": value for seed, value in given.items()})
    seeds = sorted(values.keys() & baseline.keys())
    if not seeds:
        return None
    base = statistics.fmean(baseline[seed] for seed in seeds)
    found = mean_of([values[seed] - baseline[seed] for seed in seeds])
    reach = math.inf
    if found.standard_error is not None:
        from scipy.stats import t

        reach = float(t.ppf((1 + CONFIDENCE) / 2, found.n - 1)) * found.standard_error
    return Paired(
        mean=found.mean,
        low=found.mean - reach,
        high=found.mean + reach,
        n=found.n,
        relative=found.mean / abs(base) if base else None,
    )


def _refuse_not_finite(values: Mapping[str, float]) -> None:
    bad = [f"{value} of {name}" for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise InputError(f"values that are not finite: {', '.join(bad)}; leave out what diverged")
