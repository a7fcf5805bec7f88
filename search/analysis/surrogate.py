"""A smooth surrogate of the FID over a study's parameters, to choose by it and not by luck.

The lowest of many noisy values is low by its noise as much as by its point (winner's curse). The
posterior mean of a Gaussian process at the same points averages over neighbours instead.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bdense.errors import InputError

# n evaluations, m points asked for, d coordinates, g groups.
Array = npt.NDArray[np.float64]
Point = Mapping[str, float]

# Evaluations that a surrogate is fitted to. The cost grows with their cube: under a second at 300,
# hours at 10,000.
MIN_EVALUATIONS, MAX_EVALUATIONS = 4, 300
# In every coordinate, in shares of its range over the evaluations.
LEAST_DISTANCE = 0.02
# Trainings whose lengths differ by this factor are as far apart as the ends of a coordinate.
# Before anything is fitted, lengths that differ by a factor of 3 correlate by 0.65.
FAR_LENGTH = 16.0
MAX_ROUNDS = 5  # of offsets and kernel in turn; two to four suffice as a rule
# Of inputs in [0, 1] and values of standard deviation 1; the last two are variances. Shorter
# lengths or less noise would let the curve run through each of a few noisy points; a higher least
# noise, and beside a steep flank the valley would be smoothed away.
LENGTHS, AMPLITUDES, NOISES = (0.2, 10.0), (0.05, 20.0), (1e-3, 2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One measured FID.

    Attributes:
        point: Its coordinates by name, see ``WeightSpace.coordinates``.
        value: The FID.
        group: Evaluations with one unknown offset: a training seed shifts all its trials.
        noise: Standard deviation of what it has beyond the noise of all.
        log_length: Logarithm of the ratio of its training's length to the study's own. Where
            lengths differ, it is one more coordinate, so that short trainings inform long ones
            as far as they agree.
    """

    point: Point
    value: float
    group: str
    noise: float = 0.0
    log_length: float = 0.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise InputError(
                f"value {self.value} at {dict(self.point)} is not finite; leave out what diverged"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Posterior:
    """The noise-free FID at m points: means [m] and covariance [m, m].

    ``noise`` is the standard deviation of a value about the curve. Variances are infinite, and the
    noise 0, where no curve was fitted.
    """

    means: Array
    covariance: Array
    noise: float

    def above(self, other: int) -> tuple[Array, Array]:
        """[m], [m]: differences of the means from that of point ``other``, and their errors."""
        own, variances = self.covariance[other], self.covariance.diagonal()
        apart = variances + own[other] - 2 * own if math.isfinite(own[other]) else variances.copy()
        apart[other] = 0.0
        return self.means - self.means[other], np.sqrt(np.maximum(apart, 0.0))


def posterior_means(
    evaluations: Sequence[Observation], points: Sequence[Point] | None = None
) -> list[float]:
    """Posterior mean of the noise-free FID, all groups pooled; deterministic.

    A group's offset is estimated together with the curve, and offsets have mean 0 over the
    evaluations: means are those of an average evaluation's group. A group of one evaluation is
    all offset and carries no information.

    To fewer than 4 evaluations, or to a single point, no curve is fitted: a point's mean is that
    of its values without their groups' offsets, as far as groups share points, and a point never
    measured has the mean of all.

    Args:
        evaluations: n of them, with the same coordinates.
        points: Where to, at the study's own length of training; the n evaluations' own by default.

    Returns:
        n means, or one for each of ``points``.

    Raises:
        InputError: No evaluations, or points whose coordinates differ or are not finite.
    """
    at, asked, values, members, noises = _arrays(evaluations, points)
    if _has_no_curve(at):
        return _means_by_point(at, values, members, asked)
    process, level, scale = _fitted_curve(at, values, members, noises)
    return [float(mean) for mean in level + scale * process.predict(asked)]


def posterior(
    evaluations: Sequence[Observation],
    points: Sequence[Point],
    log_lengths: Sequence[float] | None = None,
) -> Posterior:
    """Means, as by ``posterior_means``, with their covariance.

    Args:
        evaluations, points: As there.
        log_lengths: Of each point, see ``Observation``; the study's own length by default.

    Raises:
        InputError: As by ``posterior_means``.
    """
    at, asked, values, members, noises = _arrays(evaluations, points, log_lengths)
    if _has_no_curve(at):
        means = np.array(_means_by_point(at, values, members, asked))
        covariance = np.zeros((len(asked), len(asked)))
        np.fill_diagonal(covariance, math.inf)
        return Posterior(means=means, covariance=covariance, noise=0.0)
    process, level, scale = _fitted_curve(at, values, members, noises)
    means, covariance = process.predict(asked, return_cov=True)
    noise = process.kernel_.k2.noise_level
    return Posterior(
        means=level + scale * means,
        # scikit-learn's is that of values.
        covariance=scale**2 * (covariance - noise * np.eye(len(asked))),
        noise=scale * math.sqrt(noise),
    )


def candidates(
    evaluations: Sequence[Observation],
    count: int,
    *,
    among: Sequence[int] | None = None,
    taken: Sequence[int] = (),
) -> list[int]:
    """Indices of the evaluations whose points have the lowest posterior means, lowest first.

    Args:
        evaluations: As for ``posterior_means``.
        count: At most.
        among: Indices of those that are chosen from; None for all.
        taken: Indices of points that are left out, with those near them.

    Points that lie within ``LEAST_DISTANCE`` of each other are one: the better stands for both.
    """
    points = [evaluation.point for evaluation in evaluations]
    at = _placed(points, points)
    chosen: list[int] = []
    for index in np.argsort(posterior_means(evaluations), kind="stable").tolist():
        if len(chosen) == count:
            break
        others = [*taken, *chosen]
        if (among is None or index in among) and all(
            np.abs(at[index] - at[other]).max() >= LEAST_DISTANCE for other in others
        ):
            chosen.append(index)
    return chosen


def _arrays(
    evaluations: Sequence[Observation],
    points: Sequence[Point] | None,
    log_lengths: Sequence[float] | None = None,
) -> tuple[Array, Array, Array, Array, Array]:
    """Places [n, d] and those asked for [m, d]; values [n], groups [n, g] and noises [n]."""
    own = [evaluation.point for evaluation in evaluations]
    at = _placed(own, own)
    asked = at if points is None else _placed(points, own)
    lengths = np.array([evaluation.log_length for evaluation in evaluations])
    # Length alone makes no curve.
    if np.ptp(lengths) > 0 and not _has_no_curve(at):
        asked_lengths = np.zeros(len(asked)) if log_lengths is None else np.array(log_lengths)
        at = np.column_stack([at, lengths / math.log(FAR_LENGTH)])
        asked = np.column_stack([asked, asked_lengths / math.log(FAR_LENGTH)])
    return (
        at,
        asked,
        np.array([evaluation.value for evaluation in evaluations]),
        _one_hot([evaluation.group for evaluation in evaluations]),
        np.array([evaluation.noise for evaluation in evaluations]),
    )


def _has_no_curve(at: Array) -> bool:
    return len(at) < MIN_EVALUATIONS or len(np.unique(at, axis=0)) == 1


def _placed(points: Sequence[Point], around: Sequence[Point]) -> Array:
    """[m, d]: each coordinate of m points, by name, in shares of its range over ``around``."""
    if not around:
        raise InputError("no evaluations to fit a surrogate to; measure some first")
    names = sorted(around[0])
    for point in (*around, *points):
        if sorted(point) != names or not all(map(math.isfinite, point.values())):
            raise InputError(
                f"point {dict(point)} does not have a finite number for each of "
                f"{', '.join(names)}; leave it out"
            )
    at, ends = (
        np.array([[p[name] for name in names] for p in of], float) for of in (points, around)
    )
    lows: Array = ends.min(axis=0)
    spans = ends.max(axis=0) - lows
    # Where all have one value there is no range to share out.
    return (at - lows) / np.where(spans > 0, spans, 1.0)


def _one_hot(names: Sequence[str]) -> Array:
    """[n, g]: 1 where an evaluation belongs to a group."""
    known = sorted(set(names))
    return np.array([[float(name == other) for other in known] for name in names])


def _offsets(values: Array, members: Array, weight: Array) -> Array:
    """[n] offset of each evaluation's group, by generalised least squares: backfitting's limit.

    ``weight`` [n, n] is the inverse covariance of the values [n], ``members`` is [n, g].
    """
    normal = members.T @ weight @ members
    # The pseudo-inverse sets to 0 what the data do not determine.
    inverse = np.linalg.pinv(normal, rcond=1e-9, hermitian=True)
    offsets: Array = members @ inverse @ members.T @ weight @ values
    return offsets


def _means_by_point(at: Array, values: Array, members: Array, asked: Array) -> list[float]:
    """Means of values without offsets, without a curve."""
    same = (at[:, None] == at[None]).all(axis=2).astype(float)
    averaging = same / same.sum(axis=1, keepdims=True)
    offsets = _offsets(values, members, np.eye(len(at)) - averaging)
    means = averaging @ (values - offsets + offsets.mean())
    found = [np.flatnonzero((at == point).all(axis=1)) for point in asked]
    return [float(means[index[0]] if len(index) else values.mean()) for index in found]


def _fitted_curve(
    at: Array, values: Array, members: Array, noises: Array
) -> tuple[Any, float, float]:
    """A process of mean 0, the level and the scale: FIDs are level + scale * process.

    Groups' offsets need a kernel and a kernel's fit needs offsets, hence rounds.
    """
    kept = _kept(members)
    at, values, members, noises = at[kept], values[kept], members[kept], noises[kept]
    own = (noises / (float(np.std(values)) or 1.0)) ** 2
    offsets = _offsets(values, members, np.linalg.inv(_kernel(at.shape[1])(at) + np.diag(own)))
    kernel: Any = None
    for _ in range(MAX_ROUNDS):
        # Where all values are equal, only rounding would be scaled up.
        scale = max(float(np.std(values - offsets)), 1e-9 * float(np.abs(values).max())) or 1.0
        own = (noises / scale) ** 2
        process = _fitted(at, (values - offsets) / scale, own, kernel)
        kernel, before = process.kernel_, offsets
        offsets = _offsets(values, members, np.linalg.inv(kernel(at) + np.diag(own)))
        # Groups apart from one another; their common level hardly moves the curve.
        if np.ptp(offsets - before) < 5e-3 * scale:
            break
    return process, float(before.mean()), scale


def _kept(members: Array) -> npt.NDArray[np.intp]:
    """Evaluations that a process is fitted to: the largest group is thinned to the limit."""
    sizes = members.sum(axis=0)
    largest = members[:, np.argmax(sizes)] > 0
    room = max(MAX_EVALUATIONS - int((~largest).sum()), MIN_EVALUATIONS)
    own = np.flatnonzero(largest)
    if len(own) > room:
        own = own[np.linspace(0, len(own) - 1, room).round().astype(np.intp)]
    return np.sort(np.concatenate([own, np.flatnonzero(~largest)]))


def _kernel(coordinates: int) -> Any:  # noqa: ANN401  sklearn has no types
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    smooth = ConstantKernel(1.0, AMPLITUDES) * Matern([0.5] * coordinates, LENGTHS, nu=2.5)
    return smooth + WhiteKernel(0.1, NOISES)


def _fitted(at: Array, values: Array, own: Array, kernel: Any) -> Any:  # noqa: ANN401  as above
    """A process of mean 0, fitted from the given kernel or from several starts.

    ``own`` [n] are variances beyond the noise of all.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor

    process = GaussianProcessRegressor(
        kernel or _kernel(at.shape[1]),
        alpha=1e-10 + own,  # scikit-learn's own, against rounding
        n_restarts_optimizer=0 if kernel else 2,
        random_state=0,
    )
    with warnings.catch_warnings():
        # Raised where a hyperparameter lies at its bound, too, which is intended.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return process.fit(at, values)
