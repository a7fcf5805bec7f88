"""Which recipe tells slopes apart for the same cost? From banks of students, and from studies.

``python -m benchmarks.recipes`` reads benchmarks/data/digits-bank.csv, and with ``--bank`` another
one. A recipe is a schedule of the step size with what is taken of the iterates, see
``benchmarks.bank``. Recipes are compared over the students that all of them have at a budget.
Noise is the standard deviation over training seeds of a slope's difference to a = 0 of the same
seed, pooled over the slopes. Seeds to tell 0.2: with so many, a true difference of 0.2 is told
from 0 at 95 % in 80 of 100 cases, ((1.96 + 0.84) noise / 0.2)^2.

``--study JSON`` reads what ``bdense-search trials STUDY --json`` printed of a study of given arms
whose variants are recipes, and compares these in the same way.
"""

import csv
import itertools
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from bdense.weights.space import BASELINE, UNIFORM
from benchmarks.bank import BANK, SLOPES
from benchmarks.common import parser, publish, table
from search.analysis.paired import paired_difference

SHOWN = tuple(a for a in SLOPES if a != "0")
APART, QUANTILES = 0.2, 1.96 + 0.84
# FID by (a, seed).
Students = dict[tuple[str, int], float]


def read_bank(bank: Path) -> dict[tuple[float, str, float], Students]:
    """FIDs of students by kimg, recipe, and the share of the training before they were made.

    Each is a mean over the latents that all students of a budget and share were measured under.
    """
    found: dict[tuple[float, str, float], dict[tuple[str, int], dict[str, float]]] = {}
    with bank.open(newline="") as file:
        for row in csv.DictReader(file):
            key = (float(row["kimg"]), row["recipe"], float(row["at"]))
            fids = found.setdefault(key, {}).setdefault((row["a"], int(row["seed"])), {})
            fids[row["latents"]] = float(row["fid"])
    # Levels and noise compare on the same latents alone.
    shared: dict[tuple[float, float], set[str]] = {}
    for (kimg, _, at), students in found.items():
        for fids in students.values():
            shared.setdefault((kimg, at), {*fids}).intersection_update(fids)
    means = {
        key: {
            one: statistics.fmean(fids[latents] for latents in sorted(shared[key[0], key[2]]))
            for one, fids in students.items()
        }
        for key, students in found.items()
    }
    return means


def differences(students: Students) -> dict[str, list[float]]:
    """Of each slope, over its seeds, to a = 0 of the same seed."""
    apart: dict[str, list[float]] = defaultdict(list)
    for (a, seed), fid in sorted(students.items()):
        if a != "0" and ("0", seed) in students:
            apart[a].append(fid - students["0", seed])
    return {a: values for a, values in apart.items() if len(values) > 1}


def _noise(apart: Mapping[str, list[float]]) -> float:
    """Pooled standard deviation over seeds."""
    return float(np.sqrt(np.mean([np.var(values, ddof=1) for values in apart.values()])))


def _rank_correlation(early: Students, final: Students) -> float | None:
    """Mean over the seeds of Spearman's correlation over the slopes."""
    found = []
    for seed in sorted({seed for _, seed in early}):
        slopes = [a for a, of in early if of == seed and (a, seed) in final]
        if len(slopes) > 3:
            pairs = [(early[a, seed], final[a, seed]) for a in slopes]
            found.append(float(spearmanr(*zip(*pairs, strict=True)).statistic))
    return float(np.mean(found)) if found else None


def main() -> None:
    """Print, and write where asked, the tables of what is given."""
    options = parser(__doc__)
    options.add_argument("--bank", type=Path, default=BANK)
    options.add_argument("--study", type=Path, metavar="JSON")
    given = options.parse_args()
    body = of_bank(given.bank) if given.study is None else of_study(given.study)
    publish("recipes", body, write=given.write)


def of_bank(path: Path) -> str:
    """One table of recipes and one of intermediate students."""
    bank = read_bank(path)
    rows, early = [], []
    for kimg in sorted({kimg for kimg, _, _ in bank}):
        finals = {recipe: of for (k, recipe, at), of in bank.items() if (k, at) == (kimg, 1.0)}
        shared = set.intersection(*map(set, finals.values()))
        for recipe, students in sorted(finals.items()):
            apart = differences({one: students[one] for one in shared})
            if not apart:
                continue
            noise = _noise(apart)
            level = statistics.fmean(students[one] for one in shared if one[0] == "0")
            means = [f"{statistics.fmean(apart[a]):+.2f}" if a in apart else "" for a in SHOWN]
            seeds = f"{min(map(len, apart.values()))} to {max(map(len, apart.values()))}"
            name = f"{recipe}, {kimg:g} kimg"
            needed = _seeds_to_tell(APART, noise)
            rows.append((name, seeds, f"{level:.2f}", *means, f"{noise:.3f}", needed))
    for (kimg, recipe, at), students in sorted(bank.items()):
        final = bank.get((kimg, f"{recipe.partition('-')[0]}-ema", 1.0))
        if at < 1.0 and final and (found := _rank_correlation(students, final)) is not None:
            early.append((f"{recipe} at {at:g}, {kimg:g} kimg", f"{found:+.2f}"))
    header = ("recipe", "seeds", "FID at a = 0", *SHOWN, "noise", "seeds to tell 0.2")
    return (
        f"FID, then each slope's mean difference to a = 0 of the same seed.\n\n"
        f"{table(header, rows)}\n\nSpearman's correlation over the slopes with the final EMA "
        f"student, mean over seeds:\n\n{table(('intermediate student', 'correlation'), early)}"
    )


def of_study(path: Path) -> str:
    """Two tables: each variant of the method, and its arms beside the first variant's."""
    # FID by recipe, arm and seed.
    fids: dict[str, dict[str, dict[int, float]]] = {}
    seconds: dict[str, list[float]] = defaultdict(list)
    for row in json.loads(path.read_text()):
        if row["state"] == "complete":
            settings = (f"{name} {value}" for name, value in row["variant"].items())
            recipe = ", ".join(settings) or "as it is"
            name = row["params"].get(BASELINE) or row["arm"]
            arm = fids.setdefault(recipe, {}).setdefault(name, {})
            arm[row["seed"]] = row["fid"]
            seconds[recipe].append(row["seconds"])
    names = [arm for arm in dict.fromkeys(itertools.chain(*fids.values())) if arm != UNIFORM]
    rows = []
    for recipe, arms in fids.items():
        uniform = arms.get(UNIFORM, {})
        pairs = [paired_difference(arms.get(arm, {}), uniform) for arm in names]
        spreads = [pair.deviation for pair in pairs if pair and pair.deviation is not None]
        if not spreads:
            continue
        noise, level = (
            math.hypot(*spreads) / len(spreads) ** 0.5,
            statistics.fmean(uniform.values()),
        )
        cells = [pair.text("+.2f") if pair else "" for pair in pairs]
        needed, spent = _seeds_to_tell(level / 10, noise), statistics.median(seconds[recipe])
        rows.append(
            (recipe, len(uniform), f"{level:.2f}", *cells, f"{noise:.3f}", needed, f"{spent:.0f}")
        )
    header = ("recipe", "seeds", "uniform", *names, "noise", "seeds to tell 10 %", "seconds")
    named = [UNIFORM, *names]
    first = next(iter(fids), "")
    moved = []
    for recipe, arms in fids.items():
        pairs = [paired_difference(arms.get(a, {}), fids[first].get(a, {})) for a in named]
        if recipe != first:
            moved.append((recipe, *(pair.text("+.2f") if pair else "" for pair in pairs)))
    return (
        f"{path.stem}: FID of uniform weights, and how much more the other arms have, with its "
        f"95 % t interval; seconds of a training with its FID.\n\n{table(header, rows)}\n\n"
        f"How much more each arm has than under '{first}', paired by seed:\n\n"
        f"{table(('recipe', *named), moved)}"
    )


def _seeds_to_tell(apart: float, noise: float) -> int:
    return math.ceil((QUANTILES * noise / apart) ** 2)


if __name__ == "__main__":
    main()
