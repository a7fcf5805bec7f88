"""What a study costs in time and memory, from two real updates and one batch of images.

They run in a process of their own, on networks of random weights, which cost as much as others.
"""

import contextlib
import dataclasses
import functools
import json
import platform
import resource
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from bdense import NUMERICS
from bdense.data.datasets import Dataset
from bdense.diffusion.branches import export_branch
from bdense.diffusion.codecs import Codec
from bdense.diffusion.conditions import Prompts
from bdense.diffusion.denoiser import NetworkDenoiser, build_denoiser
from bdense.diffusion.guidance import calls
from bdense.diffusion.sampling import draw_images
from bdense.errors import InputError, StoppedError, is_out_of_memory
from bdense.files import write_json
from bdense.methods import METHODS
from bdense.methods.method import Inputs, Stage
from bdense.metrics.classifiers import RECIPES
from bdense.metrics.extractors import load_extractor, missing_checkpoint
from bdense.metrics.references import FEATURES_BATCH, features_of
from bdense.models.diffusers_files import hub_page
from bdense.models.latents import load_codec
from bdense.models.zoo import (
    PROMPT_SETS,
    PUBLIC_MODELS,
    REFERENCES,
    ConvertedCheckpoint,
    HubCheckpoint,
)
from bdense.training.loop import IterationReport, train
from bdense.weights.log_linear import uniform_weights
from bdense.weights.weighting import FixedWeights
from search.child import ChildError, in_child
from search.errors import UnpreparedError
from search.places import cache_folder
from search.spec.contents import fingerprint_of
from search.spec.resolve import describe_teacher, execution, meta_teacher, method_of
from search.spec.sections import as_plain
from search.spec.study import StudySpec
from search.study.arms import OneShotTask, one_shot_arm
from search.study.wording import duration
from search.worker.assets import recordings_of, use_device
from search.worker.result import package_versions
from search.worker.teachers import described_shape

PATIENCE_SECONDS = 20.0  # a dry run's for a measurement
_UPDATES = 2  # the first warms up
_PROMPT_TOKENS = 77  # of CLIP
# GPU memory of CUDA and its libraries for each process, which torch does not count.
_CONTEXT = 800 * 2**20
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialCost:
    """Seconds and bytes of a trial.

    Attributes:
        recording_seconds: A batch of trajectories that is recorded once for all trials, else 0.
        update_seconds: An update.
        draw_seconds: A network evaluation of one image, while images are drawn.
        feature_seconds: One image's features; 0 where the extractor is missing, or small.
        peak_bytes: The process's largest memory on its device.
        free_bytes: Free memory of that device before.
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
    spec: StudySpec, *, download: bool = False, patience: float | None = None
) -> TrialCost | None:
    """Measure the cost of a trial on this machine.

    Args:
        download: Fetch a missing feature extractor; else its time is left out.
        patience: Seconds to wait; None waits as long as it takes.

    Returns:
        None where it takes longer than ``patience``.

    Raises:
        InputError: This machine lacks what the spec asks for, or runs out of memory.
    """
    try:
        return in_child(functools.partial(_measure, spec, free_memory(), download), patience)
    except ChildError as error:
        if error.status is None:
            return None
        if error.status != -signal.SIGKILL:
            failed = f"the measurement of a trial's cost failed: {error}"
            raise ChildError(failed, error.status) from error
        why = "the system ended the process"
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        why = str(error).partition("\n")[0]
    raise InputError(f"one trial alone runs out of memory ({why}); {_smaller(spec)}")


def require_room(spec: StudySpec, together: int) -> TrialCost:
    """Measure a trial, and refuse to run so many at once that they run out of memory.

    What is accepted is kept in the cache: the next launch asks only what is free.

    Raises:
        InputError: They need too much memory; says what to lower. Or as of ``measure``.
    """
    kept = _kept_cost(spec)
    known = _read_cost(kept)
    found = measure(spec, download=True) if known is None else known
    assert found is not None  # there was no limit of time
    if found.device == "cuda":  # trials that hold whole GPUs do not share one
        together = min(together, int(1 / _gpu_share(spec) + 1e-9))
    if (needed := together * found.peak_bytes) > found.free_bytes:
        fewer = f"run fewer than {together} on a machine by --workers, or " if together > 1 else ""
        raise InputError(
            f"{together} trial{'s' * (together > 1)} of study {spec.name} at once need "
            f"{_gib(needed)} and {'the GPU' if found.device == 'cuda' else 'this machine'} has "
            f"{_gib(found.free_bytes)} free; {fewer}{_smaller(spec)}"
        )
    if known is None:
        write_json(kept, dataclasses.asdict(found))
    return found


def require_gpu(spec: StudySpec, needed: int) -> None:
    """Refuse GPUs of this process with less than the bytes that a trial took in preparation.

    Raises:
        UnpreparedError: This worker's GPU, or a trial's share of it, is smaller.
    """
    share = _gpu_share(spec)
    for index in range(torch.cuda.device_count()):
        # All of it, not what is free: a worker that was killed may still hold some.
        total = torch.cuda.get_device_properties(index).total_memory
        if needed > share * total:
            of = "" if share == 1 else f"resources.gpus={share:g} of "
            raise UnpreparedError(
                f"on {platform.node()}: a trial of study {spec.name} needs {_gib(needed)}, and "
                f"{of}the GPU there has {_gib(share * total)}; start workers on larger GPUs only, "
                f"or {_smaller(spec)}"
            )


def _gpu_share(spec: StudySpec) -> float:
    """Share of a GPU that a trial takes; 1 if it holds whole GPUs."""
    gpus = spec.resources.gpus
    return 1.0 if gpus == "auto" else min(1.0, gpus)


def _kept_cost(spec: StudySpec) -> Path:
    """Cache file of a trial's cost, by study, GPU model and package versions."""
    described, _ = describe_teacher(spec)
    resources, evaluation = spec.resources, spec.evaluation
    uses_gpu = resources.gpus != 0 and torch.cuda.is_available()
    key = {
        "teacher": described,
        "method": as_plain(spec.method),
        "trajectories": as_plain(spec.trajectories),
        "evaluation": [evaluation.batch, evaluation.num_images, evaluation.extractor],
        "execution": [as_plain(execution(spec)), resources.threads, resources.team],
        "by": [package_versions(), NUMERICS, torch.cuda.get_device_name() if uses_gpu else "cpu"],
    }
    return cache_folder() / "costs" / f"{fingerprint_of(key)}.json"


def _read_cost(kept: Path) -> TrialCost | None:
    """The cached cost with today's free memory; None where there is none of this form."""
    try:
        found = TrialCost(**json.loads(kept.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return dataclasses.replace(found, free_bytes=_free_bytes(found.device))


def _free_bytes(device: str) -> int:
    return torch.cuda.mem_get_info()[0] + _CONTEXT if device == "cuda" else free_memory()


def _smaller(spec: StudySpec) -> str:
    """The settings to lower where memory is short."""
    return (
        f"lower method.batch ({spec.resolved.batch} now) or evaluation.batch "
        f"({spec.evaluation.batch} now)"
    )


def free_memory() -> int:
    """Bytes of memory left on this machine, or in this container; 2**50 if unknown."""
    if not Path("/proc/meminfo").exists():
        return 2**50
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    left = int(lines["MemAvailable"].split()[0]) * 1024
    most, taken, stat = (_CGROUP / f"memory.{name}" for name in ("max", "current", "stat"))
    if not most.is_file() or (limit := most.read_text().strip()) == "max":
        return left
    # The kernel frees the file cache on demand.
    known = dict(line.split() for line in stat.read_text().splitlines())
    cache = int(known["active_file"]) + int(known["inactive_file"])
    return min(left, max(0, int(limit) - int(taken.read_text()) + cache))


def cost_lines(spec: StudySpec, *, workers: int | None = None) -> list[str]:
    """The cost of a study as a dry run shows it; nothing is downloaded or kept."""
    teacher, known = meta_teacher(spec)
    parameters = 4 * sum(p.numel() for p in teacher.parameters())
    stages, images = spec.resolved.stages, spec.evaluation.num_images
    rows, kept = spec.plan.num_rows(spec), spec.plan.num_kept(spec)
    intermediate = len(spec.plan.at) * (spec.plan.images or images)
    updates = sum(stage.num_updates for stage in stages)
    drawn = len(stages) * images + intermediate
    evaluations = sum(stage.nfe for stage in stages) * images + stages[0].nfe * intermediate
    if (scale := spec.evaluation.guidance) is not None:  # in place of the students' own
        evaluations *= calls(scale)
        evaluations //= calls(spec.method.options.get("guidance_student", 1.0))
    stored = _stored_bytes(spec, teacher, known)
    length, points = _one_shot(spec)
    short = spec.plan.short
    students = f"{len(stages)} students" if len(stages) > 1 else "a student"
    lines = [
        f"rows: {rows}, each of {students}, {updates:,} updates and {drawn:,} images",
        f"disk: {stored / 2**20:,.0f} MiB of trajectories a seed, "
        f"{kept * len(stages) * parameters / 2**20:,.0f} MiB of kept students",
    ]
    if length:
        lines.append(
            f"one-shot: one training of {round(length * updates):,} updates, and "
            f"{points * images:,} images along its curve"
        )
    if short is not None:
        lines.append(
            f"short: up to {short.trainings} trainings of {round(short.length * updates):,} "
            f"updates and {drawn:,} images"
        )
    try:
        found = measure(spec, patience=PATIENCE_SECONDS)
        why = f"to measure a trial takes longer than {PATIENCE_SECONDS:g} s here"
    except InputError as error:
        found, why = None, str(error)
    if found is None:
        lines.append(f"time and memory: not known before the launch: {why}")
    else:
        at_once = workers or 1
        judged = evaluations * found.draw_seconds + drawn * found.feature_seconds
        each = updates * found.update_seconds + judged
        whole = rows * each + length * updates * (found.update_seconds + found.recording_seconds)
        seen = stages[-1].nfe * found.draw_seconds + found.feature_seconds
        whole += points * images * seen
        seeds: float = spec.plan.num_seeds
        if short is not None:
            whole += short.trainings * (short.length * updates * found.update_seconds + judged)
            seeds += short.length  # their own, of the trials' seed
        recorded = seeds * stages[0].num_updates * found.recording_seconds if stored else 0.0
        lines += [
            f"memory: {_gib(found.peak_bytes)} a trial, of {_gib(found.free_bytes)} that are free",
            f"time: {duration(each)} a trial, {duration((recorded + whole) / at_once)} in "
            f"all with {at_once} worker{'s' * (at_once > 1)}, measured on {found.device} "
            f"({found.update_seconds:.3g} s an update, {1e3 * found.draw_seconds:.3g} ms a "
            f"network evaluation of an image, {1e3 * found.feature_seconds:.3g} ms its features)",
        ]
    if spec.teacher.train:
        trained = round(spec.teacher.train.kimg * 1000)
        lines.append(f"teacher: trained on {trained:,} images, once, which is not counted")
    if spec.teacher.recipe:
        lines.append(f"teacher: {spec.teacher.recipe} is made, once, which is not counted")
    return lines + _downloads(spec, parameters)


def _one_shot(spec: StudySpec) -> tuple[float, int]:
    """A one-shot training's length, in those of a trial, and its points; zeros without one."""
    arm = one_shot_arm(spec)
    asked = None if arm is None else OneShotTask.of(arm.params)
    return (0.0, 0) if asked is None else (asked.length, asked.points)


def _stored_bytes(spec: StudySpec, teacher: NetworkDenoiser, known: Mapping[str, Any]) -> int:
    """Size of one seed's recorded trajectories; 0 where none are recorded."""
    if (recordings := recordings_of(spec)) is None:
        return 0
    method, config = method_of(spec)
    inputs = Inputs(recordings=recordings, metadata=known, conditions=_placeholder(teacher))
    found = method.recording(config, teacher, inputs)
    return 0 if found is None else found.nbytes


def _downloads(spec: StudySpec, teacher_bytes: int) -> list[str]:
    """A line for each file that a launch downloads first."""
    name = spec.teacher.checkpoint or ""
    evaluation = spec.evaluation
    reference = REFERENCES.get(evaluation.reference or "")
    prompts = dict.fromkeys((spec.prompts, evaluation.prompts))
    wanted = [
        (PUBLIC_MODELS.get(name), teacher_bytes),
        (reference, 8 * 2048 * 2049 + (0 if reference is None else reference.image_bytes)),
        *((PROMPT_SETS.get(each or ""), None) for each in prompts),
    ]
    missing = [(file, size) for file, size in wanted if file is not None and not file.is_here]
    lines = []
    for file, size in missing:
        if not isinstance(file, ConvertedCheckpoint):
            page = hub_page(file.name) if isinstance(file, HubCheckpoint) else file.url
            about = f" (about {size / 2**20:,.0f} MiB)" if size else ""
            lines.append(f"{page} to {file.path}{about}")
    if (scorer := evaluation.clip_score) is not None and not Path(scorer).exists():
        lines.append(f"{hub_page(scorer)}, the CLIP model, unless it is in the hub's cache")
    if (weights := missing_checkpoint(spec.evaluation.extractor)) is not None:
        lines.append("{} to {}".format(*weights))
    made = [file.text() for file, _ in missing if isinstance(file, ConvertedCheckpoint)]
    return [
        *(f"download: the launch fetches {line}" for line in lines),
        *(f"missing: the launch needs {line}" for line in made),
    ]


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


# In the child.


def _measure(spec: StudySpec, free: int, download: bool) -> TrialCost:
    device = use_device(spec)
    wanted = dataclasses.replace(execution(spec), compile=False)  # compiling takes minutes
    wanted.require(device)
    if device.type == "cuda":
        free = _free_bytes("cuda")
    else:  # so that an allocation fails here, before the system kills any process
        resource.setrlimit(resource.RLIMIT_DATA, (free, free))
    described, known = describe_teacher(spec)
    teacher = build_denoiser(described).to(device).eval().execute(wanted)
    stage = _first_stage(spec, teacher, known)
    lap = _laps(device)
    batch, update = _update_seconds(stage, lap)
    if not _stored_bytes(spec, teacher, known):
        batch, update = 0.0, batch + update
    sampler, evaluation = stage.sampler, spec.evaluation
    count = min(evaluation.batch, evaluation.num_images)
    student = export_branch(stage.start)
    codec = _codec(spec, known, device)
    lap()
    draw_images(
        student,
        sampler,
        count,
        seed=0,
        batch=count,
        conditions=_placeholder(teacher),
        codec=codec,
    )
    drawing = lap()
    seen, name = min(FEATURES_BATCH, evaluation.num_images), evaluation.extractor
    extracting = 0.0
    if name not in RECIPES and (download or missing_checkpoint(name) is None):
        extractor = load_extractor(name, cache=cache_folder(), device=device)
        images = torch.zeros(seen, *described_shape(spec), dtype=torch.uint8)
        lap()
        features_of(images, extractor)
        extracting = lap()
    return TrialCost(
        recording_seconds=batch,
        update_seconds=update,
        draw_seconds=drawing / count / sampler.nfe,
        feature_seconds=extracting / seen,
        peak_bytes=_peak_bytes(device),
        free_bytes=free,
        device=device.type,
    )


def _codec(spec: StudySpec, known: Mapping[str, Any], device: torch.device) -> Codec | None:
    """The autoencoder of the teacher's folder; None, so not timed, where a recipe makes it."""
    checkpoint = spec.teacher.checkpoint
    if checkpoint is None or "codec" not in known or not Path(checkpoint).is_dir():
        return None
    return load_codec(checkpoint).to(device)


def _first_stage(spec: StudySpec, teacher: NetworkDenoiser, known: Mapping[str, Any]) -> Stage:
    """The first stage with branches; the images that it learns from are noise."""
    method = METHODS[spec.method.name]()
    share = spec.resolved.batch // spec.resources.team
    config = method.Config.read({**spec.method.options, "batch": share}, "method")
    # The placeholder of prompts is the caption of one class.
    classes = 1 if teacher.model.text_dim else teacher.label_dim
    noise = torch.randint(256, (share, *teacher.image_shape), dtype=torch.uint8)
    dataset = Dataset("noise", noise, "", torch.arange(share) % classes if classes else None)
    plan = next(each for each in method.plan(config) if each.branched)
    inputs = Inputs(dataset=dataset, metadata=known, conditions=_placeholder(teacher))
    return method.stage(plan, teacher, config, inputs)


def _placeholder(teacher: NetworkDenoiser) -> Prompts | None:
    """A blank prompt of CLIP's length, which costs as much as any; None without text."""
    if not teacher.model.text_dim:
        return None
    blank = torch.zeros(1, _PROMPT_TOKENS, teacher.model.text_dim)
    return Prompts(blank, blank)


def _update_seconds(stage: Stage, lap: Callable[[], float]) -> tuple[float, float]:
    """Seconds of the last of ``_UPDATES`` updates: those of its batch, and the rest."""
    timed, seconds = _TimedBatches(stage, lap), 0.0

    def on_iteration(done: IterationReport) -> None:
        nonlocal seconds
        seconds = lap()
        if done.iteration + 1 == _UPDATES:
            raise StoppedError

    weights = FixedWeights(uniform_weights()(stage.num_branches))
    with contextlib.suppress(StoppedError):
        train(cast("Stage", timed), weights, on_iteration=on_iteration, unread=1)
    return timed.seconds, seconds


class _TimedBatches:
    """A stage, with the seconds that its last batch took."""

    def __init__(self, stage: Stage, lap: Callable[[], float]) -> None:
        self._stage, self._lap, self.seconds = stage, lap, 0.0

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  whatever the stage has
        return getattr(self._stage, name)

    def batch(self, iteration: int, images: slice) -> object:
        self._lap()
        made = self._stage.batch(iteration, images)
        self.seconds = self._lap()
        return made


def _laps(device: torch.device) -> Callable[[], float]:
    """A function that returns the seconds since its last call, once the device is idle."""
    last = time.perf_counter()

    def lap() -> float:
        nonlocal last
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        before, last = last, time.perf_counter()
        return last - before

    return lap


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) + _CONTEXT
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Of this process alone; getrusage's starts at its parent's.
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024
