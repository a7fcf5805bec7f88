"""What a study will cost: network evaluations, disk, and time from a short measurement here."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bdense.branches import widen_head
from bdense.data import load_dataset
from bdense.denoiser import NetworkDenoiser, build_denoiser
from bdense.public import CHECKPOINTS, PublicCheckpoint
from bdense.sfd import branch_losses, branch_states
from bdense.sources import load_model
from bdense.teachers import new_denoiser
from search.assets import trajectory_store, use_device
from search.engine import student_grid, teacher_config, teacher_solver
from search.report import duration
from search.space import BASELINES
from search.spec import StudySpec

MEASURE_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Upper bounds of what is left when nothing is cached.

    Attributes:
        teacher_training: Images through forward and backward, once.
        teacher_evaluations: Images through the teacher for trajectories, in all.
        student_updates: Images through forward and backward of one trial.
        student_evaluations: Images through the student for one trial's FID.
        trials: Students in all, baselines included.
        trajectory_bytes, student_bytes: Disk.
        forward_seconds, update_seconds: Measured for one image.
        device: Where they were measured.
        remark: What the user should know besides; empty for nothing.
    """

    teacher_training: int
    teacher_evaluations: int
    student_updates: int
    student_evaluations: int
    trials: int
    trajectory_bytes: int
    student_bytes: int
    forward_seconds: float
    update_seconds: float
    device: str
    remark: str = ""

    @property
    def workers_seconds(self) -> float:
        """Seconds of work in all, to be shared by the workers."""
        updates = self.teacher_training + self.trials * self.student_updates
        evaluations = self.teacher_evaluations + self.trials * self.student_evaluations
        return updates * self.update_seconds + evaluations * self.forward_seconds

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"students: {self.trials} (baselines included)",
            f"network evaluations, in images: {self.teacher_evaluations:,} of the teacher for "
            f"trajectories; {self.student_updates:,} forward+backward and "
            f"{self.student_evaluations:,} forward for each student"
            + (
                f"; {self.teacher_training:,} forward+backward to train the teacher"
                if self.teacher_training
                else ""
            ),
            f"disk: {self.trajectory_bytes / 2**20:,.0f} MiB of trajectories, "
            f"{self.student_bytes / 2**20:,.0f} MiB of kept students",
            f"time: at most {duration(self.workers_seconds)} of one worker, measured for "
            f"{MEASURE_SECONDS:g} s on {self.device} "
            f"({1e3 * self.forward_seconds:.3g} ms forward, "
            f"{1e3 * self.update_seconds:.3g} ms forward+backward an image)",
            *([self.remark] if self.remark else []),
        ]


def estimate(spec: StudySpec) -> Cost:
    """Measure the study's network on this device for five seconds and multiply."""
    device = use_device(spec)
    teacher = _network(spec).to(device)
    grid, iterations = student_grid(spec), -(-spec.budget.images // spec.budget.batch)
    images = iterations * spec.budget.batch
    trials = spec.budget.trials + len(BASELINES)
    walks = 1 if spec.trajectories.mode == "recorded" else trials
    walk = teacher_solver(spec).nfe(grid.num_intervals * grid.substeps)
    parameters = sum(p.numel() for p in teacher.parameters())
    forward, update = _measure(teacher, spec, device)
    recorded = spec.trajectories.mode == "recorded"
    return Cost(
        teacher_training=round(spec.teacher.train.kimg * 1000) if spec.teacher.train else 0,
        teacher_evaluations=images * walk * walks,
        student_updates=images * len(grid.trained),
        student_evaluations=spec.evaluation.images * grid.nfe,
        trials=trials,
        trajectory_bytes=trajectory_store(spec, teacher).nbytes if recorded else 0,
        student_bytes=4 * parameters * (spec.keep_students + len(BASELINES)),
        forward_seconds=forward,
        update_seconds=update,
        device="the GPU" if device.type == "cuda" else f"{spec.resources.threads} CPU thread(s)",
        remark=_to_download(spec),
    )


def _missing(spec: StudySpec) -> PublicCheckpoint | None:
    """The study's teacher, if it is a published one that is not here yet."""
    published = CHECKPOINTS.get(spec.teacher.checkpoint or "")
    return None if published is None or published.path.is_file() else published


def _to_download(spec: StudySpec) -> str:
    published = _missing(spec)
    if published is None:
        return ""
    return (
        f"download: the launch fetches {published.url} to {published.path}; until then the "
        f"network is {published.name}'s with untrained weights, which cost the same"
    )


def _network(spec: StudySpec) -> NetworkDenoiser:
    if (published := _missing(spec)) is not None:
        return build_denoiser(dict(published.architecture)).eval()
    if spec.teacher.checkpoint is not None:
        return load_model(spec.teacher.checkpoint)[0]
    assert spec.teacher.train is not None
    shape = load_dataset(spec.data).images.shape[1:]
    return new_denoiser(teacher_config(spec.teacher.train), shape).eval()


def _measure(
    teacher: NetworkDenoiser, spec: StudySpec, device: torch.device
) -> tuple[float, float]:
    """Seconds an image: forward, and forward + backward + update."""
    grid = student_grid(spec)
    student = widen_head(teacher, grid.substeps)
    optimizer = torch.optim.Adam(student.parameters(), fused=True)
    levels = grid.interval(grid.trained.start)
    batch = _affordable(teacher, spec.budget.batch, device)
    x = torch.zeros(batch, *teacher.image_shape, device=device)
    targets = x.expand(grid.substeps, *x.shape)

    def forward() -> None:
        with torch.no_grad():
            teacher(x, levels[0])

    def update() -> None:
        optimizer.zero_grad(set_to_none=True)
        losses = branch_losses(branch_states(student, x, levels), targets)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return _seconds(forward, device) / batch, _seconds(update, device) / batch


def _affordable(teacher: NetworkDenoiser, batch: int, device: torch.device) -> int:
    """As many of ``batch`` images as one call can take: on a CPU a large network has seconds each.

    Fewer images at once cost more each, if anything: the estimate stays an upper bound.
    """
    if device.type == "cuda":
        return batch
    started = time.perf_counter()
    with torch.no_grad():
        teacher(torch.zeros(1, *teacher.image_shape), torch.tensor(1.0))
    # An update costs some three forwards, and is called twice: to warm up, and to be measured.
    return max(1, min(batch, int(MEASURE_SECONDS / 6 / (time.perf_counter() - started))))


def _seconds(call: Callable[[], None], device: torch.device) -> float:
    call()
    started, calls = time.perf_counter(), 0
    while (spent := time.perf_counter() - started) < MEASURE_SECONDS / 2 or calls == 0:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        calls += 1
    return spent / calls
