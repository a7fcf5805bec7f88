"""EPD beside solvers without learned numbers, at equal calls of both kinds.

``python -m benchmarks.epd`` learns tables for the teacher of studies/digits-nfe2.yaml, or of
another that trains its own, and measures the FID of its images by each sampler. A solver is
compared with EPD at as many network evaluations, and at as many calls one after another.
"""

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bdense.diffusion.sampling import Sampler, draw_images
from bdense.diffusion.solvers import make_solver
from bdense.methods.epd import EPDConfig, EPDMethod
from bdense.metrics.metrics import measure_images
from bdense.metrics.records import FID
from bdense.training.loop import train
from bdense.weights.weighting import FixedWeights
from benchmarks.common import DIGITS_STUDY, ROOT, parser, publish, table
from search.spec.file import read_spec
from search.spec.study import StudySpec
from search.worker.assets import Assets, load, use_device

# Steps of EPD with two points and AFS: 5 evaluations in 3 calls, 8 in 5.
STEPS, POINTS = (2, 3), 2
FIXED = ("euler", "dpm2", "dpmpp")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A sampler, and the FIDs of its images by seed.

    Attributes:
        seconds: Of CPU, to learn one table; 0 without.
    """

    name: str
    sampler: Sampler
    fids: list[FID]
    seconds: float = 0.0


def main() -> None:
    """Learn, measure, print."""
    options = parser(__doc__)
    options.add_argument(
        "--study",
        type=Path,
        default=ROOT / DIGITS_STUDY,
        metavar="FILE",
        help=f"whose teacher, data and extractor are taken (default: {DIGITS_STUDY})",
    )
    options.add_argument("--seeds", type=int, default=3, help="of tables and latents")
    options.add_argument("--images", type=int, default=4096)
    options.add_argument("--kimg", type=float, default=2.56)
    options.add_argument("--lr", type=float, default=0.2)
    options.add_argument("--max-order", type=int, nargs="+", default=[1], help="1: EPD")
    given = options.parse_args()
    spec = read_spec(given.study)
    assets = load(spec, use_device(spec))
    seeds = range(given.seeds)
    rows = []
    for steps in STEPS:
        for max_order in given.max_order:
            config = EPDConfig(
                steps=steps,
                points=POINTS,
                max_order=max_order,
                substeps=4,
                batch=32,
                kimg=given.kimg,
                lr=given.lr,
            )
            rows.append(learned(assets, config, given.images, seeds))
            show(rows[-1])
    budgets = {each for row in rows for each in (row.sampler.nfe, row.sampler.sequential_nfe)}
    for name in FIXED:
        for nfe in sorted(budgets):
            sampler = fixed(name, nfe)
            fids = [fid(assets, sampler, given.images, seed) for seed in seeds]
            rows.append(Row(name=name, sampler=sampler, fids=fids))
            show(rows[-1])
    publish("epd", "\n\n".join(report(rows, spec, given.images)), write=given.write)


def learned(assets: Assets, config: EPDConfig, images: int, seeds: range) -> Row:
    """Tables of several seeds."""
    method, fids, seconds = EPDMethod(), [], 0.0
    (plan,) = method.plan(config)
    for seed in seeds:
        stage = method.stage(plan, assets.teacher, config, assets.inputs(seed))
        began = time.process_time()
        train(stage, FixedWeights(torch.ones(1)))
        seconds += (time.process_time() - began) / len(seeds)
        fids.append(fid(assets, stage.sampler, images, seed))
    name = "EPD" if config.max_order == 1 else "EPD plug-in"
    return Row(name=name, sampler=stage.sampler, fids=fids, seconds=seconds)


def fixed(name: str, nfe: int) -> Sampler:
    """That solver at so many evaluations, with AFS where that makes whole steps."""
    solver = make_solver(name)
    steps, rest = divmod(nfe + 1, solver.nfe(1))
    afs = rest == 0
    return Sampler(num_intervals=steps if afs else nfe // solver.nfe(1), afs=afs, solver=solver)


def fid(assets: Assets, sampler: Sampler, images: int, seed: int) -> FID:
    """Of the teacher's images by that sampler."""
    evaluator = assets.evaluator
    drawn = draw_images(assets.teacher, sampler, images, seed=seed)
    return measure_images(
        drawn,
        evaluator.extractor,
        evaluator.reference,
        nfe=sampler.nfe,
        seeds={"evaluation": seed},
    ).fid


def show(row: Row) -> None:
    """A line of progress."""
    values = " ".join(f"{each.value:.2f}" for each in row.fids)
    calls = f"{row.sampler.nfe} evaluations in {row.sampler.sequential_nfe} calls"
    print(f"{row.name}, {calls}: {values}, {row.seconds:.0f} s", flush=True)


def report(rows: list[Row], spec: StudySpec, images: int) -> Iterator[str]:
    """A table for each size of EPD."""
    header = (
        *("sampler", "steps", "AFS", "evaluations", "calls in a row"),
        *("FID", "s.e. over seeds", "s.e. over latents", "CPU s to learn"),
    )
    yield (
        f"{spec.data}, the teacher of study {spec.name}, FID of {images} images in the features "
        f"of {spec.evaluation.extractor}; mean over {len(rows[0].fids)} seeds of table and "
        "latents. The standard error over latents is that of one seed's FID."
    )
    for steps in STEPS:
        own = [row for row in rows if row.seconds and row.sampler.num_intervals == steps]
        nfe, calls = own[0].sampler.nfe, own[0].sampler.sequential_nfe
        yield f"## EPD of {steps} steps"
        others = [row for row in rows if not row.seconds]
        for title, count in (("evaluations", nfe), ("calls in a row", calls)):
            beside = [row for row in others if row.sampler.nfe == count]
            yield f"At {count} {title}:"
            yield table(header, [_cells(row) for row in (*own, *beside)])


def _cells(row: Row) -> tuple[object, ...]:
    values = [each.value for each in row.fids]
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    noise = statistics.mean(each.noise or math.nan for each in row.fids)
    sampler = row.sampler
    return (
        *(row.name, sampler.num_intervals, "yes" if sampler.afs else "no"),
        *(sampler.nfe, sampler.sequential_nfe),
        *(f"{statistics.mean(values):.2f}", f"{spread:.2f}", f"{noise:.2f}"),
        f"{row.seconds:.0f}" if row.seconds else "-",
    )


if __name__ == "__main__":
    main()
