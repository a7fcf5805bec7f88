"""Students compared seed by seed: a training seed moves both of a pair, their difference less."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from bdense.errors import InputError

CONFIDENCE = 0.95
# Values that differ by less than this share of the largest are equal, up to rounding of float32.
_ROUNDING = 1e-7


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
        low, high: Infinite where the spread of the differences is unknown.
        deviation: Standard deviation of one difference; None where it is unknown, of one seed and
            where no two values differ.
        relative: The mean difference in shares of the baseline's mean; None where that is 0.
    """

    mean: float
    low: float
    high: float
    deviation: float | None
    n: int
    relative: float | None

    @property
    def tie(self) -> bool:
        """Whether the interval spans 0: the seeds do not show which of both is better."""
        return self.low <= 0 <= self.high

    def text(self, form: str) -> str:
        """For a table's cell: ``-0.61 [-0.80, -0.42]``, or ``-0.12 [-0.30, +0.06], tie``."""
        mean, low, high = (f"{x:{form}}" for x in (self.mean, self.low, self.high))
        spread = f"{low}, {high}"
        if self.deviation is None:
            spread = "one seed" if self.n == 1 else "no spread seen"
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


def step_of(values: Iterable[float]) -> float | None:
    """The smallest difference between any two values; None where no two differ.

    Of a metric that moves in steps, such as an accuracy, it is one step or several.
    """
    ordered = sorted(values)
    least = _rounding(ordered)
    return min((b - a for a, b in pairwise(ordered) if b - a > least), default=None)


def paired_difference(
    values: Mapping[int, float], baseline: Mapping[int, float], step: float | None = None
) -> Paired | None:
    """``values`` less ``baseline``, by training seed, over the seeds that both have.

    Equal differences hide their spread in the steps of the metric. Its resolution stands in for
    it: a value has the variance step^2 / 12 by rounding (JCGM 100:2008, F.2.2.1), and a difference
    of two values twice that.

    Args:
        values: By training seed.
        baseline: By training seed.
        step: See ``step_of``; None for that of these values.

    Raises:
        InputError: A value that is not finite.
    """
    for of, given in (("", values), ("baseline's ", baseline)):
        _refuse_not_finite({f"{of}seed {seed}": value for seed, value in given.items()})
    seeds = sorted(values.keys() & baseline.keys())
    if not seeds:
        return None
    base = statistics.fmean(baseline[seed] for seed in seeds)
    differences = [values[seed] - baseline[seed] for seed in seeds]
    n, mean, reach = len(seeds), statistics.fmean(differences), math.inf
    deviation = statistics.stdev(differences) if n > 1 else None
    both = [each[seed] for each in (values, baseline) for seed in seeds]
    if deviation is not None and deviation <= _rounding(both):
        step = step or step_of(both)
        deviation = None if step is None else step / math.sqrt(6)
    if deviation is not None:
        from scipy.stats import t

        reach = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * (deviation / math.sqrt(n))
    return Paired(
        mean=mean,
        low=mean - reach,
        high=mean + reach,
        deviation=deviation,
        n=n,
        relative=mean / abs(base) if base else None,
    )


def _rounding(values: Iterable[float]) -> float:
    return _ROUNDING * max(map(abs, values), default=0.0)


def _refuse_not_finite(values: Mapping[str, float]) -> None:
    bad = [f"{value} of {name}" for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise InputError(f"values that are not finite: {', '.join(bad)}; leave out what diverged")
