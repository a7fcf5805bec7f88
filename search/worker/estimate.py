"""What a study will cost: network evaluations, disk, memory, and time from a measurement here."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bdense.diffusion.denoiser import NetworkDenoiser, build_denoiser
from bdense.errors import InputError
from bdense.execution import Execution
from bdense.metrics.extractors import missing_weights
from bdense.models.public import CHECKPOINTS, HUB_CHECKPOINTS, REFERENCES
from search.spec.model_spec import ModelSpec
from search.spec.space import BASELINES
from search.spec.study_spec import StudySpec
from search.study.wording import duration
from search.worker.assets import trajectory_store, use_device
from search.worker.engine import architecture, execution, student_grid, teacher_solver
from search.worker.free_memory import free_bytes
from search.worker.memory import Memory, extractor_size, interval_update, trial_memory
from search.worker.row_words import words_of
from search.worker.student_calls import Update

MEASURE_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Upper bounds of what is left to compute and to store when nothing is cached.

    Attributes:
        updates: Images through forward and backward, in all.
        evaluations: Images through forward alone, in all.
        lines: What they are made of, and what is kept on disk, for people.
    """

    updates: int
    evaluations: int
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a study or a promotion will cost.

    Attributes:
        work: What there is to do.
        memory: What one row takes, for people.
        forward_seconds, update_seconds: Measured for one image; not a number where the network has
            no room here.
        device: Where they were measured.
        remarks: What the user should know besides: downloads, and what this machine cannot do.
    """

    work: Work
    memory: str
    forward_seconds: float
    update_seconds: float
    device: str
    remarks: tuple[str, ...] = ()

    @property
    def workers_seconds(self) -> float:
        """Seconds of work in all, to be shared by the workers."""
        work = self.work
        return work.updates * self.update_seconds + work.evaluations * self.forward_seconds

    def lines(self) -> list[str]:
        """For people."""
        return [*self.work.lines, self.memory, self._time_line(), *self.remarks]

    def _time_line(self) -> str:
        if math.isnan(self.forward_seconds):
            return f"time: not measured, the network alone has no room on {self.device}"
        forward, update = _short(self.forward_seconds), _short(self.update_seconds)
        return (
            f"time: at most {duration(self.workers_seconds)} of one worker, measured for "
            f"{MEASURE_SECONDS:g} s on {self.device} ({forward} forward, {update} "
            "forward+backward an image)"
        )


def device_words(spec: ModelSpec, device: torch.device) -> str:
    """Where something was measured, for people."""
    return "the GPU" if device.type == "cuda" else f"{spec.resources.threads} CPU thread(s)"


def _short(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def estimate(spec: StudySpec) -> Cost:
    """Measure the study's network on this device for five seconds and multiply.

    Nothing is downloaded, and nothing is refused that another machine could do.
    """
    device = use_device(spec, foretold=True)
    network = architecture(spec)
    with torch.device("meta"):
        teacher = build_denoiser(network).eval()
    work = trials_work(spec, teacher)
    memory = trial_memory(spec, network, device)
    forward, update = _measure(spec, network, memory, device)
    return Cost(
        work=work,
        memory=memory.line(spec),
        forward_seconds=forward,
        update_seconds=update,
        device=device_words(spec, device),
        remarks=remarks(spec, memory, device, checkpoint_bytes=weights_bytes(teacher)),
    )


def trials_work(spec: StudySpec, teacher: NetworkDenoiser) -> Work:
    """Count a study's.

    Args:
        spec: The study.
        teacher: Its network; the numbers in it are not looked at.
    """
    grid, images = student_grid(spec), spec.budget.iterations * spec.budget.batch
    students = spec.budget.trials + len(BASELINES)
    recorded = spec.trajectories.mode == "recorded"
    walk = teacher_solver(spec).nfe(grid.num_intervals * grid.substeps)
    walked = images * walk * (1 if recorded else students)
    learned = images * len(grid.trained)
    drawn = (spec.evaluation.images + len(spec.looks) * spec.look_images) * grid.nfe
    trajectories = trajectory_store(spec, teacher).nbytes if recorded else 0
    kept = weights_bytes(teacher) * (spec.keep_students + len(BASELINES))
    training = training_images(spec)
    return Work(
        updates=training + students * learned,
        evaluations=walked + students * drawn,
        lines=(
            f"students: {students} (baselines included)",
            f"network evaluations, in images: {walked:,} of the teacher for trajectories; "
            f"{learned:,} forward+backward and {drawn:,} forward for each student"
            + training_words(training),
            f"disk: {trajectories / 2**20:,.0f} MiB of trajectories, {kept / 2**20:,.0f} MiB of "
            "kept students",
        ),
    )


def training_images(spec: ModelSpec) -> int:
    """Images through forward and backward to train the teacher; 0 where it has a checkpoint."""
    return round(spec.teacher.train.kimg * 1000) if spec.teacher.train else 0


def training_words(images: int) -> str:
    """The same as the end of a line."""
    return f"; {images:,} forward+backward to train the teacher" if images else ""


def weights_bytes(network: NetworkDenoiser) -> int:
    """Of a network's float32 parameters, which a student of one branch has as many of."""
    return 4 * sum(p.numel() for p in network.parameters())


def remarks(
    spec: ModelSpec, memory: Memory, device: torch.device, *, checkpoint_bytes: int
) -> tuple[str, ...]:
    """Why this machine would refuse it, and what it fetches first.

    Args:
        spec: What would be launched.
        memory: Of one of its rows.
        device: Where they would run.
        checkpoint_bytes: Of the teacher, where its makers say nothing.
    """
    return (*_not_here(spec, memory, device), *_to_download(spec, checkpoint_bytes))


def _not_here(spec: ModelSpec, memory: Memory, device: torch.device) -> list[str]:
    """Why a launch on this machine would be refused."""
    reasons = []
    gpus = spec.resources.gpus
    if device.type == "cpu" and gpus != "auto" and gpus > 0:
        row = words_of(spec).name
        reasons.append(f"it has no GPU, and a {row} asks for resources.gpus {gpus:g}")
    try:
        execution(spec).require(device)
    except InputError as error:
        reasons.append(str(error))
    # A study for GPUs is no study for this machine's memory.
    if not reasons and (lacking := memory.shortage(spec, device, together=1)):
        reasons.append(lacking)
    return [f"not on this machine: {reason}" for reason in reasons]


def _to_download(spec: ModelSpec, checkpoint_bytes: int) -> list[str]:
    """What a launch fetches first; the network was measured with untrained weights in any case."""
    name = spec.teacher.checkpoint or ""
    checkpoint, on_hub = CHECKPOINTS.get(name), HUB_CHECKPOINTS.get(name)
    reference = REFERENCES.get(spec.evaluation.reference or "")
    # Where their makers say no size: float32 parameters; 2048 features' mean and covariance.
    files = [
        (file.url, file.path, file.size or about)
        for file, about in ((checkpoint, checkpoint_bytes), (reference, 8 * 2048 * 2049))
        if file is not None and not file.path.is_file()
    ]
    if on_hub is not None and not on_hub.is_here:
        files.append((on_hub.url, on_hub.path, checkpoint_bytes))
    if (weights := missing_weights(spec.evaluation.extractor)) is not None:
        files.append((*weights, int(2**20 * extractor_size(spec.evaluation.extractor).weights)))
    return [
        f"download: the launch fetches {url} to {path} (about {size / 2**20:,.0f} MiB)"
        for url, path, size in files
    ]


def _measure(
    spec: StudySpec, network: Mapping[str, Any], memory: Memory, device: torch.device
) -> tuple[float, float]:
    wide = {**network, "num_branches": spec.student.substeps}
    return image_seconds(spec, wide, interval_update(spec), memory, device)


def image_seconds(
    spec: ModelSpec,
    network: Mapping[str, Any],
    update: Update,
    memory: Memory,
    device: torch.device,
) -> tuple[float, float]:
    """Seconds an image: forward, and forward + backward + Adam's step.

    Not a number where the network, its gradients and Adam's moments have no room.

    Args:
        spec: How it computes, and what an update's batch is.
        network: The student's, as ``build_denoiser`` takes it.
        update: Its way forth and back.
        memory: Of one row.
        device: Where.
    """
    free = free_bytes(device)
    if free is not None and _held(memory) > free:
        return math.nan, math.nan
    # Untrained weights take as long as any.
    student = build_denoiser(dict(network)).to(device).eval().execute(_computable(spec, device))
    optimizer = torch.optim.Adam(student.parameters(), fused=True)
    whole = words_of(spec).batch
    batch = _affordable(student, whole // spec.resources.team, memory, device)
    x, level = torch.zeros(batch, *student.image_shape, device=device), torch.tensor(1.0)

    def forward() -> None:
        with torch.no_grad():
            student(x, level)

    forward_seconds = _seconds(forward, device) / batch
    update_seconds = _seconds(lambda: update(student, x), device) / batch
    # Adam's part is the same for any batch.
    return forward_seconds, update_seconds + _seconds(optimizer.step, device) / whole


def _computable(spec: ModelSpec, device: torch.device) -> Execution:
    """How the study computes, as far as this device does; compiled, it would take minutes."""
    wanted = dataclasses.replace(execution(spec), compile=False)
    try:
        wanted.require(device)
    except InputError:
        return dataclasses.replace(wanted, precision="float32")
    return wanted


def _held(memory: Memory) -> int:
    """Bytes that are there for a batch of any size."""
    return memory.student + memory.gradients + memory.adam


def _affordable(network: NetworkDenoiser, batch: int, memory: Memory, device: torch.device) -> int:
    """As many of ``batch`` images as one call has room for and, on a CPU, time.

    Fewer images at once cost more each, if anything: the estimate stays an upper bound.
    """
    if (free := free_bytes(device)) is not None:
        room = (free - _held(memory)) / memory.activations
        batch = max(1, min(batch, int(batch * room)))
    if device.type == "cuda":
        return batch
    started = time.perf_counter()
    with torch.no_grad():
        network(torch.zeros(1, *network.image_shape), torch.tensor(1.0))
    # An update costs some three forwards, and is called twice: to warm up, and to be measured.
    return max(1, min(batch, int(MEASURE_SECONDS / 6 / (time.perf_counter() - started))))


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started, calls = time.perf_counter(), 0
    while (spent := time.perf_counter() - started) < MEASURE_SECONDS / 3 or calls == 0:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        calls += 1
    return spent / calls
