"""What a promotion will cost: network evaluations, disk, memory, and time as measured here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bdense.chain import prediction_of
from bdense.denoiser import NetworkDenoiser, build_denoiser
from bdense.progressive import branch_errors, dense_targets
from search.specs.promotion_spec import PromotionSpec
from search.trials.assets import use_device
from search.trials.chain_engine import chain_of, chain_schedule
from search.trials.engine import architecture
from search.trials.estimate import device_words, image_seconds, remarks, time_line
from search.trials.memory import Memory, Plan, Update, dataset_bytes, row_memory


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainCost:
    """Upper bounds of what is left when nothing is cached; a chain is an arm under a seed.

    Attributes:
        chains: In all.
        steps: N of each student of a chain, in order.
        teacher_training: Images through forward and backward, once.
        teacher_evaluations: Images through the teacher for its own FID, once.
        updates: Images through forward and backward of one chain.
        targets: Images through the teachers of one chain's rounds.
        evaluations: Images through the students of one chain for their FIDs.
        student_bytes: Disk.
        memory: What one chain takes.
        memory_line: The same, for people.
        forward_seconds, update_seconds: Measured for one image; not a number where the network has
            no room here.
        device: Where they were measured.
        remarks: What the user should know besides: downloads, and what this machine cannot do.
    """

    chains: int
    steps: tuple[int, ...]
    teacher_training: int
    teacher_evaluations: int
    updates: int
    targets: int
    evaluations: int
    student_bytes: int
    memory: Memory
    memory_line: str
    forward_seconds: float
    update_seconds: float
    device: str
    remarks: tuple[str, ...] = ()

    @property
    def workers_seconds(self) -> float:
        """Seconds of work in all, to be shared by the workers."""
        forward = self.teacher_evaluations + self.chains * (self.targets + self.evaluations)
        updates = self.teacher_training + self.chains * self.updates
        return updates * self.update_seconds + forward * self.forward_seconds

    def lines(self) -> list[str]:
        """For people."""
        rounds = len(self.steps)
        return [
            f"chains: {self.chains} of {rounds} student{'s' * (rounds > 1)} each, at "
            f"{', '.join(map(str, self.steps))} steps",
            f"network evaluations, in images: {self.teacher_evaluations:,} of the teacher for its "
            f"own FID; {self.updates:,} forward+backward and {self.targets:,} forward for targets "
            f"and {self.evaluations:,} forward for FIDs for each chain"
            + (
                f"; {self.teacher_training:,} forward+backward to train the teacher"
                if self.teacher_training
                else ""
            ),
            f"disk: {self.student_bytes / 2**20:,.0f} MiB of students, one a round and chain",
            self.memory_line,
            time_line(
                self.workers_seconds,
                self.forward_seconds,
                self.update_seconds,
                device=self.device,
            ),
            *self.remarks,
        ]


def estimate_promotion(spec: PromotionSpec, arms: int) -> ChainCost:
    """Measure the promotion's network on this device for five seconds and multiply.

    Nothing is downloaded, and nothing is refused that another machine could do.

    Args:
        spec: The promotion.
        arms: Ways to weigh the branches, baselines included; each under every training seed.

    Raises:
        InputError: The teacher cannot be told without its file, or the chain does not fit it.
    """
    device = use_device(spec)
    network = architecture(spec)
    with torch.device("meta"):
        teacher = build_denoiser(network)
    substeps, first, images = spec.chain.substeps, spec.chain.first, spec.evaluation.images
    rounds = chain_of(spec).students
    update = spec.round.updates * spec.round.batch
    # Another prediction type costs a round without fewer steps, with the teacher at 1 a time.
    converts = spec.prediction_type not in (None, prediction_of(teacher))
    steps = (first, *rounds) if converts else rounds
    chains = arms * len(spec.seeds.training)
    parameters = sum(p.numel() for p in teacher.parameters())
    memory = chain_memory(spec, network, device)
    forward_seconds, update_seconds = image_seconds(
        spec, network | {"num_branches": substeps}, _student_update(spec, teacher), memory, device
    )
    return ChainCost(
        chains=chains,
        steps=steps,
        teacher_training=round(spec.teacher.train.kimg * 1000) if spec.teacher.train else 0,
        teacher_evaluations=images * first,
        updates=update * len(steps),
        targets=update * (substeps * len(rounds) + (1 if converts else 0)),
        evaluations=images * sum(steps),
        student_bytes=4 * parameters * len(steps) * chains,
        memory=memory,
        memory_line=memory.line(spec),
        forward_seconds=forward_seconds,
        update_seconds=update_seconds,
        device=device_words(spec, device),
        remarks=(
            *_without_pipeline(spec, network),
            *remarks(spec, memory, device, checkpoint_bytes=4 * parameters),
        ),
    )


def _without_pipeline(spec: PromotionSpec, network: Mapping[str, Any]) -> list[str]:
    """Why a diffusers network's student will be no diffusers pipeline, where it will not."""
    times, last = network.get("num_train_timesteps", 0), spec.chain.last
    if network["network"] != "UNet2DModel" or not times or times % last == 0:
        return []
    return [
        f"no diffusers pipeline will be written: its scheduler takes whole steps of {times} "
        f"times, and {last} does not divide them"
    ]


def chain_memory(
    spec: PromotionSpec, architecture: Mapping[str, Any], device: torch.device
) -> Memory:
    """Foretell one chain's memory.

    Args:
        spec: The promotion.
        architecture: The teacher's, as ``build_denoiser`` takes it.
        device: Where it runs.
    """
    with torch.device("meta"):
        teacher = build_denoiser(dict(architecture))
    plan = Plan(
        spec=spec,
        architecture=architecture,
        device=device,
        num_branches=spec.chain.substeps,
        update=_whole_update(spec, teacher),
    )
    return row_memory(
        plan,
        images=2 * plan.batch,  # clean ones and their noise
        moments=0 if spec.round.optimizer == "sgd" else 2,
        # Its images stay in the machine's memory, a byte a value.
        process=dataset_bytes(spec, plan.image) if device.type == "cpu" else 0,
    )


def _levels(spec: PromotionSpec, teacher: NetworkDenoiser) -> Tensor:
    """[K + 1, 1] of the first round's first interval, t_{0,0}..t_{0,K}."""
    substeps = spec.chain.substeps
    grid = chain_schedule(spec, teacher).grid(chain_of(spec).students[0] * substeps)
    return grid[: substeps + 1, None]


def _student_update(spec: PromotionSpec, teacher: NetworkDenoiser) -> Update:
    """The student's part alone: the teacher's calls are counted as such."""
    levels = _levels(spec, teacher)

    def forth_and_back(student: NetworkDenoiser, x: Tensor) -> None:
        targets = x.expand(student.num_branches, *x.shape)
        _learn(student, x, levels[0].expand(len(x)), targets)

    return forth_and_back


def _whole_update(spec: PromotionSpec, teacher: NetworkDenoiser) -> Update:
    """The teacher's K calls too, which are the student's own but for its wider head."""
    levels = _levels(spec, teacher)

    def forth_and_back(student: NetworkDenoiser, x: Tensor) -> None:
        student.train(spec.round.dropout)
        own = levels.expand(-1, len(x))
        targets = dense_targets(student, x, own, clip=spec.round.clip_targets)
        _learn(student, x, own[0], targets)

    return forth_and_back


def _learn(student: NetworkDenoiser, x: Tensor, sigma: Tensor, targets: Tensor) -> None:
    errors = branch_errors(student, x, sigma, targets)
    errors.sum().backward()  # type: ignore[no-untyped-call]
