"""What a promotion will cost: network evaluations, disk, memory, and time as measured here."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bdense.diffusion.denoiser import NetworkDenoiser, build_denoiser
from bdense.methods.progressive import branch_errors, dense_targets, prediction_of
from search.spec.promotion_spec import PromotionSpec
from search.worker.assets import use_device
from search.worker.chain_engine import chain_schedule, round_config
from search.worker.engine import architecture
from search.worker.estimate import (
    Cost,
    Work,
    device_words,
    image_seconds,
    remarks,
    training_images,
    training_words,
    weights_bytes,
)
from search.worker.memory import Memory, dataset_bytes, row_memory
from search.worker.student_calls import StudentCalls, Update


def estimate_promotion(spec: PromotionSpec, arms: int) -> Cost:
    """Measure the promotion's network on this device for five seconds and multiply.

    Nothing is downloaded, and nothing is refused that another machine could do.

    Args:
        spec: The promotion.
        arms: Ways to weigh the branches, baselines included; each under every training seed.

    Raises:
        InputError: The teacher cannot be told without its file, or the chain does not fit it.
    """
    device = use_device(spec, foretold=True)
    network = architecture(spec)
    with torch.device("meta"):
        teacher = build_denoiser(network)
    work = chains_work(spec, teacher, arms)
    memory = chain_memory(spec, network, device)
    wide = network | {"num_branches": spec.chain.substeps}
    forward, update = image_seconds(spec, wide, _student_update(spec, teacher), memory, device)
    return Cost(
        work=work,
        memory=memory.line(spec),
        forward_seconds=forward,
        update_seconds=update,
        device=device_words(spec, device),
        remarks=(
            *_without_pipeline(spec, network),
            *remarks(spec, memory, device, checkpoint_bytes=weights_bytes(teacher)),
        ),
    )


def chains_work(spec: PromotionSpec, teacher: NetworkDenoiser, arms: int) -> Work:
    """Count a promotion's; a chain is an arm under a seed.

    Args:
        spec: The promotion.
        teacher: Its network; the numbers in it are not looked at.
        arms: As of ``estimate_promotion``.

    Raises:
        InputError: K does not lead from the first number of steps to the last.
    """
    first, images = spec.chain.first, spec.evaluation.images
    rounds, chains = round_config(spec).rounds, arms * len(spec.seeds.training)
    # Another prediction type costs a round without fewer steps, with the teacher at 1 a time.
    converts = spec.prediction_type not in (None, prediction_of(teacher))
    steps = (first, *rounds) if converts else rounds
    learned = spec.round.updates * spec.round.batch
    targets = learned * (spec.chain.substeps * len(rounds) + (1 if converts else 0))
    updates, drawn = learned * len(steps), images * sum(steps)
    kept = weights_bytes(teacher) * len(steps) * chains
    training = training_images(spec)
    return Work(
        updates=training + chains * updates,
        evaluations=images * first + chains * (targets + drawn),
        lines=(
            f"chains: {chains} of {len(steps)} student{'s' * (len(steps) > 1)} each, at "
            f"{', '.join(map(str, steps))} steps",
            f"network evaluations, in images: {images * first:,} of the teacher for its own FID; "
            f"{updates:,} forward+backward and {targets:,} forward for targets and {drawn:,} "
            "forward for FIDs for each chain" + training_words(training),
            f"disk: {kept / 2**20:,.0f} MiB of students, one a round and chain",
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
    plan = StudentCalls(
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
    grid = chain_schedule(spec, teacher).grid(round_config(spec).rounds[0] * substeps)
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
    errors = branch_errors(student.branches, x, sigma, targets)
    errors.sum().backward()  # type: ignore[no-untyped-call]
