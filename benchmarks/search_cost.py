"""What it costs to find branch weights, replayed from the bank of digits students.

``python -m benchmarks.search_cost`` draws searches from benchmarks/data/digits-bank.csv. A student
of slope a, seed and latents has the FID that lies between those of the bank's nearest slopes under
that seed and those latents; the true FID of a is the mean over all seeds and latents. A search has
found its point once the true FID of what it would choose stays within 2 % of the lowest.

The paper's procedure: 50 trials by TPE over (a, b), each of which computes its trajectories live;
the lowest FID wins. Others record the trajectories once and search a alone. Ours: plain
distillation and uniform weights under one seed, then under three, then trials by TPE, then a
confirmation of three candidates under three fresh seeds; the simplest arm within a tie is chosen.
"""

import csv
import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from scipy.interpolate import PchipInterpolator

from bdense.metrics.records import FID
from benchmarks.common import DIGITS_STUDY, ROOT, parser, publish, table
from benchmarks.digits_bank import BANK
from search.analysis.comparison import ArmResult, Comparison
from search.analysis.recommendation import recommend
from search.analysis.surrogate import Observation, candidates
from search.spec.file import read_spec
from search.study.arms import Arm
from search.worker.cost import measure

RECIPES = ("step-last", "step-ema")
TRIALS, WITHIN, LOW, HIGH = 50, 1.02, -1.0, 2.0
SEARCHED, FRESH, CANDIDATES = 8, 3, 3  # of ours: trials, seeds and points of the confirmation
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
        noise: What remains of each student's distance from the mean.
    """

    def __init__(self, recipe: str, kimg: float, noise: float = 1.0) -> None:
        rows: dict[tuple[int, int], dict[float, float]] = defaultdict(dict)
        with BANK.open(newline="") as file:
            for row in csv.DictReader(file):
                if (row["recipe"], float(row["kimg"]), float(row["at"])) == (recipe, kimg, 1.0):
                    a = PLAIN if row["a"] == "plain" else float(row["a"])
                    rows[int(row["seed"]), int(row["latents"])][a] = float(row["fid"])
        slopes = sorted(set.union(*(set(each) for each in rows.values())))
        whole = {
            key: [each[a] for a in slopes]
            for key, each in rows.items()
            if len(each) == len(slopes)
        }
        mean = np.mean([*whole.values()], axis=0)
        near = {key: mean + noise * (np.array(each) - mean) for key, each in whole.items()}
        finite = slopes[:-1]
        self._plain = {key: float(each[-1]) for key, each in near.items()}
        self._curves = {key: PchipInterpolator(finite, each[:-1]) for key, each in near.items()}
        self._true = PchipInterpolator(finite, mean[:-1])
        self._true_plain = float(mean[-1])
        self.seeds = sorted({seed for seed, _ in whole})
        self.latents = sorted({latents for _, latents in whole})
        self.best = min(map(self.true, np.linspace(LOW, HIGH, 301)))

    def fid(self, a: float, seed: int, latents: int) -> float:
        """Of one student."""
        key = seed, latents
        return self._plain[key] if a == PLAIN else float(self._curves[key](a))

    def true(self, a: float) -> float:
        """The mean over seeds and latents."""
        return self._true_plain if a == PLAIN else float(self._true(a))

    def is_found(self, a: float) -> bool:
        """Whether its true FID is within 2 % of the lowest."""
        return self.true(a) <= WITHIN * self.best


# A search tells what it would choose, and what it has spent until then.
Choices = Iterator[tuple[float, float]]


def proposed(
    bank: Bank, sampler: optuna.samplers.BaseSampler, with_b: bool, seed: int, latents: int
) -> Iterator[tuple[float, float]]:
    """Slopes that a sampler of Optuna's proposes, and their FIDs."""
    study = optuna.create_study(sampler=sampler)
    for _ in range(TRIALS):
        trial = study.ask()
        a = trial.suggest_float("a", LOW, HIGH)
        if with_b:  # under Adam it changes nothing
            trial.suggest_float("b", -6.0, 0.0)
        fid = bank.fid(a, seed, latents)
        study.tell(trial, fid)
        yield a, fid


def independent(
    bank: Bank,
    costs: Costs,
    sampler: optuna.samplers.BaseSampler,
    draw: np.random.Generator,
    *,
    live: bool,
    by_mean: bool,
) -> Choices:
    """Trials of one seed; the lowest FID is chosen, or the lowest posterior mean."""
    seed, latents = int(draw.choice(bank.seeds)), int(draw.choice(bank.latents))
    spent = 0.0 if live else costs.trajectories
    seen: list[tuple[float, float]] = []
    for a, fid in proposed(bank, sampler, live, seed, latents):
        seen.append((a, fid))
        spent += costs.student + (costs.trajectories if live else 0.0)
        if not by_mean:
            yield min(seen, key=lambda one: one[1])[0], spent
        elif len(seen) in LOOKS:
            yield seen[_order(seen, 1)[0]][0], spent


def _order(seen: Sequence[tuple[float, float]], count: int) -> list[int]:
    return candidates([Observation(point={"a": a}, value=f, group="") for a, f in seen], count)


def ours(
    bank: Bank, costs: Costs, sampler: optuna.samplers.BaseSampler, draw: np.random.Generator
) -> Choices:
    """What a study recommends as it goes on."""
    seeds = [int(seed) for seed in draw.permutation(bank.seeds)]
    first, second = (int(each) for each in draw.permutation(bank.latents)[:2])
    own, fresh = seeds[:FRESH], seeds[FRESH : 2 * FRESH]
    spent = 0.0
    for count in range(1, FRESH + 1):
        spent += costs.trajectories
        for done in (1, 2):
            spent += costs.student
            arms = [PLAIN, 0.0] if count > 1 or done == 2 else [PLAIN]
            whole = {a: own[: count if done == 2 or a == PLAIN else count - 1] for a in arms}
            yield chosen(bank, whole, first), spent
    seen = [(0.0, bank.fid(0.0, own[0], first))]
    for a, fid in itertools.islice(proposed(bank, sampler, False, own[0], first), SEARCHED):
        seen.append((a, fid))
        spent += costs.student
        yield chosen(bank, {PLAIN: own, 0.0: own}, first), spent
    points = [seen[i][0] for i in _order(seen, CANDIDATES + 1) if seen[i][0] != 0.0]
    arms = dict.fromkeys([PLAIN, 0.0, *points[:CANDIDATES]], fresh)
    spent += FRESH * (costs.trajectories + len(arms) * costs.student)
    yield chosen(bank, arms, second), spent


def chosen(bank: Bank, seeds: Mapping[float, Sequence[int]], latents: int) -> float:
    """The slope of the arm that is recommended by these FIDs, made with bdense's own rule."""
    names = {PLAIN: "plain", 0.0: "uniform"}
    results = [
        ArmResult(
            arm=Arm(name=str(a), params={"baseline": names[a]} if a in names else {"a": a}),
            fids={seed: _record(bank.fid(a, seed, latents), seed) for seed in of},
            rows={},
        )
        for a, of in seeds.items()
    ]
    found = recommend(Comparison(variant={}, results=tuple(results)))
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


def cost_of_finding(bank: Bank, choices: Choices) -> float:
    """Seconds from which on the chosen point is within 2 % of the best; inf if it never is."""
    found = math.inf
    for a, spent in choices:
        if not bank.is_found(a):
            found = math.inf
        elif found == math.inf:
            found = spent
    return found


def main() -> None:
    """Replay, print, and write where asked."""
    options = parser(__doc__)
    options.add_argument("--replays", type=int, default=200)
    options.add_argument("--gp-replays", type=int, default=20, help="of GPSampler, which is slow")
    given = options.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    spec = read_spec(ROOT / DIGITS_STUDY)
    one = measure(spec)
    assert one is not None
    updates = spec.resolved.stages[0].num_updates
    drawing = spec.evaluation.images * (2 * one.draw_seconds + one.feature_seconds)
    costs = Costs(updates * one.update_seconds + drawing, updates * one.recording_seconds)
    samplers: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
        "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
        "TPE": lambda seed: optuna.samplers.TPESampler(seed=seed),
        "GP": lambda seed: optuna.samplers.GPSampler(seed=seed),
    }
    rows = []
    for recipe, noise in itertools.product(RECIPES, (1.0, 0.5)):
        bank = Bank(recipe, 12.8, noise)

        def searches(
            make: Callable[[int, np.random.Generator], Choices], replays: int, bank: Bank = bank
        ) -> list[float]:
            return [
                cost_of_finding(bank, make(seed, np.random.default_rng(seed)))
                for seed in range(replays)
            ]

        found: dict[str, list[float]] = {}
        for live, name, by_mean in [
            (True, "TPE", False),
            *itertools.product([False], samplers, [False, True]),
        ]:
            label = "the paper's: TPE over (a, b), live, lowest FID"
            if not live:
                label = f"{name}, recorded, {'posterior mean' if by_mean else 'lowest FID'}"
            found[label] = searches(
                lambda seed, draw, name=name, live=live, by_mean=by_mean, bank=bank: independent(
                    bank, costs, samplers[name](seed), draw, live=live, by_mean=by_mean
                ),
                given.gp_replays if name == "GP" else given.replays,
            )
        found["ours"] = searches(
            lambda seed, draw, bank=bank: ours(bank, costs, samplers["TPE"](seed), draw),
            given.replays,
        )
        usual = statistics.median(found["the paper's: TPE over (a, b), live, lowest FID"])
        for label, seconds in found.items():
            middle = statistics.median(seconds)
            share = statistics.fmean(map(math.isfinite, seconds))
            ratio = middle / usual if math.isfinite(middle) and math.isfinite(usual) else math.nan
            rows.append(
                (
                    f"{recipe}, {noise:g} of the noise: {label}",
                    len(seconds),
                    f"{100 * share:.0f} %",
                    f"{middle:.0f}" if math.isfinite(middle) else "never",
                    "" if math.isnan(ratio) else f"{ratio:.3f}",
                )
            )
    header = ("procedure", "replays", "found in the end", "median seconds", "of the paper's")
    body = (
        f"{len(Bank(RECIPES[0], 12.8).seeds)} seeds. A student takes {costs.student:.1f} s, one "
        f"seed's trajectories {costs.trajectories:.1f} s.\n\n{table(header, rows)}"
    )
    publish("search_cost", body, write=given.write)


if __name__ == "__main__":
    main()
