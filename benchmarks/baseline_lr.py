"""Plain SFD at half, once and twice the study's lr, and B-DENSE over a, all else being equal."""

import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bdense.data import load_dataset
from benchmarks.common import DIGITS_STUDY, parser, publish, table
from search.assets import Assets, load, load_teacher, prepare, trajectory_store, use_device
from search.engine import check
from search.spec import StudySpec, read_spec
from search.trial import evaluate

LR_FACTORS = (0.5, 1.0, 2.0)
CURVE = (-0.5, 0.0, 0.25, 0.5, 1.0, 1.386, 2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to train a student: what a trial's row would hold, and its step size."""

    name: str
    params: dict[str, Any]
    lr_factor: float = 1.0


def main() -> None:
    """Train, judge and print."""
    options = parser(__doc__)
    options.add_argument(
        "--study", type=Path, default=DIGITS_STUDY, metavar="FILE", help="default: %(default)s"
    )
    options.add_argument("--curve", action="store_true", help=f"also B-DENSE at a in {CURVE}")
    options.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        metavar="SEED",
        help="training seeds, which the trajectories start from (default: the study's)",
    )
    given = options.parse_args()
    spec = read_spec(given.study)
    check(spec)
    arms = [*_plain_arms(), *(_curve_arms() if given.curve else [])]
    seeds = given.seeds or [spec.seeds.training]
    fids: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for seed in seeds:
        for arm, fid in _run(_seeded(spec, seed), arms):
            fids[arm.name].append(fid)
            sys.stderr.write(f"seed {seed}, {arm.name}: FID {fid:.3f}\n")
    publish("baseline_lr", _body(spec, seeds, fids), write=given.write)


def _plain_arms() -> list[Arm]:
    return [
        Arm(name=f"plain SFD, lr x {factor:g}", params={"method": "sfd"}, lr_factor=factor)
        for factor in LR_FACTORS
    ]


def _curve_arms() -> list[Arm]:
    # b is read by the log-linear parameterisation alone, and Adam does not see it.
    return [Arm(name=f"B-DENSE, a = {a:g}", params={"a": a, "b": 0.0}) for a in CURVE]


def _seeded(spec: StudySpec, seed: int) -> StudySpec:
    """The study with other training noise: the teacher has a seed of its own and stays."""
    return spec.model_copy(update={"seeds": spec.seeds.model_copy(update={"training": seed})})


def _run(spec: StudySpec, arms: list[Arm]) -> Iterator[tuple[Arm, float]]:
    """FID of each arm on one set of trajectories, as the study's own trials measure it."""
    assets = _assets(spec)
    with tempfile.TemporaryDirectory() as folder:
        for index, arm in enumerate(arms):
            budget = spec.budget.model_copy(update={"lr": spec.budget.lr * arm.lr_factor})
            own = replace(assets, spec=spec.model_copy(update={"budget": budget}))
            place = Path(folder) / str(index)
            result = evaluate(own, arm.params, place, check=lambda: None, report=lambda _: None)
            yield arm, float(result["value"])


def _assets(spec: StudySpec) -> Assets:
    """The study's shared parts, from the cache or made now."""
    device = use_device(spec)

    def report(what: str, done: int, total: int, remark: str) -> None:
        if done in (0, total):
            sys.stderr.write(f"{what} {done}/{total} {remark}\n")

    prepare(spec, device, report)
    if spec.trajectories.mode == "recorded":
        teacher = load_teacher(spec, load_dataset(spec.data), device)
        trajectory_store(spec, teacher).record()
    return load(spec, device)


def _body(spec: StudySpec, seeds: list[int], fids: dict[str, list[float]]) -> str:
    training, evaluation = spec.budget, spec.evaluation
    header = ["student", *[f"seed {seed}" for seed in seeds], "mean", "std", "to plain, lr x 1"]
    rows = [_cells(name, values, fids["plain SFD, lr x 1"]) for name, values in fids.items()]
    return f"""\
FID of students of study {spec.name}: NFE {spec.student.nfe}, K = {spec.student.substeps}, \
{training.kimg:g} kimg at batch {training.batch}, lr {training.lr:g},
{evaluation.images} images, extractor {evaluation.extractor}, latents of seed \
{spec.seeds.evaluation}. Within a column teacher,
trajectories and evaluation are the same; a training seed moves the trajectories alone.

{table(header, rows)}

{_reading({name: statistics.mean(values) for name, values in fids.items()})}"""


def _cells(name: str, values: list[float], reference: list[float]) -> list[str]:
    ratio = statistics.mean(value / base for value, base in zip(values, reference, strict=True))
    spread = f"{statistics.stdev(values):.3f}" if len(values) > 1 else "-"
    each = [f"{value:.3f}" for value in values]
    return [name, *each, f"{statistics.mean(values):.3f}", spread, f"{ratio - 1:+.1%}"]


def _reading(means: dict[str, float]) -> str:
    plain = [name for name in means if name.startswith("plain")]
    dense = [name for name in means if name not in plain]
    best = min(plain, key=means.__getitem__)
    text = f"Of these step sizes {best} is the baseline's best, mean FID {means[best]:.3f}"
    text += "." if best == "plain SFD, lr x 1" else "; it may be better still beyond."
    if dense:
        winner = min(dense, key=means.__getitem__)
        change = f"{means[winner] / means[best] - 1:+.1%}"
        text += f" The best of the curve, {winner}, is {change} from it, at the study's lr alone."
    return text


if __name__ == "__main__":
    main()
