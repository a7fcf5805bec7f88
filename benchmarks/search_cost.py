"""What it costs to find branch weights, replayed from the bank of digits students.

``python -m benchmarks.search_cost`` draws searches from benchmarks/data/digits-bank.csv. The true
FID of a slope is its mean over the bank's seeds and latents; between slopes it is interpolated. A
training seed adds a random curve over the slope whose covariance is that of the bank's seeds, and
a set of latents one whose covariance is that of the bank's latents, so that a replay meets seeds
that are not the few of the bank. All costs are in seconds of training and evaluation.

A procedure has found its point at a cost if, in 80 % of the replays, the true FID of what it would
choose there is within 2 % of the lowest; from there to its end, a lucky moment does not count.

The paper's procedure: 50 trials by TPE over (a, b), each of which computes its trajectories live;
the lowest FID wins. Other searches record trajectories once, search a alone and share one seed.
Ours: plain distillation and uniform weights under three seeds, then trials, then a confirmation of
three candidates under three fresh seeds; the simplest arm within a tie is chosen. With short
trainings (``--short KIMG``, a budget that the bank has, too) the study's own rule chooses what is
trained next; the noise of the two budgets is drawn apart, though their seeds are the same.
"""

import csv
import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import optuna
from scipy.interpolate import PchipInterpolator
from scipy.stats.qmc import Sobol

from bdense.metrics.records import FID
from benchmarks.bank import BANK
from benchmarks.common import DIGITS_STUDY, ROOT, parser, publish, table
from search.analysis.comparison import ArmResult, Comparison
from search.analysis.recommendation import recommend
from search.analysis.short_trainings import NUM_POINTS, next_training
from search.analysis.surrogate import Observation, candidates
from search.spec.file import read_spec
from search.spec.metric import Metric
from search.study.arms import Arm
from search.worker.cost import measure

Array = npt.NDArray[np.float64]

TRIALS, WITHIN, SHARE, LOW, HIGH = 50, 1.02, 0.8, -1.0, 2.0
REPLICATES, CANDIDATES, TRAININGS = 3, 3, 16
LOOKS = (4, 6, 8, 12, 16, 24, 32, 50)  # numbers of trials after which a surrogate is fitted
PLAIN = math.inf  # the slope that leaves the end point alone


@dataclass(frozen=True)
class Costs:
    """Seconds: of a student with its FID, and of one seed's trajectories."""

    student: float
    trajectories: float


class Bank:
    """FIDs over the slope, at one budget and recipe.

    Args:
        recipe: As the bank names it.
        kimg: The budget.
    """

    def __init__(self, recipe: str, kimg: float) -> None:
        rows: dict[tuple[int, int], dict[float, float]] = defaultdict(dict)
        with BANK.open(newline="") as file:
            for row in csv.DictReader(file):
                if (row["recipe"], float(row["kimg"]), float(row["at"])) == (recipe, kimg, 1.0):
                    a = PLAIN if row["a"] == "plain" else float(row["a"])
                    rows[int(row["seed"]), int(row["latents"])][a] = float(row["fid"])
        self.recipe = recipe
        self.slopes = sorted(set.union(*(set(each) for each in rows.values())))
        whole = {key: each for key, each in rows.items() if len(each) == len(self.slopes)}
        seeds, latents = (sorted(set(each)) for each in zip(*whole, strict=True))
        # [seeds, latents, slopes]
        fids = np.array(
            [[[whole[s, lat][a] for a in self.slopes] for lat in latents] for s in seeds]
        )
        self.seeds, self.latents = len(seeds), len(latents)
        self.mean: Array = fids.mean(axis=(0, 1))
        self.of_seeds: Array = fids.mean(axis=1) - self.mean
        self.of_latents: Array = fids.mean(axis=0) - self.mean
        self._true = PchipInterpolator(self.slopes[:-1], self.mean[:-1])
        self.best = min(map(self.true, np.linspace(LOW, HIGH, 301)))

    def true(self, a: float) -> float:
        """The true FID of a slope."""
        return float(self.mean[-1]) if a == PLAIN else float(self._true(a))

    def is_found(self, a: float) -> bool:
        """Whether its true FID is within 2 % of the lowest."""
        return self.true(a) <= WITHIN * self.best


class Replay:
    """A world in which searches are replayed: seeds and latents as they might have come.

    Args:
        bank: Where the FIDs come from.
        draw: Of the seeds' and latents' curves.
        noise: What remains of the bank's noise.
    """

    def __init__(self, bank: Bank, draw: np.random.Generator, noise: float) -> None:
        self.bank, self._draw, self._noise = bank, draw, noise
        self._curves: dict[tuple[str, int], Callable[[float], float]] = {}

    def beside(self, bank: Bank) -> "Replay":
        """Another budget's world, with as much of its noise, drawn apart."""
        return Replay(bank, self._draw.spawn(1)[0], self._noise)

    def fid(self, a: float, seed: int, latents: int) -> float:
        """Of one student."""
        shift = self._curve("seed", seed)(a) + self._curve("latents", latents)(a)
        return self.bank.true(a) + shift

    def _curve(self, kind: str, number: int) -> Callable[[float], float]:
        if (kind, number) not in self._curves:
            rows = self.bank.of_seeds if kind == "seed" else self.bank.of_latents
            # Normal, with the sample covariance of the bank's rows, which have mean 0.
            shares = self._draw.standard_normal(len(rows)) / math.sqrt(len(rows) - 1)
            values = self._noise * shares @ rows
            finite = PchipInterpolator(self.bank.slopes[:-1], values[:-1])
            plain = float(values[-1])
            self._curves[kind, number] = lambda a: plain if a == PLAIN else float(finite(a))
        return self._curves[kind, number]


# A search tells what it would choose, and what it has spent until then.
Choices = Iterator[tuple[float, float]]


def proposed(
    world: Replay, sampler: optuna.samplers.BaseSampler, *, with_b: bool, one_seed: bool
) -> Iterator[tuple[float, float]]:
    """Slopes that a sampler of Optuna's proposes, and their FIDs."""
    study = optuna.create_study(sampler=sampler)
    for number in range(TRIALS):
        trial = study.ask()
        a = trial.suggest_float("a", LOW, HIGH)
        if with_b:  # under Adam it changes nothing
            trial.suggest_float("b", -6.0, 0.0)
        seed = 0 if one_seed else number
        fid = world.fid(a, seed, seed)
        study.tell(trial, fid)
        yield a, fid


def independent(
    world: Replay,
    costs: Costs,
    sampler: optuna.samplers.BaseSampler,
    *,
    live: bool,
    one_seed: bool,
    by_mean: bool,
) -> Choices:
    """Trials alone; the lowest FID is chosen, or the lowest posterior mean."""
    spent = 0.0 if live else costs.trajectories
    seen: list[tuple[float, float]] = []
    for a, fid in proposed(world, sampler, with_b=live, one_seed=one_seed):
        seen.append((a, fid))
        spent += costs.student + (costs.trajectories if live else 0.0)
        if not by_mean:
            yield min(seen, key=lambda one: one[1])[0], spent
        elif len(seen) in LOOKS:
            yield seen[_order(seen, 1)[0]][0], spent


def _order(seen: Sequence[tuple[float, float]], count: int) -> list[int]:
    return candidates([Observation(point={"a": a}, value=f, group="") for a, f in seen], count)


@dataclass(frozen=True)
class Short:
    """Short trainings: their world, their length in those of a trial, and a student's cost."""

    world: Replay
    length: float
    student: float


def ours(
    world: Replay,
    costs: Costs,
    sampler: optuna.samplers.BaseSampler,
    *,
    trials: int,
    short: Short | None = None,
) -> Choices:
    """What a study recommends as it goes on."""
    own, fresh = range(REPLICATES), range(TRIALS, TRIALS + REPLICATES)
    spent = 0.0
    for count in range(1, REPLICATES + 1):
        spent += costs.trajectories
        for done in (1, 2):
            spent += costs.student
            arms = [PLAIN, 0.0] if count > 1 or done == 2 else [PLAIN]
            whole = {a: own[: count if done == 2 or a == PLAIN else count - 1] for a in arms}
            yield chosen(world, whole, lambda _: 0), spent
    seen = [_observed(world, 0.0)]
    if short is None:
        searched = sampled(world, costs, sampler)
    else:
        searched = chosen_by_surrogate(world, costs, short, seen)
    for each, cost in itertools.islice(searched, trials):
        seen.append(each)
        spent += cost
        yield chosen(world, {PLAIN: own, 0.0: own}, lambda _: 0), spent
    full = [i for i, each in enumerate(seen) if each.log_length == 0]
    order = candidates(seen, CANDIDATES, among=full, taken=[0])
    points = [seen[i].point["a"] for i in order]
    judged = dict.fromkeys([PLAIN, 0.0, *points], fresh)
    spent += len(fresh) * (costs.trajectories + len(judged) * costs.student)
    yield chosen(world, judged, lambda seed: seed), spent


# What was trained, and its cost.
Trained = Iterator[tuple[Observation, float]]


def sampled(world: Replay, costs: Costs, sampler: optuna.samplers.BaseSampler) -> Trained:
    """Trials at the points of a sampler."""
    for a, _ in proposed(world, sampler, with_b=False, one_seed=True):
        yield _observed(world, a), costs.student


def chosen_by_surrogate(
    world: Replay, costs: Costs, short: Short, before: Sequence[Observation]
) -> Trained:
    """Trials and short trainings as ``plan.short`` has them, of uniform weights first."""
    spread = Sobol(1, scramble=False).random(NUM_POINTS)[:, 0]
    points = [{"a": LOW + (HIGH - LOW) * float(share)} for share in spread]
    seen, recording = list(before), short.length * costs.trajectories
    a, is_short = 0.0, True
    while True:
        seen.append(_observed(short.world, a, short.length) if is_short else _observed(world, a))
        yield seen[-1], recording + (short.student if is_short else costs.student)
        recording = 0.0
        found = next_training(
            seen,
            points,
            length=short.length,
            whole=[each.point for each in seen if each.log_length == 0],
            short=[each.point for each in seen if each.log_length < 0],
            pending=[],
        )
        assert found is not None
        a, is_short = points[found[0]]["a"], found[1]


def by_surrogate(world: Replay, costs: Costs, short: Short) -> Choices:
    """Trials and short trainings alone; the lowest posterior mean of a full training is chosen."""
    spent, seen = costs.trajectories, list[Observation]()
    for each, cost in itertools.islice(chosen_by_surrogate(world, costs, short, []), TRAININGS):
        seen.append(each)
        spent += cost
        yield seen[candidates(seen, 1)[0]].point["a"], spent


def _observed(world: Replay, a: float, length: float = 1.0) -> Observation:
    """Of the search's seed and latents."""
    return Observation(
        point={"a": a},
        value=world.fid(a, 0, 0),
        group=f"length {length:g}",
        log_length=math.log(length),
    )


def chosen(
    world: Replay, seeds: Mapping[float, Sequence[int]], latents: Callable[[int], int]
) -> float:
    """The slope of the arm that bdense's own rule recommends by these FIDs."""
    names = {PLAIN: "plain", 0.0: "uniform"}
    results = [
        ArmResult(
            arm=Arm(name=str(a), params={"baseline": names[a]} if a in names else {"a": a}),
            figures={seed: _record(world.fid(a, seed, latents(seed)), seed) for seed in of},
            rows={},
        )
        for a, of in seeds.items()
    ]
    found = recommend(
        Comparison(
            metric=Metric(), baselines=("plain", "uniform"), variant={}, results=tuple(results)
        )
    )
    assert found is not None
    return float(found.arm.name)


def _record(value: float, seed: int) -> FID:
    return FID(
        value=value,
        images=4096,
        reference="digits",
        reference_images=1797,
        extractor="digits-classifier",
        extractor_sha256="",
        nfe=2,
        seeds={"training": seed},
    )


@dataclass(frozen=True)
class Finding:
    """What came of a procedure's replays.

    Attributes:
        cost: Seconds from which on ``SHARE`` of the replays have found their point; None if never.
        share: Of the replays that have found it at the end.
        spent: Seconds at the end, median.
    """

    cost: float | None
    share: float
    spent: float


def finding(bank: Bank, replays: Sequence[Sequence[tuple[float, float]]]) -> Finding:
    """Of replays that each tell choices and costs, all after the same steps."""
    steps = [*zip(*replays, strict=True)]
    shares = [statistics.fmean(bank.is_found(a) for a, _ in step) for step in steps]
    costs = [statistics.median(spent for _, spent in step) for step in steps]
    late = [i for i, share in enumerate(shares) if share < SHARE]
    first = late[-1] + 1 if late else 0
    cost = costs[first] if first < len(steps) else None
    return Finding(cost=cost, share=shares[-1], spent=costs[-1])


def main() -> None:
    """Replay, print, and write where asked."""
    options = parser(__doc__)
    options.add_argument("--replays", type=int, default=200)
    options.add_argument("--gp-replays", type=int, default=40, help="of GPSampler, which is slow")
    options.add_argument("--recipes", nargs="+", default=["step-last", "step-tail"])
    options.add_argument("--kimg", type=float, default=12.8)
    options.add_argument("--short", type=float, help="kimg of short trainings; none by default")
    given = options.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    spec = read_spec(ROOT / DIGITS_STUDY)
    one = measure(spec)
    assert one is not None
    drawing = spec.evaluation.num_images * (2 * one.draw_seconds + one.feature_seconds)

    def costs_of(kimg: float) -> Costs:
        updates = kimg * 1000 / spec.resolved.batch
        return Costs(updates * one.update_seconds + drawing, updates * one.recording_seconds)

    costs = costs_of(given.kimg)
    samplers: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
        "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
        "TPE": lambda seed: optuna.samplers.TPESampler(seed=seed),
        "GP": lambda seed: optuna.samplers.GPSampler(seed=seed),
    }
    procedures: dict[str, tuple[str, Callable[..., Choices]]] = {
        "the paper's: TPE over (a, b), live, a seed each, lowest FID": (
            "TPE",
            lambda w, s: independent(w, costs, s, live=True, one_seed=False, by_mean=False),
        ),
        "the same, one seed": (
            "TPE",
            lambda w, s: independent(w, costs, s, live=True, one_seed=True, by_mean=False),
        ),
    }
    for name, by_mean in itertools.product(samplers, (False, True)):
        label = f"{name}, recorded, one seed, {'posterior mean' if by_mean else 'lowest FID'}"
        procedures[label] = (
            name,
            lambda w, s, by_mean=by_mean: independent(
                w, costs, s, live=False, one_seed=True, by_mean=by_mean
            ),
        )
    for trials in (0, 8):
        procedures[f"ours, {trials} trials"] = (
            "TPE",
            lambda w, s, trials=trials: ours(w, costs, s, trials=trials),
        )
    if given.short is not None:
        shorts = {recipe: Bank(recipe, given.short) for recipe in given.recipes}

        def short_of(world: Replay) -> Short:
            beside = world.beside(shorts[world.bank.recipe])
            return Short(beside, given.short / given.kimg, costs_of(given.short).student)

        # As slow as GPSampler, which proposes nothing here.
        procedures[f"short trainings of {given.short:g} kimg, one seed, posterior mean"] = (
            "GP",
            lambda w, s: by_surrogate(w, costs, short_of(w)),
        )
        procedures[f"ours, 8 trainings, short ones of {given.short:g} kimg among them"] = (
            "GP",
            lambda w, s: ours(w, costs, s, trials=8, short=short_of(w)),
        )
    rows = []
    for recipe, noise in itertools.product(given.recipes, (1.0, 0.5)):
        bank = Bank(recipe, given.kimg)
        usual: float | None = None
        for label, (sampler, procedure) in procedures.items():
            count = given.gp_replays if sampler == "GP" else given.replays
            found = finding(
                bank,
                [
                    list(
                        procedure(
                            Replay(bank, np.random.default_rng(seed), noise),
                            samplers[sampler](seed),
                        )
                    )
                    for seed in range(count)
                ],
            )
            usual = found.spent if usual is None else usual
            cost = "never" if found.cost is None else f"{found.cost:.0f}"
            ratio = "" if found.cost is None else f"{found.cost / usual:.3f}"
            rows.append(
                (
                    f"{recipe}, {noise:g} of the noise: {label}",
                    count,
                    cost,
                    ratio,
                    f"{100 * found.share:.0f} %",
                    f"{found.spent:.0f}",
                )
            )
    header = (
        "procedure",
        "replays",
        "seconds to find",
        "of the paper's 50 trials",
        "found at the end",
        "seconds at the end",
    )
    bank = Bank(given.recipes[0], given.kimg)
    body = (
        f"{given.kimg:g} kimg, {bank.seeds} seeds and {bank.latents} sets of latents in the bank. "
        f"A student takes {costs.student:.1f} s, one seed's trajectories "
        f"{costs.trajectories:.1f} s.\n\n{table(header, rows)}"
    )
    publish("search_cost", body, write=given.write)


if __name__ == "__main__":
    main()
