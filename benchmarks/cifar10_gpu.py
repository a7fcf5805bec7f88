"""A CIFAR-10 teacher and its students at NFE 2 on one GPU, judged by two feature networks.

Two parts share the files under --folder: `teacher` trains a teacher for a given time, `students`
distils it in three ways and measures all. A part that was stopped, by --stop-after or otherwise,
continues when it is called again with the same options.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bdense.data.datasets import Dataset, load_dataset
from bdense.diffusion.branches import export_branch
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.intervals import IntervalGrid
from bdense.diffusion.sampling import Sampler, draw_images, save_grid
from bdense.diffusion.solvers import DPMSolverPP
from bdense.execution import PRECISIONS, Execution, exact_products
from bdense.files import atomic_write
from bdense.methods.recordings import TrajectoryStore
from bdense.methods.sfd import SFDConfig, SFDStage
from bdense.methods.trajectories import LiveTrajectories
from bdense.metrics.extractors import load_extractor
from bdense.metrics.metrics import FID, measure_images
from bdense.metrics.references import dataset_reference
from bdense.models.card import inherited, write_card
from bdense.models.store import load_denoiser, save_denoiser
from bdense.training.loop import IterationReport, train
from bdense.training.teacher import TeacherConfig, train_teacher
from bdense.weights.spaces import LogLinearWeights, uniform_weights
from bdense.weights.weighting import FixedWeights
from benchmarks.common import parser, publish, table
from benchmarks.timing import pick_device, synchronise

K = 4
GRID = IntervalGrid(num_intervals=3, substeps=K)
STUDENT_SAMPLER = Sampler(num_intervals=GRID.num_intervals, afs=GRID.afs)
# What the students are distilled from: the teacher's own walk.
TEACHER_SAMPLER = Sampler(num_intervals=GRID.num_intervals * K, afs=False, solver=DPMSolverPP())
# Name, num_branches, weights; the last is the paper's best on CIFAR-10 at this NFE.
STUDENTS: dict[str, tuple[int, LogLinearWeights]] = {
    "plain SFD": (1, uniform_weights()),
    "uniform": (K, uniform_weights()),
    "a = 1.386, b = -4.274": (K, LogLinearWeights(a=1.386, b=-4.274)),
}
# The first iterations choose kernels and compile.
WARM_UP, TIMED = 10, 30
GRID_IMAGES = 128
# What each part's files depend on.
OPTIONS = {
    "teacher": (
        *("data", "precision", "channels_last"),
        *("minutes", "channels", "blocks", "teacher_batch", "teacher_lr"),
    ),
    "students": (
        *("data", "precision", "channels_last"),
        *("kimg", "batch", "lr", "features", "images"),
    ),
}


class StopForNowError(Exception):
    """The time of this call is over; what was done is saved."""


@dataclass(frozen=True, slots=True)
class Clock:
    """When this call has to end."""

    end: float

    def check(self) -> None:
        """Stop if it is time.

        Raises:
            StopForNowError: It is.
        """
        if time.monotonic() >= self.end:
            raise StopForNowError


def main() -> None:
    """Run one part."""
    given = _options()
    device = pick_device(given.threads)
    execution = Execution(
        precision=given.precision, compile=given.compile, channels_last=given.channels_last
    )
    execution.require(device)
    _require_same_options(given)
    clock = Clock(time.monotonic() + 60 * given.stop_after)
    try:
        _PARTS[given.part](given, execution, device, clock)
    except StopForNowError:
        _say(f"stopped after {given.stop_after:g} minutes; run the same command again to continue")


def _options() -> argparse.Namespace:
    options = parser(__doc__)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("part", choices=_PARTS)
    options.add_argument("--folder", type=Path, required=True, help="folder of all that is made")
    options.add_argument(
        "--stop-after", type=float, default=9.0, metavar="MINUTES", help="default: %(default)s"
    )
    options.add_argument("--data", default="cifar10", help="default: %(default)s")
    options.add_argument("--precision", choices=PRECISIONS, default="bfloat16")
    options.add_argument("--compile", action="store_true", help="worth it for the teacher")
    options.add_argument("--channels-last", action="store_true")
    options.add_argument("--threads", type=int, default=4, help="CPU threads (default: 4)")

    teacher = options.add_argument_group("teacher")
    teacher.add_argument(
        "--minutes", type=float, default=15.0, help="training time in all (default: %(default)s)"
    )
    teacher.add_argument(
        "--channels", type=int, default=96, help="half of the network's (default: %(default)s)"
    )
    teacher.add_argument(
        "--blocks", type=int, default=3, help="blocks in each of 3 levels (default: %(default)s)"
    )
    teacher.add_argument("--teacher-batch", type=int, default=256, help="default: %(default)s")
    teacher.add_argument("--teacher-lr", type=float, default=5e-4, help="default: %(default)s")

    students = options.add_argument_group("students")
    students.add_argument("--kimg", type=float, default=50.0, help="default: %(default)s")
    students.add_argument("--batch", type=int, default=128, help="default: %(default)s")
    students.add_argument("--lr", type=float, default=5e-5, help="default: %(default)s")
    students.add_argument(
        "--features", type=Path, nargs="+", default=[], metavar="FILE", help="TorchScript networks"
    )
    students.add_argument(
        "--images", type=int, default=10_000, help="images to judge (default: 10000)"
    )
    return options.parse_args()


def _require_same_options(given: argparse.Namespace) -> None:
    """Files of other options in the folder would be taken for this call's own."""
    path = given.folder / f"{given.part}-options.json"
    own = {name: str(getattr(given, name)) for name in OPTIONS[given.part]}
    before = json.loads(path.read_text()) if path.exists() else own
    differing = [f"--{name.replace('_', '-')}" for name in own if own[name] != before[name]]
    if differing:
        raise SystemExit(
            f"{given.folder} was begun with other {', '.join(differing)}; give the same ones, or "
            "another --folder"
        )
    _write_json(path, own)


# ---- teacher ----


def _teacher(
    given: argparse.Namespace, execution: Execution, device: torch.device, clock: Clock
) -> None:
    target = given.folder / "teacher.safetensors"
    if target.exists():
        _say(f"{target.name} is there already")
        return
    dataset = load_dataset(given.data)
    plan = _plan(given, execution, dataset, device)
    config = _teacher_config(given, plan["images"])
    started = time.monotonic()

    def on_iteration(done: int, total: int, loss: float) -> None:
        if done % 100 == 0 or done == total:
            spent = time.monotonic() - started
            _say(f"teacher: iteration {done} of {total}, loss {loss:.4f}, {spent:.0f} s")
        clock.check()

    teacher = train_teacher(
        dataset,
        config,
        device=device,
        execution=execution,
        checkpoint=given.folder / "teacher-training.safetensors",
        checkpoint_seconds=20.0,
        on_iteration=on_iteration,
    )
    facts = {
        "kind": "teacher",
        "data": dataset.name,
        "training": asdict(config),
        "execution": asdict(execution),
        **plan,
    }
    save_denoiser(target, teacher, facts)
    write_card(target, teacher, facts)
    parameters = sum(p.numel() for p in teacher.parameters())
    _say(f"{target.name}: {parameters / 1e6:.1f} M parameters, {config.images} images seen")


def _plan(
    given: argparse.Namespace, execution: Execution, dataset: Dataset, device: torch.device
) -> dict[str, Any]:
    """How many images fit into the time: measured once, for every call of this part."""
    path = given.folder / "plan.json"
    if not path.exists():
        stamps = []

        def on_iteration(done: int, total: int, loss: float) -> None:
            synchronise(device)
            stamps.append(time.perf_counter())

        probe = _teacher_config(given, (WARM_UP + TIMED) * given.teacher_batch)
        train_teacher(
            dataset, probe, device=device, execution=execution, on_iteration=on_iteration
        )
        seconds = (stamps[-1] - stamps[WARM_UP - 1]) / TIMED
        iterations = max(1, int(60 * given.minutes / seconds))
        plan = {"images": iterations * given.teacher_batch, "seconds_per_iteration": seconds}
        _write_json(path, plan)
        _say(f"plan: {iterations} iterations of {1e3 * seconds:.1f} ms")
    return dict(json.loads(path.read_text()))


def _teacher_config(given: argparse.Namespace, images: int) -> TeacherConfig:
    network = {
        "model_channels": given.channels,
        "channel_mult": (2, 2, 2),
        "num_blocks": given.blocks,
        "dropout": 0.1,
    }
    return TeacherConfig(
        images=images,
        batch=given.teacher_batch,
        lr=given.teacher_lr,
        warmup_images=100_000,
        # Of a short training the average is over its last part, and never the start.
        ema_halflife_images=max(1, min(500_000, images // 20)),
        network=network,
    )


# ---- students ----


def _students(
    given: argparse.Namespace, execution: Execution, device: torch.device, clock: Clock
) -> None:
    teacher, facts = load_denoiser(given.folder / "teacher.safetensors")
    teacher.to(device).execute(execution)
    training = SFDConfig(kimg=given.kimg, batch=given.batch)
    live = LiveTrajectories(
        teacher, GRID, DPMSolverPP(), given.batch, training.num_updates, seed=0
    )
    store = TrajectoryStore(live, given.folder / "trajectories", "float16")
    for shard in store.missing():
        store.record_shard(shard)
        _say(f"trajectories: {shard + 1} of {store.num_shards} shards")
        clock.check()
    models = {"teacher": (teacher, TEACHER_SAMPLER)}
    for name in STUDENTS:
        models[name] = (_student(name, given, store, facts, clock), STUDENT_SAMPLER)
    dataset = load_dataset(given.data)
    measured = {}
    for name, (model, sampler) in models.items():
        clock.check()
        measured[name] = _measured(name, model, sampler, dataset, given)
    body = _body(given, execution, facts, teacher, measured)
    # Files by their names: where they lie is this machine's own.
    shown = [Path(argument).name if "/" in argument else argument for argument in sys.argv[1:]]
    publish("cifar10_gpu", body, write=given.write, arguments=shown)


def _student(
    name: str,
    given: argparse.Namespace,
    store: TrajectoryStore,
    known: dict[str, Any],
    clock: Clock,
) -> NetworkDenoiser:
    """Trained, or read if it was before; in branch K alone."""
    num_branches, weights = STUDENTS[name]
    teacher = store.live.teacher
    path = given.folder / f"student-{_slug(name)}.safetensors"
    if path.exists():
        device = next(teacher.parameters()).device
        return load_denoiser(path)[0].to(device).execute(teacher.execution)

    def on_iteration(done: IterationReport) -> None:
        if (done.iteration + 1) % 50 == 0:
            _say(f"{name}: iteration {done.iteration + 1} of {done.iterations}, {done.loss:.2f}")
        clock.check()

    config = SFDConfig(kimg=given.kimg, batch=given.batch, lr=given.lr)
    stage = SFDStage(config=config, trajectories=store.open(), start=teacher)
    branched = train(
        stage,
        FixedWeights(weights(num_branches)),
        checkpoint=given.folder / f"student-{_slug(name)}-training.safetensors",
        checkpoint_seconds=20.0,
        on_iteration=on_iteration,
    )
    student = export_branch(branched)
    metadata = {
        "kind": "student",
        **inherited(known, "teacher.safetensors"),
        "sampler": STUDENT_SAMPLER.describe(),
    }
    save_denoiser(path, student, metadata)
    write_card(path, student, metadata)
    return student


def _measured(
    name: str,
    model: NetworkDenoiser,
    sampler: Sampler,
    dataset: Dataset,
    given: argparse.Namespace,
) -> list[FID]:
    """By each feature network, or read if it was before; the first images are saved."""
    path = given.folder / f"measured-{_slug(name)}.json"
    if path.exists():
        return [FID(**fid) for fid in json.loads(path.read_text())]
    images = draw_images(model, sampler, given.images, seed=1, batch=500)
    save_grid(images[:GRID_IMAGES], given.folder / f"{_slug(name)}.png")
    device, cache = next(model.parameters()).device, given.folder / "cache"
    found = []
    # The features in float32 as it is, whatever the students were computed in.
    with exact_products():
        for file in given.features:
            extractor = load_extractor(f"torchscript:{file}", cache=cache, device=device)
            reference = dataset_reference(dataset, extractor, cache=cache)
            seeds = {"training": 0, "evaluation": 1}
            fid = measure_images(images, extractor, reference, nfe=sampler.nfe, seeds=seeds).fid
            found.append(fid)
            _say(f"{name}: {fid.value:.4f} by {extractor.name}")
    _write_json(path, [asdict(fid) for fid in found])
    return found


def _body(
    given: argparse.Namespace,
    execution: Execution,
    facts: dict[str, Any],
    teacher: NetworkDenoiser,
    measured: dict[str, list[FID]],
) -> str:
    plain = next(iter(STUDENTS))
    columns = [fid.extractor.removeprefix("torchscript:") for fid in measured["teacher"]]
    header = ["", "NFE", *columns, *(f"{column}, to {plain}" for column in columns)]
    rows = []
    for name, fids in measured.items():
        nfe = (TEACHER_SAMPLER if name == "teacher" else STUDENT_SAMPLER).nfe
        pairs = zip(fids, measured[plain], strict=True)
        ratios = [f"{fid.value / base.value - 1:+.1%}" for fid, base in pairs]
        rows.append([name, nfe, *(f"{fid.value:.4g}" for fid in fids), *ratios])
    hashes = [f"{fid.extractor}, sha256 {fid.extractor_sha256[:16]}" for fid in measured[plain]]
    against = {f"{fid.reference_images} of {fid.reference}" for fid in measured[plain]}
    parameters = sum(p.numel() for p in teacher.parameters()) / 1e6
    trained = facts["training"]
    return f"""\
Frechet distances on the named feature networks: real distances, none of them *the* FID; columns \
do not compare.

{table(header, rows)}

- {given.images} images from latents of seed 1 against {"; ".join(against) or "nothing"}. \
Features: {"; ".join(hashes) or "none were given"}.
- Teacher: SongUNet, {parameters:.1f} M parameters, {trained["images"] / 1e6:.3g} M images at \
batch {trained["batch"]}, lr {trained["lr"]:g}, in {facts["execution"]["precision"]};
  walked and sampled by DPM-Solver++ in {TEACHER_SAMPLER.nfe} evaluations.
- Students: NFE {STUDENT_SAMPLER.nfe}, K = {K}, {given.kimg:g} kimg at batch {given.batch}, lr \
{given.lr:g}, in {execution.precision}; the same trajectories of seed 0, recorded in float16.
- One training seed: that alone moves a FID by 1 to 2 % (arXiv 2606.20536), so a smaller gap says \
nothing."""


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.-]+", "-", name.lower())


def _write_json(path: Path, value: Any) -> None:
    with atomic_write(path) as scratch:
        scratch.write_text(json.dumps(value))


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


_PARTS: dict[str, Callable[..., None]] = {"teacher": _teacher, "students": _students}


if __name__ == "__main__":
    main()
