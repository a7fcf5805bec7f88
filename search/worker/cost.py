"""What a study costs in time and memory: two updates and a batch of images, measured for real.

A process of its own makes them, by networks of random weights, which take as long as any.
"""

import dataclasses
import multiprocessing
import resource
import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from bdense.data.datasets import Dataset
from bdense.diffusion.branches import export_branch
from bdense.diffusion.denoiser import NetworkDenoiser, build_denoiser
from bdense.diffusion.sampling import Sampler, draw_images
from bdense.errors import InputError, is_out_of_memory
from bdense.methods.chain import pd_sampler, prediction_of
from bdense.methods.progressive import DataBatches, distill_round
from bdense.methods.sfd import distill
from bdense.metrics.classifiers import RECIPES
from bdense.metrics.extractors import load_extractor, missing_weights
from bdense.metrics.references import features_of
from bdense.models.public import CHECKPOINTS, HUB_CHECKPOINTS, REFERENCES
from bdense.weights.spaces import uniform_weights
from search.spec.model_spec import ModelSpec
from search.spec.promotion_spec import PromotionSpec
from search.spec.space import BASELINES
from search.spec.study_spec import StudySpec
from search.storage.engine import cache_folder
from search.study.wording import duration
from search.worker.assets import trajectory_store, use_device
from search.worker.chain_engine import chain_of, chain_schedule, round_config
from search.worker.engine import architecture, execution, student_sampler, training_config

PATIENCE_SECONDS = 20.0  # that a dry run waits for a measurement
_UPDATES = 2  # the first warms up
_FEATURES_BATCH = 256  # images that bdense.metrics.references.features_of takes at a time
# What CUDA and its libraries take of a GPU for each process, which torch does not count.
_CONTEXT = 800 * 2**20
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Seconds and bytes of a trial.

    Attributes:
        recording_seconds: A batch of trajectories that is recorded once for all trials.
        update_seconds: An update.
        draw_seconds: A network evaluation of one image, while images are drawn.
        feature_seconds: One image's features; 0 where the extractor is missing, or small.
        peak_bytes: The most memory that the process held, on its device.
        free_bytes: Memory of that device that was free before.
        device: ``cpu`` or ``cuda``.
    """

    recording_seconds: float
    update_seconds: float
    draw_seconds: float
    feature_seconds: float
    peak_bytes: int
    free_bytes: int
    device: str


def measure(
    spec: ModelSpec, *, download: bool = False, patience: float | None = None
) -> Measured | None:
    """Measure on this machine what a trial takes.

    Args:
        spec: What would be launched.
        download: Fetch a missing feature extractor; else its part is left out.
        patience: Seconds to wait; None waits as long as it takes.

    Returns:
        None where it takes longer than ``patience``.

    Raises:
        InputError: This machine cannot do what the spec asks, or runs out of memory.
    """
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    asked = (theirs, spec, free_memory(), download)
    child = spawn.Process(target=_answer, args=asked, daemon=True)
    child.start()
    theirs.close()
    try:
        answer: Measured | Exception | None = ours.recv() if ours.poll(patience) else None
    except EOFError:
        child.join()
        if child.exitcode != -signal.SIGKILL:
            raise RuntimeError("the measurement of a trial's cost failed, as above") from None
        answer = MemoryError("the system ended the process")
    finally:
        child.kill()
        child.join()
    if isinstance(answer, MemoryError):
        raise InputError(f"one trial alone runs out of memory ({answer}); {_smaller(spec)}")
    if isinstance(answer, Exception):
        raise answer
    return answer


def require_room(spec: ModelSpec, together: int) -> None:
    """Measure a trial, and refuse trials that would run out of memory.

    Args:
        spec: What is launched.
        together: Trials at once on this machine.

    Raises:
        InputError: They have no room; says what to lower. Or as of ``measure``.
    """
    found = measure(spec, download=True)
    assert found is not None  # that is for the impatient
    if found.device == "cuda":  # trials that hold whole GPUs do not share one
        share = spec.resources.gpus
        together = min(together, 1 if share == "auto" or share >= 1 else int(1 / share + 1e-9))
    if (needed := together * found.peak_bytes) > found.free_bytes:
        fewer = f"run fewer at once by --workers ({together} now), or " if together > 1 else ""
        raise InputError(
            f"{together} trial{'s' * (together > 1)} of study {spec.name} at once need "
            f"{_gib(needed)} and {'the GPU' if found.device == 'cuda' else 'this machine'} has "
            f"{_gib(found.free_bytes)} free; {fewer}{_smaller(spec)}"
        )


def _smaller(spec: ModelSpec) -> str:
    """The way out of too little memory."""
    key, batch = "budget.batch", 0
    if isinstance(spec, PromotionSpec):
        key, batch = "round.batch", spec.round.batch
    elif isinstance(spec, StudySpec):
        batch = spec.budget.batch
    return f"lower {key} ({batch} now) or evaluation.batch ({spec.evaluation.batch} now)"


def free_memory() -> int:
    """Bytes of memory that this machine, or this container, has left; very many if unknown."""
    if not Path("/proc/meminfo").exists():
        return 2**50
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    left = int(lines["MemAvailable"].split()[0]) * 1024
    most, taken, stat = (_CGROUP / f"memory.{name}" for name in ("max", "current", "stat"))
    if not most.is_file() or (limit := most.read_text().strip()) == "max":
        return left
    # The cache of files is given back where it is needed.
    known = dict(line.split() for line in stat.read_text().splitlines())
    cache = int(known["active_file"]) + int(known["inactive_file"])
    return min(left, max(0, int(limit) - int(taken.read_text()) + cache))


def cost_lines(spec: ModelSpec, *, arms: int = 0, workers: int | None = None) -> list[str]:
    """What a dry run says of the cost; nothing is downloaded or kept.

    Args:
        spec: What would be launched.
        arms: Of a promotion, baselines included.
        workers: Trials at once; 1 by default.
    """
    with torch.device("meta"):
        teacher = build_denoiser(architecture(spec))
    parameters = 4 * sum(p.numel() for p in teacher.parameters())
    work = _work(spec, teacher, parameters, arms)
    try:
        found = measure(spec, patience=PATIENCE_SECONDS)
        why = f"it takes longer than {PATIENCE_SECONDS:g} s here"
    except InputError as error:
        found, why = None, str(error)
    lines = [*work.lines, f"time and memory: the launch measures them; not here: {why}"]
    if found is not None:
        lines[-1:] = _measured_lines(found, work, workers or 1)
    if spec.teacher.train:
        images = round(spec.teacher.train.kimg * 1000)
        lines.append(f"teacher: trained on {images:,} images first, which is not counted")
    return lines + _downloads(spec, parameters)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """Of each of ``rows`` trials: updates, images, and network evaluations to draw them."""

    rows: int
    updates: int
    images: int
    evaluations: int
    recorded: int = 0  # batches, once for all
    lines: tuple[str, ...]


def _work(spec: ModelSpec, teacher: NetworkDenoiser, parameters: int, arms: int) -> _Work:
    if isinstance(spec, PromotionSpec):
        converts = spec.prediction_type not in (None, prediction_of(teacher))
        steps = ((spec.chain.first,) if converts else ()) + chain_of(spec).students
        chains = arms * len(spec.seeds.training)
        kept = parameters * len(steps) * chains / 2**20
        return _Work(
            rows=chains,
            updates=len(steps) * spec.round.updates,
            images=len(steps) * spec.evaluation.images,
            evaluations=sum(steps) * spec.evaluation.images,
            lines=(
                f"trials: {chains}, with a student at each of {', '.join(map(str, steps))} steps",
                f"disk: {kept:,.0f} MiB of students",
            ),
        )
    assert isinstance(spec, StudySpec)
    rows, updates = spec.budget.trials + len(BASELINES), spec.budget.iterations
    recorded = spec.trajectories.mode == "recorded"
    images = spec.evaluation.images + len(spec.looks) * spec.look_images
    stored = trajectory_store(spec, teacher).nbytes / 2**20 if recorded else 0
    kept = parameters * (spec.keep_students + len(BASELINES)) / 2**20
    return _Work(
        rows=rows,
        updates=updates,
        images=images,
        evaluations=images * spec.student.nfe,
        recorded=updates if recorded else 0,
        lines=(
            f"trials: {rows} (baselines included), each of {updates:,} updates and {images:,} "
            "images",
            f"disk: {stored:,.0f} MiB of trajectories, {kept:,.0f} MiB of kept students",
        ),
    )


def _measured_lines(found: Measured, work: _Work, workers: int) -> list[str]:
    drawing = work.evaluations * found.draw_seconds + work.images * found.feature_seconds
    each = work.updates * found.update_seconds + drawing
    total = (work.recorded * found.recording_seconds + work.rows * each) / workers
    return [
        f"memory: {_gib(found.peak_bytes)} a trial, of {_gib(found.free_bytes)} that are free",
        f"time: {duration(each)} a trial, {duration(total)} in all with {workers} "
        f"worker{'s' * (workers > 1)}, measured on {found.device} ({found.update_seconds:.3g} s "
        f"an update, {1e3 * found.draw_seconds:.3g} ms a network evaluation of an image, "
        f"{1e3 * found.feature_seconds:.3g} ms its features)",
    ]


def _downloads(spec: ModelSpec, teacher_bytes: int) -> list[str]:
    """What a launch fetches first."""
    name = spec.teacher.checkpoint or ""
    wanted = [
        (CHECKPOINTS.get(name) or HUB_CHECKPOINTS.get(name), teacher_bytes),
        (REFERENCES.get(spec.evaluation.reference or ""), 8 * 2048 * 2049),
    ]
    lines = [
        f"{file.url} to {file.path} (about {size / 2**20:,.0f} MiB)"
        for file, size in wanted
        if file is not None and not file.is_here
    ]
    if (weights := missing_weights(spec.evaluation.extractor)) is not None:
        lines.append("{} to {}".format(*weights))
    return [f"download: the launch fetches {line}" for line in lines]


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


# In the child.


def _answer(to: Connection, spec: ModelSpec, free: int, download: bool) -> None:
    try:
        to.send(_measure(spec, free, download))
    except InputError as error:
        to.send(error)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        to.send(MemoryError(str(error).partition("\n")[0]))


def _measure(spec: ModelSpec, free: int, download: bool) -> Measured:
    device = use_device(spec)
    wanted = dataclasses.replace(execution(spec), compile=False)  # which would take minutes
    wanted.require(device)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] + _CONTEXT
    else:  # an allocation fails, in place of the system ending some process or other
        resource.setrlimit(resource.RLIMIT_DATA, (free, free))
    teacher = build_denoiser(architecture(spec)).to(device).eval().execute(wanted)
    learned = _round(spec, teacher) if isinstance(spec, PromotionSpec) else _walk(spec, teacher)
    recording, update, branched, sampler = learned
    student, evaluation = export_branch(branched), spec.evaluation
    count = min(evaluation.batch, evaluation.images)
    clock = _Clock(device)
    images = draw_images(student, sampler, count, seed=0, batch=count)
    clock()
    drawing = clock.last
    seen, extracting, name = min(_FEATURES_BATCH, evaluation.images), 0.0, evaluation.extractor
    if name not in RECIPES and (download or missing_weights(name) is None):
        extractor = load_extractor(name, cache=cache_folder(), device=device)
        repeated = images[torch.arange(seen) % count]
        clock()
        features_of(repeated, extractor)
        clock()
        extracting = clock.last
    return Measured(
        recording_seconds=recording,
        update_seconds=update,
        draw_seconds=drawing / count / sampler.nfe,
        feature_seconds=extracting / seen,
        peak_bytes=_peak_bytes(device),
        free_bytes=free,
        device=device.type,
    )


def _walk(
    spec: ModelSpec, teacher: NetworkDenoiser
) -> tuple[float, float, NetworkDenoiser, Sampler]:
    """SFD: seconds to record a batch and of an update, a student and how it draws."""
    assert isinstance(spec, StudySpec)
    device, batch = next(teacher.parameters()).device, spec.budget.batch // spec.resources.team
    live = trajectory_store(spec, teacher).live
    walks = dataclasses.replace(live, batch=batch, count=_UPDATES)
    clock = _Clock(device)
    for iteration in range(_UPDATES):
        walks[iteration]
        clock()
    walking = clock.last
    config = training_config(spec, spec.student.substeps)
    config = dataclasses.replace(config, images=batch * _UPDATES)
    weights = uniform_weights()(config.num_branches)
    branched = distill(teacher, walks, config, weights, on_iteration=clock)
    recorded = walking if spec.trajectories.mode == "recorded" else 0.0
    return recorded, max(clock.last - recorded, 0.0), branched, student_sampler(spec)


def _round(
    spec: PromotionSpec, teacher: NetworkDenoiser
) -> tuple[float, float, NetworkDenoiser, Sampler]:
    """PD: the same of its first round, whose updates make their own targets."""
    device, count, classes = next(teacher.parameters()).device, spec.round.batch, teacher.label_dim
    noise = torch.randint(256, (count, *teacher.image_shape), dtype=torch.uint8)
    dataset = Dataset("noise", noise, "", torch.arange(count) % classes if classes else None)
    batches = DataBatches(dataset, count, 0, device, flip=spec.round.flip, label_dim=classes)
    config = dataclasses.replace(round_config(spec, spec.chain.substeps, 0), updates=_UPDATES)
    clock, weights = _Clock(device), uniform_weights()(config.num_branches)
    levels, steps = chain_schedule(spec, teacher), chain_of(spec).students
    branched = distill_round(teacher, batches, levels, steps[0], config, weights, on_update=clock)
    return 0.0, clock.last, branched, pd_sampler(levels, steps[-1])


class _Clock:
    """Seconds since it was last asked; what a GPU was told before is done by then."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._seen, self.last = device, time.perf_counter(), 0.0

    def __call__(self, _: object = None) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        before, self._seen = self._seen, time.perf_counter()
        self.last = self._seen - before


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) + _CONTEXT
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Of this process alone; what getrusage says begins with its parent's.
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024
