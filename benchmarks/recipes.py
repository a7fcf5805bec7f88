"""What the bank of digits students says of recipes: which tells slopes apart for the same cost?

``python -m benchmarks.recipes`` reads benchmarks/data/digits-bank.csv. A recipe is a schedule of
the step size with what is taken of the iterates, see ``benchmarks.digits_bank``. Noise is the
standard deviation over training seeds of a slope's difference to a = 0 of the same seed; signal is
the spread of the slopes' mean differences. Seeds to tell: how many order two slopes that differ by
0.2 with 95 % certainty, 2 (1.96 noise / 0.2)^2 / 2.
"""

import csv
import itertools
from collections import defaultdict
from collections.abc import Mapping

import numpy as np
from scipy.stats import spearmanr

from benchmarks.common import parser, publish, table
from benchmarks.digits_bank import BANK

APART = 0.2
# FID by (a, seed), the mean over the latents that every student was measured under.
Students = dict[tuple[str, int], float]


def read_bank() -> dict[tuple[float, str, float], Students]:
    """FIDs of students by kimg, recipe, and the share of the training before they were made."""
    found: dict[tuple[float, str, float], dict[tuple[str, int], list[float]]] = defaultdict(
        lambda: defaultdict(list)
    )
    with BANK.open(newline="") as file:
        for row in csv.DictReader(file):
            key = (float(row["kimg"]), row["recipe"], float(row["at"]))
            found[key][row["a"], int(row["seed"])].append(float(row["fid"]))
    fewest = {key: min(map(len, of.values())) for key, of in found.items()}
    return {
        key: {one: float(np.mean(fids[: fewest[key]])) for one, fids in of.items()}
        for key, of in found.items()
    }


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
    """Print, and write where asked, one table of recipes and one of intermediate students."""
    options = parser(__doc__)
    given = options.parse_args()
    bank = read_bank()
    rows, early = [], []
    slopes = sorted({a for of in bank.values() for a, _ in of}, key=lambda a: (a != "plain", a))
    shown = [a for a in slopes if a != "0"]
    for (kimg, recipe, at), students in sorted(bank.items()):
        apart = differences(students)
        if at == 1.0 and apart:
            noise = _noise(apart)
            means = {a: np.mean(values) for a, values in apart.items()}
            signal = float(np.std([0.0, *means.values()], ddof=1))
            level = np.mean([fid for (a, _), fid in students.items() if a == "0"])
            cells = [f"{means[a]:+.2f}" if a in means else "" for a in shown]
            needed = (1.96 * noise / APART) ** 2
            last = (f"{noise:.3f}", f"{signal / noise:.1f}", f"{max(1, int(np.ceil(needed)))}")
            rows.append((f"{recipe}, {kimg:g} kimg", f"{level:.2f}", *cells, *last))
    for (kimg, recipe, at), schedule in itertools.product(sorted(bank), ("step", "linear")):
        final = bank.get((kimg, f"{schedule}-ema", 1.0))
        if at < 1.0 and final and recipe.startswith(schedule):
            found = _rank_correlation(bank[kimg, recipe, at], final)
            if found is not None:
                early.append((f"{recipe} at {at:g}, {kimg:g} kimg", f"{found:+.2f}"))
    seeds = len({seed for of in bank.values() for _, seed in of})
    header = ("recipe", "FID at a = 0", *shown, "noise", "signal / noise", "seeds to tell 0.2")
    body = (
        f"{seeds} seeds. FID, then each slope's mean difference to a = 0 of the same seed.\n\n"
        f"{table(header, rows)}\n\nSpearman's correlation over the slopes with the final EMA "
        f"student, mean over seeds:\n\n{table(('intermediate student', 'correlation'), early)}"
    )
    publish("recipes", body, write=given.write)


if __name__ == "__main__":
    main()
