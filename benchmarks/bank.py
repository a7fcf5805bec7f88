"""Train a bank of a study's students, so that later comparisons of searches replay it in seconds.

``python -m benchmarks.bank`` adds to benchmarks/data/digits-bank.csv (``--study``: to the bank of
that study's data), one row for each FID: method, a (a slope, or plain), training seed, kimg,
recipe, at (the share of the training after which the student was measured), latents (seed of 4096
images), fid, seconds (of CPU, the whole training). A training that is there is not made again.
Each gives three recipes: last is the student as it ends, tail the average of the last quarter of
its iterates, ema their moving average, .9 an iteration; a prefix names the step size's schedule.
The method must have one stage: in rounds, an average is the next round's teacher.
"""

import csv
import dataclasses
import itertools
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from bdense.diffusion.branches import export_branch
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.sampling import Sampler, draw_images
from bdense.metrics.metrics import frechet_distance
from bdense.metrics.references import features_of, statistics_of
from bdense.training.loop import Evaluations, train
from bdense.weights import space_of
from benchmarks.common import DIGITS_STUDY, ROOT, parser
from search.spec.file import read_spec
from search.spec.study import StudySpec
from search.worker.assets import Assets, load, use_device

DATA = ROOT / "benchmarks" / "data"
BANK = DATA / "digits-bank.csv"
HEADER = ("method", "a", "seed", "kimg", "recipe", "at", "latents", "fid", "seconds")
SLOPES = ("plain", "-1", "-0.6", "-0.3", "0", "0.2", "0.5", "1", "1.5", "2")
SEEDS, BUDGETS, SCHEDULES = range(6), (12.8, 38.4), ("step", "linear")
# What is measured: recipe, share of the training, latents. Intermediate students share the first.
LATENTS, IMAGES = (1000, 1001, 1002, 1003), 4096
MEASURED = (
    *(("last", at, LATENTS[:1]) for at in (0.5, 0.75)),
    *(("ema", at, LATENTS[:1]) for at in (0.5, 0.75)),
    ("last", 1.0, LATENTS[:2]),
    ("tail", 1.0, LATENTS[:2]),
    ("ema", 1.0, LATENTS),
)
DECAY, TAIL = 0.9, 0.25


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """One training."""

    a: str
    seed: int
    kimg: float
    schedule: str


def main() -> None:
    """Train and measure what the bank lacks."""
    options = parser(__doc__)
    options.add_argument("--study", type=Path, default=ROOT / DIGITS_STUDY)
    options.add_argument("--slopes", nargs="+", default=[*SLOPES], metavar="A")
    options.add_argument("--seeds", type=int, nargs="+", default=[*SEEDS])
    options.add_argument("--kimg", type=float, nargs="+", default=[*BUDGETS])
    options.add_argument("--schedules", nargs="+", default=[*SCHEDULES], choices=SCHEDULES)
    options.add_argument("--workers", type=int, default=2)
    given = options.parse_args()
    spec = read_spec(given.study)
    bank = bank_of(spec)
    there = set(jobs_of(bank))
    wanted = itertools.product(given.kimg, given.schedules, given.seeds, given.slopes)
    jobs = [job for k, c, s, a in wanted if (job := Job(a, s, k, c)) not in there]
    print(f"{len(there)} trainings are in the bank, {len(jobs)} are to be made", file=sys.stderr)
    began = time.monotonic()
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(given.workers, initializer=_prepare, initargs=(spec,)) as pool:
        for done, rows in enumerate(pool.imap_unordered(_measured, jobs), 1):
            new = not bank.exists()
            with bank.open("a", newline="") as file:
                writer = csv.writer(file)
                writer.writerows([HEADER, *rows] if new else rows)
            spent = time.monotonic() - began
            print(f"{done}/{len(jobs)} after {spent:.0f} s", file=sys.stderr, flush=True)


def bank_of(spec: StudySpec) -> Path:
    """The file of a study's bank."""
    return DATA / f"{spec.name.partition('-nfe')[0]}-bank.csv"


def jobs_of(bank: Path) -> Iterator[Job]:
    """The trainings whose FIDs a bank holds."""
    if bank.exists():
        with bank.open(newline="") as file:
            for row in csv.DictReader(file):
                schedule = row["recipe"].partition("-")[0]
                yield Job(row["a"], int(row["seed"]), float(row["kimg"]), schedule)


_here: list[Assets] = []


def _prepare(spec: StudySpec) -> None:
    _here.append(load(spec, use_device(spec)))


def _measured(job: Job) -> list[tuple[object, ...]]:
    """Train one student, average its iterates, and measure them all."""
    assets = _here[0]
    # All iterates are taken as they are, and averaged below.
    changes = {"kimg": job.kimg, "lr_schedule": job.schedule, "tail": None}
    config = assets.method.Config.read({**assets.spec.method.options, **changes})
    (plan,) = assets.method.plan(config, assets.teacher)
    inputs = assets.inputs(job.seed)
    store = assets.method.recording(config, assets.teacher, inputs)
    if store is not None and store.missing():
        store.record()
    stage = assets.method.stage(plan, assets.teacher, config, inputs)
    params = {"baseline": "plain"} if job.a == "plain" else {"a": float(job.a)}
    weighting = space_of(params).weighting(params, config.num_branches)
    total = plan.num_updates
    iterates: list[list[torch.Tensor]] = []
    inner = Evaluations(range(1, total), lambda _, student: iterates.append(_parameters(student)))
    began = time.process_time()
    last = export_branch(train(stage, weighting, evaluations=inner)).eval()
    seconds = time.process_time() - began
    iterates.append(_parameters(last))
    rows: list[tuple[object, ...]] = []
    for name, at, latents in MEASURED:
        parameters = AVERAGES[name](iterates[: round(at * total)])
        with torch.no_grad():
            for mine, its in zip(last.parameters(), parameters, strict=True):
                mine.copy_(its)
        recipe = f"{job.schedule}-{name}"
        rows += [
            (
                *(assets.spec.method.name, job.a, job.seed, job.kimg, recipe, at),
                seed,
                f"{fid:.5f}",
                f"{seconds:.1f}",
            )
            for seed in latents
            for fid in [_fid(assets, last, stage.sampler, seed)]
        ]
    return rows


def _parameters(student: NetworkDenoiser) -> list[torch.Tensor]:
    return [each.detach().clone() for each in student.parameters()]


def _tail(iterates: Sequence[list[torch.Tensor]]) -> list[torch.Tensor]:
    """The mean of the last quarter of them."""
    kept = iterates[-max(1, round(TAIL * len(iterates))) :]
    return [torch.stack(each).mean(0) for each in zip(*kept, strict=True)]


def _ema(iterates: Sequence[list[torch.Tensor]]) -> list[torch.Tensor]:
    """Their moving average."""
    average = [each.clone() for each in iterates[0]]
    for one in iterates[1:]:
        torch._foreach_lerp_(average, one, 1 - DECAY)
    return average


AVERAGES = {"last": lambda iterates: iterates[-1], "tail": _tail, "ema": _ema}


def _fid(assets: Assets, student: NetworkDenoiser, sampler: Sampler, latents: int) -> float:
    drawn = draw_images(student, sampler, IMAGES, seed=latents, batch=512)
    features = features_of(drawn, assets.evaluator.extractor)
    return frechet_distance(statistics_of(features), assets.evaluator.reference.statistics)


if __name__ == "__main__":
    main()
