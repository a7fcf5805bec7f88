"""Does a one-shot curve rank slopes as separate trainings do? Digits, against the bank.

``python -m benchmarks.one_shot`` trains one-shot students that benchmarks/data/digits-one-shot.csv
lacks, told the slope of the normalised space, measures them at the bank's slopes from the bank's
latents, and compares: Spearman's rank correlation with the bank's mean FIDs over its seeds, the
regret of the slope that a curve would choose, and the seconds that each side takes.
"""

import csv
import dataclasses
import itertools
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from scipy.stats import spearmanr

from bdense.diffusion.branches import export_branch
from bdense.methods.one_shot import Coordinates, OneShot
from bdense.training.loop import train
from bdense.weights.log_linear import NormalisedSpace, uniform_weights
from bdense.weights.weighting import FixedWeights
from benchmarks.bank import BANK, IMAGES, SLOPES, TAIL
from benchmarks.common import DIGITS_STUDY, ROOT, parser, publish, table
from search.spec.file import read_spec
from search.worker.assets import Assets, load, use_device

CURVES = ROOT / "benchmarks" / "data" / "digits-one-shot.csv"
HEADER = ("length", "seed", "a", "latents", "fid", "training_seconds", "evaluation_seconds")
KIMG, RECIPE, LATENTS = 12.8, "step-tail", (1000, 1001)
POINTS = tuple(float(a) for a in SLOPES if a != "plain")


def main() -> None:
    """Train what is missing, and compare."""
    options = parser(__doc__)
    options.add_argument("--lengths", type=float, nargs="+", default=[3.0, 1.0])
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = options.parse_args()
    there = {(row["length"], row["seed"]) for row in read(CURVES)}
    wanted = list(itertools.product(given.lengths, given.seeds))
    missing = [(n, seed) for n, seed in wanted if (f"{n:g}", str(seed)) not in there]
    if missing:
        spec = read_spec(ROOT / DIGITS_STUDY)
        assets = load(spec, use_device(spec))
        for length, seed in missing:
            measure(assets, length, seed)
    publish("one_shot", comparison(), write=given.write)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a table; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def measure(assets: Assets, length: float, seed: int) -> None:
    """Train one student and append its FIDs."""
    own = assets.method.Config.read({**assets.spec.method.options, "kimg": KIMG, "tail": TAIL})
    config, branches = own.for_one_shot(length), own.num_branches
    space = NormalisedSpace()
    method = OneShot(assets.method, Coordinates(space, branches, space.box))
    (plan,) = method.plan(config, assets.teacher)
    stage = method.stage(plan, assets.teacher, config, assets.inputs(seed))
    began = time.process_time()
    student = export_branch(train(stage, FixedWeights(uniform_weights()(branches)))).eval()
    trained = time.process_time()
    rows = []
    for latents, a in itertools.product(LATENTS, POINTS):
        evaluator = dataclasses.replace(assets.evaluator, latents=latents)
        began_one = time.process_time()
        fid = evaluator.measure(
            method.student_at(student, (a,)),
            stage.sampler,
            training_seed=seed,
            on_image=lambda _: None,
            check=lambda: None,
            images=IMAGES,
        ).fid
        spent = time.process_time() - began_one
        seconds = f"{trained - began:.1f}", f"{spent:.2f}"
        rows.append((f"{length:g}", seed, f"{a:g}", latents, f"{fid.value:.5f}", *seconds))
    new = not CURVES.exists()
    with CURVES.open("a", newline="") as file:
        csv.writer(file).writerows([HEADER, *rows] if new else rows)
    print(f"length {length:g}, seed {seed}: done", file=sys.stderr, flush=True)


def means(rows: Sequence[Mapping[str, str]], latents: Sequence[int]) -> dict[float, float]:
    """Slope -> mean FID over seeds and latents."""
    found: dict[float, list[float]] = {a: [] for a in POINTS}
    for row in rows:
        if row["a"] != "plain" and int(row["latents"]) in latents:
            found[float(row["a"])].append(float(row["fid"]))
    return {a: statistics.fmean(values) for a, values in found.items()}


def comparison() -> str:
    """Both sides, from the two tables."""
    wanted = {"method": "sfd", "kimg": f"{KIMG:g}", "recipe": RECIPE, "at": "1.0"}
    bank = [row for row in read(BANK) if wanted.items() <= row.items()]
    truth, seeds = means(bank, LATENTS), sorted({row["seed"] for row in bank})
    best = min(truth, key=truth.__getitem__)
    curves = read(CURVES)
    keys = sorted({(float(row["length"]), row["seed"]) for row in curves})
    header = ["", *(f"a = {a:g}" for a in POINTS), "Spearman", "chosen a", "regret"]
    lines: list[list[object]] = [
        [f"bank, {len(seeds)} seeds", *(f"{truth[a]:.2f}" for a in POINTS), "", f"{best:g}", ""]
    ]
    for seed in seeds:
        one = means([row for row in bank if row["seed"] == seed], LATENTS)
        lines.append(_line(f"bank, seed {seed}", one, truth))
    for length, seed in keys:
        own = [row for row in curves if (float(row["length"]), row["seed"]) == (length, seed)]
        lines.append(_line(f"one-shot x{length:g}, seed {seed}", means(own, LATENTS), truth))
    trial = statistics.median(float(row["seconds"]) for row in bank)
    told: dict[float, list[float]] = {length: [] for length, _ in keys}
    for row in curves:
        told[float(row["length"])].append(float(row["training_seconds"]))
    evaluation = statistics.median(float(row["evaluation_seconds"]) for row in curves)
    costs = "; ".join(
        f"one-shot x{length:g}: {statistics.median(each):.0f} s" for length, each in told.items()
    )
    return "\n\n".join(
        (
            table(header, lines),
            f"FIDs of {IMAGES} images, mean over latents {', '.join(map(str, LATENTS))}; {KIMG:g} "
            f"kimg, NFE 2, K = 4, recipe {RECIPE}. Spearman and regret are against the bank's "
            "means: of a seed of the bank, which is part of them, too. Regret: the bank's mean at "
            "the chosen slope above its lowest.",
            f"CPU seconds of a training: one slope {trial:.0f} s, so {len(POINTS)} slopes "
            f"{len(POINTS) * trial:.0f} s; {costs}. A FID: {evaluation:.1f} s. "
            "The bank's trainings read recorded trajectories, whose recording is not counted; a "
            "one-shot training computes its own.",
        )
    )


def _line(title: str, found: Mapping[float, float], truth: Mapping[float, float]) -> list[object]:
    chosen = min(found, key=found.__getitem__)
    rank = spearmanr([found[a] for a in POINTS], [truth[a] for a in POINTS]).statistic
    figures = (f"{rank:.2f}", f"{chosen:g}", f"{truth[chosen] - min(truth.values()):.2f}")
    return [title, *(f"{found[a]:.2f}" for a in POINTS), *figures]


if __name__ == "__main__":
    main()
