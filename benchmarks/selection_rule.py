"""Which trial a noisy search should name its best: the lowest value, or the surrogate's choice.

First, students of a study at several slopes a and training seeds: measured, or read from a file
that an earlier run measured (--save-fids, --fids). Then searches over a curve through them, with
noise drawn from what is left: only there is known how good a choice is.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import optuna
from numpy.polynomial import Polynomial
from search.spec.study_file import read_spec
from search.spec.study_spec import StudySpec
from search.worker.engine import check

from benchmarks.common import parser, publish, table
from benchmarks.students import Arm, add_study_options, conditions, fid_table, fids_of
from search.analysis.paired import paired_difference
from search.analysis.surrogate import Evaluation, candidates, posterior_means

SLOPES = (-0.8, -0.4, 0.0, 0.25, 0.5, 0.75, 1.0, 1.386, 1.8)
SEEDS = (0, 1, 2)
TRIALS = (16, 32)
DEGREE = 3  # of the curve; a polynomial, for a process would make the surrogate look good
TOP, FRESH = 3, 3  # candidates that are trained again, and their new seeds
RAW, MEAN = "raw", "GP"
AGAIN = {
    (rule, by): f"{rule} top {TOP}, {by}"
    for rule in (RAW, MEAN)
    for by in ("fresh mean", "pooled GP")
}
RULES = (RAW, MEAN, *AGAIN.values())

# P slopes, S training seeds, R repeats.
Array = npt.NDArray[np.float64]
Student = Callable[[float], float]  # the FID measured at a slope, all with one training seed


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """FIDs by slope and training seed.

    Attributes:
        conditions: What they have in common, as a paragraph.
        slopes: P of them, ascending.
        fids: [P][S].
    """

    conditions: str
    seeds: list[int]
    slopes: list[float]
    fids: list[list[float]]

    @classmethod
    def read(cls, file: Path) -> Self:
        """What ``write`` wrote."""
        return cls(**json.loads(file.read_text()))

    def write(self, file: Path) -> None:
        """As JSON."""
        file.write_text(json.dumps(asdict(self), indent=1))

    def residuals(self) -> Array:
        """[P, S] without the slopes' means and the seeds' offsets, on the noise's own scale."""
        fids = np.array(self.fids)
        means, offsets = fids.mean(axis=1, keepdims=True), fids.mean(axis=0, keepdims=True)
        p, s = fids.shape
        # The means fitted took p + s - 1 of the p * s degrees of freedom with them.
        return (fids - means - offsets + fids.mean()) * np.sqrt(p * s / ((p - 1) * (s - 1)))

    def seed_spread(self) -> float:
        """Standard deviation of the seeds' offsets."""
        return float(np.array(self.fids).mean(axis=0).std(ddof=1))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class World:
    """Where the truth is known: a curve, and students that are measured with noise.

    Attributes:
        noise: What the measured noise is multiplied by.
        smooth: Noise is a whole seed's residuals, with lines between the slopes, so that
            neighbours share it, rather than a residual for each student.
    """

    measured: Measured
    noise: float = 1.0
    smooth: bool = False

    def truth(self) -> Polynomial:
        """Least squares through the slopes' means over seeds."""
        means = [statistics.mean(row) for row in self.measured.fids]
        return Polynomial.fit(self.measured.slopes, means, DEGREE)

    @property
    def bounds(self) -> tuple[float, float]:
        """Of a search: beyond what was measured there is no curve."""
        return self.measured.slopes[0], self.measured.slopes[-1]

    def seed(self, generator: np.random.Generator) -> Student:
        """A training seed that nobody has used yet."""
        truth, residuals = self.truth(), self.noise * self.measured.residuals()
        offset = generator.normal(0.0, self.measured.seed_spread())
        curve = residuals[:, generator.integers(residuals.shape[1])] * generator.choice((-1, 1))

        def student(a: float) -> float:
            if self.smooth:
                left = np.interp(a, self.measured.slopes, curve)
            else:
                left = generator.choice(residuals.ravel())
            return float(truth(a) + offset + left)

        return student


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One kind of search to repeat."""

    sampler: str
    trials: int
    noise: str
    world: World


def main() -> None:
    """Measure or read, simulate and print."""
    given = _given()
    spec = read_spec(given.study)
    measured = Measured.read(given.fids) if given.fids else _measure(spec, given.a, given.seeds)
    if given.save_fids:
        measured.write(given.save_fids)
    startup = spec.sampler.startup_trials
    results = {}
    for setting in _settings(measured):
        results[setting] = _regrets(setting, startup, given.repeats)
        sys.stderr.write(f"{setting.sampler}, {setting.trials} trials, {setting.noise}\n")
    publish("selection_rule", _body(measured, results, given.repeats), write=given.write)


def _given() -> argparse.Namespace:
    options = parser(__doc__)
    add_study_options(options, seeds=SEEDS)
    options.add_argument(
        "--a",
        type=float,
        nargs="+",
        default=SLOPES,
        metavar="A",
        help=f"slopes to measure (default: {' '.join(map(str, SLOPES))})",
    )
    options.add_argument(
        "--fids", type=Path, metavar="FILE", help="read these FIDs and train no students"
    )
    options.add_argument(
        "--save-fids", type=Path, metavar="FILE", help="write the measured FIDs, for --fids"
    )
    options.add_argument(
        "--repeats", type=int, default=200, help="searches of each kind (default: %(default)s)"
    )
    given = options.parse_args()
    if len(set(given.a)) < DEGREE + 2 or len(set(given.seeds)) < 2 or given.repeats < 2:
        options.error(
            f"--a needs {DEGREE + 2} slopes, --seeds and --repeats two: noise is a spread"
        )
    return given


def _measure(spec: StudySpec, slopes: Sequence[float], seeds: Sequence[int]) -> Measured:
    check(spec)
    ascending = sorted(set(slopes))
    arms = [Arm(name=_name(a), params={"a": a}) for a in ascending]
    fids = fids_of(spec, arms, seeds)
    return Measured(
        conditions=conditions(spec),
        seeds=list(seeds),
        slopes=ascending,
        fids=[fids[arm.name] for arm in arms],
    )


def _name(a: float) -> str:
    return f"a = {a}"


def _settings(measured: Measured) -> Iterator[Setting]:
    world = World(measured=measured)
    for sampler in ("TPE", "random"):
        for trials in TRIALS:
            yield Setting(sampler=sampler, trials=trials, noise="as measured", world=world)
    for noise, other in (
        ("half", World(measured=measured, noise=0.5)),
        ("double", World(measured=measured, noise=2.0)),
        ("shared by neighbours", World(measured=measured, smooth=True)),
    ):
        yield Setting(sampler="TPE", trials=TRIALS[-1], noise=noise, world=other)


def _regrets(setting: Setting, startup: int, repeats: int) -> dict[str, Array]:
    """[R] true FID of each rule's choice, less the lowest there is."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    truth = setting.world.truth()
    floor = truth(np.linspace(*setting.world.bounds, 2001)).min()
    chosen = [_choices(setting, startup, repeat) for repeat in range(repeats)]
    return {rule: truth(np.array([one[rule] for one in chosen])) - floor for rule in RULES}


def _choices(setting: Setting, startup: int, repeat: int) -> dict[str, float]:
    """The slope that each rule names after one search."""
    generator = np.random.default_rng(repeat)
    found = _search(setting, setting.world.seed(generator), startup, repeat)
    tops = {
        RAW: sorted(range(len(found)), key=lambda index: found[index].value)[:TOP],
        MEAN: candidates(found, TOP),
    }
    # Both rules' candidates meet the same new seeds.
    fresh = [setting.world.seed(generator) for _ in range(FRESH)]
    choices = {}
    for rule, top in tops.items():
        slopes = [float(found[index].point["a"]) for index in top]
        choices[rule] = slopes[0]
        choices |= _second_stage(rule, found, slopes, fresh)
    return choices


def _second_stage(
    rule: str, found: list[Evaluation], slopes: list[float], seeds: Sequence[Student]
) -> dict[str, float]:
    """The candidate of lowest mean over fresh seeds, and of lowest GP mean of all there is."""
    again = [
        [_evaluation(a, seed(a), f"fresh {i}") for a in slopes] for i, seed in enumerate(seeds)
    ]
    fresh = np.array([[one.value for one in row] for row in again]).mean(axis=0)
    everything = found + [one for row in again for one in row]
    pooled = posterior_means(everything, [{"a": a} for a in slopes])
    return {
        AGAIN[rule, "fresh mean"]: slopes[int(np.argmin(fresh))],
        AGAIN[rule, "pooled GP"]: slopes[int(np.argmin(pooled))],
    }


def _search(setting: Setting, student: Student, startup: int, seed: int) -> list[Evaluation]:
    """A real Optuna search; all its trials share one training seed, as a study's do."""
    if setting.sampler == "TPE":
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)
    else:
        sampler = optuna.samplers.RandomSampler(seed=seed)
    study = optuna.create_study(sampler=sampler)
    low, high = setting.world.bounds
    study.optimize(lambda trial: student(trial.suggest_float("a", low, high)), setting.trials)
    return [_evaluation(trial.params["a"], trial.value, "search") for trial in study.trials]


def _evaluation(a: float, value: float, group: str) -> Evaluation:
    return Evaluation(point={"a": a}, value=value, group=group)


def _body(measured: Measured, results: dict[Setting, dict[str, Array]], repeats: int) -> str:
    names = [_name(a) for a in measured.slopes]
    fids = dict(zip(names, measured.fids, strict=True))
    reference = _name(min(measured.slopes, key=abs))
    return f"""\
{measured.conditions}

{fid_table(fids, measured.seeds, reference)}

{_noise(measured)}

Choosing by one seed's values alone, judged by the other seeds' mean:

{_held_out(measured)}

Regret over {repeats} searches of each kind, the true FID of the choice less the lowest there is:
mean / 90th percentile (ratio of means to that of {RAW}).

- {RAW}: the trial of lowest value.
- {MEAN}: the trial of lowest posterior mean of a Gaussian process (search.analysis.surrogate).
- top {TOP}: the rule's {TOP} candidates are trained again with {FRESH} fresh seeds each, \
{TOP * FRESH} trainings
  more; of them that of lowest mean over the fresh seeds, or of lowest posterior mean
  given the search and those.
- {MEAN} less {RAW}: of mean regrets, paired by search, with a 95 % interval.

{_regret_table(results)}

{_reading(results)}"""


def _noise(measured: Measured) -> str:
    residuals = measured.residuals()
    truth = World(measured=measured).truth()
    off = np.array(measured.fids).mean(axis=1) - truth(np.array(measured.slopes))
    neighbours = (residuals[1:] * residuals[:-1]).sum() / (residuals**2).sum()
    return f"""\
- seeds' offsets: std {measured.seed_spread():.3f}
- residuals, without the means of slopes and seeds: std {residuals.std():.3f}, scaled up for the
  degrees of freedom that those took
- residuals of neighbouring slopes: correlation {neighbours:+.2f}; of independent ones it would be
  about {-1 / len(residuals):+.2f}
- true curve of the simulation: the polynomial of degree {DEGREE} nearest to the slopes' means, off
  them by {np.sqrt(np.mean(off**2)):.3f} (root mean square)"""


def _held_out(measured: Measured) -> str:
    rows = []
    for index, seed in enumerate(measured.seeds):
        found = [
            _evaluation(a, row[index], "search")
            for a, row in zip(measured.slopes, measured.fids, strict=True)
        ]
        judged = np.delete(np.array(measured.fids), index, axis=1).mean(axis=1)
        raw = int(np.argmin([one.value for one in found]))
        row = [f"seed {seed}"]
        for pick in (raw, candidates(found, 1)[0]):
            row += [measured.slopes[pick], f"{judged[pick]:.3f}"]
        rows.append([*row, f"{judged.min():.3f}"])
    return table(["chosen by", f"{RAW}: a", "FID", f"{MEAN}: a", "FID", "lowest possible"], rows)


def _regret_table(results: dict[Setting, dict[str, Array]]) -> str:
    rows = []
    for setting, regrets in results.items():
        base = regrets[RAW].mean()
        cells = [
            f"{of.mean():.4f} / {np.quantile(of, 0.9):.4f} ({of.mean() / base:.2f})"
            for of in regrets.values()
        ]
        gain = paired_difference(*(dict(enumerate(regrets[rule])) for rule in (MEAN, RAW)))
        kind = f"{setting.sampler}, {setting.trials} trials, noise {setting.noise}"
        rows.append([kind, *cells, gain.text(4)])
    return table(["search", *RULES, f"{MEAN} less {RAW}"], rows)


def _reading(results: dict[Setting, dict[str, Array]]) -> str:
    ratios = {
        rule: [regrets[rule].mean() / regrets[RAW].mean() for regrets in results.values()]
        for rule in RULES[1:]
    }
    texts = [f"{rule} {min(each):.2f} to {max(each):.2f}" for rule, each in ratios.items()]
    return f"""\
Ratios over all rows: {"; ".join(texts)}.
Each student's noise is its own but in the last row: there neighbouring slopes share it as long as
they share a training seed, where no surrogate can average it away and fresh seeds can."""


if __name__ == "__main__":
    main()
