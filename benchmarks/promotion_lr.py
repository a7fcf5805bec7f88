"""Progressive distillation at half, once and twice a promotion's lr, for plain and uniform PD.

Each arm at its own best step size is what a fair comparison takes; a promotion runs all its arms
at one lr, which this shows to starve none of them, or not.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from search.analysis.promotion import PLAIN_PD
from search.spec.study_file import read_promotion
from search.worker.chain_engine import check_promotion
from search.worker.chain_trial import ChainAssets, load_chain, prepare_chain, train_and_measure

from benchmarks.common import parser, publish, table
from search.study.arms import UNIFORM, Arm
from search.worker.assets import use_device

LR_FACTORS = (0.5, 1.0, 2.0)
PROMOTION = Path("studies/promote-digits.yaml")


def main() -> None:
    """Distil, judge and print."""
    options = parser(__doc__)
    options.add_argument(
        "--promotion", type=Path, default=PROMOTION, metavar="FILE", help="default: %(default)s"
    )
    options.add_argument(
        "--factors",
        type=float,
        nargs="+",
        default=LR_FACTORS,
        metavar="F",
        help="times the promotion's lr (default: 0.5 1 2)",
    )
    options.add_argument(
        "--a", type=float, nargs="*", default=[], help="also weights of these slopes"
    )
    options.add_argument(
        "--seeds", type=int, nargs="+", default=[0], metavar="SEED", help="training seeds"
    )
    given = options.parse_args()
    spec = read_promotion(given.promotion)
    check_promotion(spec)
    device = use_device(spec)
    prepare_chain(spec, device, lambda what, done, total, remark: None)
    publish("promotion_lr", _body(load_chain(spec, device), given), write=given.write)


def _body(assets: ChainAssets, given: argparse.Namespace) -> str:
    spec = assets.spec
    slopes = [Arm(name=f"a {a:g}", params={"a": a, "b": 0.0}) for a in given.a]
    steps = spec.chain.steps[1:]
    header = ["arm", "lr", *(f"{n} steps" for n in steps), "geometric mean"]
    rows, best = [], {}
    for arm in (PLAIN_PD, UNIFORM, *slopes):
        for factor in given.factors:
            lr = factor * spec.round.lr
            means = _fids(assets, arm, lr, given.seeds, steps)
            overall = statistics.geometric_mean(means)
            best[arm.name] = min(best.get(arm.name, (float("inf"), 0.0)), (overall, factor))
            rows.append(
                [arm.name, f"{lr:.3g}", *(f"{fid:.3f}" for fid in means), f"{overall:.3f}"]
            )
    reading = ", ".join(f"{name}: x {factor:g}" for name, (_, factor) in best.items())
    return f"""\
FID of students of promotion {spec.name}: {spec.round.updates} updates a round at batch \
{spec.round.batch}, {spec.evaluation.images} images,
extractor {spec.evaluation.extractor}, training seeds {given.seeds}, latents of seed \
{spec.seeds.evaluation}; the teacher at {spec.chain.first} steps:
{assets.teacher_fid["value"]:.3f}.

{table(header, rows)}

Best step size, by the geometric mean over the rounds: {reading}."""


def _fids(
    assets: ChainAssets, arm: Arm, lr: float, seeds: Sequence[int], steps: Sequence[int]
) -> list[float]:
    """Mean FID over the seeds at each number of steps."""
    at_lr = assets.spec.round.model_copy(update={"lr": lr})
    own = replace(assets, spec=assets.spec.model_copy(update={"round": at_lr}))
    found: dict[int, list[float]] = {n: [] for n in steps}
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            result = train_and_measure(
                own,
                arm,
                seed,
                Path(folder) / "row",
                check=lambda: None,
                report=lambda _: None,
                on_fid=lambda n, fid: sys.stderr.write(f"{arm.name}, lr {lr:g}: {n} {fid:.3f}\n"),
            )
        for n in steps:
            found[n].append(float(result["attrs"]["fids"][str(n)]["value"]))
    return [statistics.fmean(found[n]) for n in steps]


if __name__ == "__main__":
    main()
