"""Students trained in different ways on the same trajectories, and their FIDs seed by seed."""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from search.spec.study_spec import StudySpec, WeightsSpec
from search.worker.trial import train_and_measure

from benchmarks.common import DIGITS_STUDY, table
from search.worker.assets import (
    Assets,
    load,
    load_data,
    load_teacher,
    prepare,
    trajectory_store,
    use_device,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to train a student.

    Attributes:
        name: In tables.
        params: What a trial's row would hold.
        lr_factor: Times the study's lr.
        weights: Where ``params`` come from, if not from the study's own space.
    """

    name: str
    params: dict[str, Any]
    lr_factor: float = 1.0
    weights: WeightsSpec | None = None

    def within(self, spec: StudySpec) -> StudySpec:
        """The study as this arm trains in it."""
        budget = spec.budget.model_copy(update={"lr": spec.budget.lr * self.lr_factor})
        return spec.model_copy(update={"budget": budget, "weights": self.weights or spec.weights})


def add_study_options(options: argparse.ArgumentParser, seeds: Sequence[int] | None) -> None:
    """``--study`` and ``--seeds``, with these seeds or the study's by default."""
    options.add_argument(
        "--study", type=Path, default=DIGITS_STUDY, metavar="FILE", help="default: %(default)s"
    )
    shown = "the study's" if seeds is None else " ".join(map(str, seeds))
    options.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=seeds,
        metavar="SEED",
        help=f"training seeds, which the trajectories start from (default: {shown})",
    )


def fids_of(spec: StudySpec, arms: Sequence[Arm], seeds: Sequence[int]) -> dict[str, list[float]]:
    """FID of each arm, by name, at each training seed; says on stderr how far it is."""
    fids: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for seed in seeds:
        for arm, fid in _run(_seeded(spec, seed), arms):
            fids[arm.name].append(fid)
            sys.stderr.write(f"seed {seed}, {arm.name}: FID {fid:.3f}\n")
    return fids


def _seeded(spec: StudySpec, seed: int) -> StudySpec:
    """The study with other training noise: the teacher has a seed of its own and stays."""
    return spec.model_copy(update={"seeds": spec.seeds.model_copy(update={"training": seed})})


def _run(spec: StudySpec, arms: Sequence[Arm]) -> Iterator[tuple[Arm, float]]:
    """FID of each arm on one set of trajectories, as the study's own trials measure it."""
    assets = _assets(spec)
    with tempfile.TemporaryDirectory() as folder:
        for index, arm in enumerate(arms):
            own = replace(assets, spec=arm.within(spec))
            place = Path(folder) / str(index)
            result = train_and_measure(
                own, arm.params, place, check=lambda: None, report=lambda _: None
            )
            yield arm, float(result["value"])


def _assets(spec: StudySpec) -> Assets:
    """The study's shared parts, from the cache or made now."""
    device = use_device(spec)

    def report(what: str, done: int, total: int, remark: str) -> None:
        if done in (0, total):
            sys.stderr.write(f"{what} {done}/{total} {remark}\n")

    prepare(spec, device, report)
    if spec.trajectories.mode == "recorded":
        teacher = load_teacher(spec, load_data(spec), device)
        trajectory_store(spec, teacher).record()
    return load(spec, device)


def conditions(spec: StudySpec) -> str:
    """What the FIDs of these arms have in common, as a paragraph."""
    training, evaluation = spec.budget, spec.evaluation
    return f"""\
FID of students of study {spec.name}: NFE {spec.student.nfe}, K = {spec.student.substeps}, \
{training.kimg:g} kimg at batch {training.batch}, lr {training.lr:g},
{evaluation.images} images, extractor {evaluation.extractor}, latents of seed \
{spec.seeds.evaluation}. Within a column teacher,
trajectories and evaluation are the same; a training seed moves the trajectories alone."""


def fid_table(fids: dict[str, list[float]], seeds: Sequence[int], reference: str) -> str:
    """A row for each arm: each seed, mean, spread, and the mean ratio to the arm ``reference``."""
    header = ["student", *[f"seed {seed}" for seed in seeds], "mean", "std", f"to {reference}"]
    return table(header, [_cells(name, fids[name], fids[reference]) for name in fids])


def _cells(name: str, values: list[float], reference: list[float]) -> list[str]:
    ratio = statistics.mean(value / base for value, base in zip(values, reference, strict=True))
    spread = f"{statistics.stdev(values):.3f}" if len(values) > 1 else "-"
    each = [f"{value:.3f}" for value in values]
    return [name, *each, f"{statistics.mean(values):.3f}", spread, f"{ratio - 1:+.1%}"]
