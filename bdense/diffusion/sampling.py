"""From noise to images with a few-step student, counting its network evaluations.

B batch, C channels, H x W pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bdense.arguments import require_types
from bdense.diffusion import BATCH
from bdense.diffusion.codecs import Codec, Pixels
from bdense.diffusion.conditions import Conditions
from bdense.diffusion.ddpm import DDPMSchedule, DiscreteSchedule
from bdense.diffusion.denoiser import Denoiser, NetworkDenoiser
from bdense.diffusion.guidance import calls, null_for
from bdense.diffusion.pictures import to_uint8
from bdense.diffusion.preconditioning import Preconditioning
from bdense.diffusion.schedules import Schedule, require_grid
from bdense.diffusion.solvers import (
    Euler,
    Solver,
    StepNoise,
    analytical_first_step,
    no_noise,
    solve,
    solver_from,
)
from bdense.diffusion.vp import CosineSchedule, Levels
from bdense.errors import InputError
from bdense.randomness import Stream, image_noise

# Metadata of what a student's FID was measured with, see ``bdense.metrics.setup``.
SETUP = "fid_setup"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """How images are drawn: the grid, the solver, and whether its first step is free.

    Attributes:
        num_intervals: N steps.
        afs: Analytical first step: NFE is one less.
        solver: Of the steps; a student needs the one that it was distilled for.
        guidance: Scale of classifier-free guidance; NFE is doubled where it is not 1 or 0.

    Raises:
        InputError: NFE is below 1, the schedule ends at 0, which the solver does not reach, or the
            solver is for another number of intervals.
    """

    num_intervals: int
    afs: bool
    schedule: Levels = field(default_factory=Schedule)
    solver: Solver = field(default_factory=Euler)
    guidance: float = 1.0

    def __post_init__(self) -> None:
        require_types(self)
        self.solver.require_intervals(self.num_intervals)
        if self.nfe < 1:
            raise InputError(
                f"num_intervals={self.num_intervals} with afs={self.afs} leaves no network "
                "evaluation; NFE must be at least 1"
            )
        require_grid(self.num_intervals)
        if not self.solver.reaches_zero:
            with torch.device("cpu"):  # also where a network's shapes alone are built
                last = float(self.schedule.grid(1)[-1])
            if last == 0:
                raise InputError(
                    f"{self.schedule.text()} end without noise, which {self.solver.name} does not "
                    "reach; take ddim"
                )

    @property
    def nfe(self) -> int:
        """Network evaluations an image costs, two of each prediction under guidance."""
        predictions = self.solver.nfe(self.num_intervals) - (1 if self.afs else 0)
        return predictions * calls(self.guidance)

    @property
    def sequential_nfe(self) -> int:
        """Network calls one after another, where some of the evaluations are one batch."""
        return self.solver.sequential_nfe(self.num_intervals) - (1 if self.afs else 0)

    @property
    def num_points(self) -> int:
        """N + 1, the step condition."""
        return self.num_intervals + 1

    def __call__(
        self, denoise: Denoiser, noise: Tensor, step_noise: StepNoise = no_noise
    ) -> Tensor:
        """Draw images, nominally in [-1, 1].

        Args:
            denoise: D(x; sigma), with conditions and guidance bound (``NetworkDenoiser.given``).
            noise: [B, C, H, W] unit noise that images start from.
            step_noise: What a stochastic solver adds in each interval.

        Returns:
            [B, C, H, W].
        """
        levels = self.schedule.grid(self.num_intervals)
        model = analytical_first_step(denoise, levels[0]) if self.afs else denoise
        return solve(self.solver, model, self.schedule.start(noise), levels, step_noise)

    def describe(self) -> dict[str, Any]:
        """Plain values, which ``sampler_from`` reads back; the solver's beside the grid's."""
        grid = {"num_intervals": self.num_intervals, "afs": self.afs}
        guidance = {} if self.guidance == 1 else {"guidance": self.guidance}
        return grid | {"schedule": self.schedule.describe()} | guidance | self.solver.describe()


def sampler_from(description: Mapping[str, Any]) -> Sampler:
    """The sampler that ``Sampler.describe`` wrote down.

    Raises:
        InputError: The solver is not known, or its options are others.
    """
    solver = dict(description)
    return Sampler(
        num_intervals=solver.pop("num_intervals"),
        afs=solver.pop("afs"),
        schedule=schedule_from(solver.pop("schedule")),
        guidance=solver.pop("guidance", 1.0),
        solver=solver_from(solver),
    )


def schedule_from(description: Mapping[str, Any]) -> Levels:
    """The schedule that ``Levels.describe`` wrote down."""
    options = dict(description)
    if options["kind"] == "discrete":
        return DiscreteSchedule(**options | {"process": DDPMSchedule(**options["process"])})
    processes = {process.kind: process for process in (CosineSchedule, DDPMSchedule)}
    if (process := processes.get(options["kind"])) is None:
        return Schedule(**options)
    del options["kind"]
    return process(**options)


def samplers_from(metadata: Mapping[str, Any]) -> list[Sampler]:
    """The samplers that a student was distilled for, by NFE; none for a teacher.

    A student for several NFE (SFD-v) names them as ``nfe``; its ``sampler`` is the first.
    """
    if "sampler" not in metadata:
        return []
    own = sampler_from(metadata["sampler"])
    if "nfe" not in metadata:
        return [own]
    intervals = [
        nfe // calls(own.guidance) + (1 if own.afs else 0) for nfe in sorted(metadata["nfe"])
    ]
    return [replace(own, num_intervals=number) for number in intervals]


def measured_samplers(metadata: Mapping[str, Any]) -> list[Sampler]:
    """A student's samplers at the guidance that its FID was measured at, by NFE.

    Without such a guidance they are those of ``samplers_from``.
    """
    guidance = metadata.get(SETUP, {}).get("guidance")
    own = samplers_from(metadata)
    return own if guidance is None else [replace(each, guidance=guidance) for each in own]


def as_measured(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata with the samplers that the student's FID was measured with."""
    measured = measured_samplers(metadata)
    if measured == samplers_from(metadata):
        return dict(metadata)
    others = {name: value for name, value in metadata.items() if name != "nfe"}
    return others | served_metadata(measured)


def levels_of(metadata: Mapping[str, Any], precond: Preconditioning) -> dict[str, Any]:
    """The knobs of a student's noise levels; none for a process of its own.

    A teacher's are those that are usual for it, if it names any, else the default bounds where it
    was trained for these, and its own where it was not.
    """
    if not (served := samplers_from(metadata)):
        usual = Schedule()
        bounds = {
            "sigma_min": max(usual.sigma_min, precond.sigma_min),
            "sigma_max": min(usual.sigma_max, precond.sigma_max),
        }
        return {**bounds, **metadata.get("levels", {})}
    if not isinstance(levels := served[0].schedule, Schedule):
        return {}
    described = levels.describe()
    described.pop("process", None)  # the network's own
    return {"schedule": described.pop("kind"), **described}


def served_metadata(samplers: Sequence[Sampler]) -> dict[str, Any]:
    """What ``samplers_from`` reads back; the samplers differ only in their NFE."""
    ordered = sorted(samplers, key=lambda sampler: sampler.nfe)
    several = {"nfe": [sampler.nfe for sampler in ordered]} if len(ordered) > 1 else {}
    return {"sampler": ordered[0].describe(), **several}


def draw_images(
    denoiser: NetworkDenoiser,
    sampler: Sampler | None = None,
    count: int = 64,
    *,
    seed: int,
    batch: int = BATCH,
    class_index: int | None = None,
    conditions: Conditions | None = None,
    codec: Codec | None = None,
    on_image: Callable[[int], None] | None = None,
) -> Tensor:
    """Draw images as a user's files would hold them.

    Image i depends on (seed, i) only, not on the batch size or the number of images.

    Args:
        denoiser: In eval mode.
        sampler: Grid, solver and AFS; None is a student's own, the one of the lowest NFE.
        class_index: The class of all images; None draws the network's condition for each.
        conditions: Override the network's own, for example with prompts.
        codec: What makes images of latents, on the denoiser's device; None keeps what is drawn.
        on_image: Called with the number of images drawn so far.

    Returns:
        [count, C, H, W] uint8 on the CPU.

    Raises:
        InputError: The network does not know the class, has no null for guidance or needs prompts,
            a number is below 1, a student was not distilled for the sampler, or a teacher has none
            of its own.
        NonFiniteError: An image holds NaN or infinity.
    """
    sampler = _own_sampler(denoiser, sampler)
    if conditions is None:
        conditions = denoiser.conditions_of(class_index)
    like = next(denoiser.parameters())
    null = null_for(sampler.guidance, conditions, like)
    if count < 1:
        raise InputError(f"the number of images must be at least 1, got {count}")
    if batch < 1:
        raise InputError(f"batch must be at least 1, got {batch}")
    drawn = []
    for first in range(0, count, batch):
        images = range(first, min(first + batch, count))
        noise = image_noise(seed, Stream.EVALUATION, images, denoiser.image_shape)
        condition = conditions.evaluation(seed, images).to(like)
        found = sampler(
            denoiser.given(condition, sampler.num_points, guidance=sampler.guidance, null=null),
            noise.to(like.device),
            step_noise(seed, images, denoiser.image_shape),
        )
        images_drawn = found if codec is None else codec.decode(found)
        drawn.append(to_uint8(images_drawn).cpu())
        if on_image is not None:
            on_image(images.stop)
    return torch.cat(drawn)


def drawn_with(sampler: Sampler, codec: Codec | None = None) -> dict[str, Any]:
    """What a FID's record says of how images were drawn: arguments of ``measure_images``.

    A codec decodes the sampler's last state x, not z = x / sqrt(1 + sigma^2).
    """
    decoded = None if codec is None or isinstance(codec, Pixels) else "x"
    return {"nfe": sampler.nfe, "guidance": sampler.guidance, "decoded": decoded}


def _own_sampler(denoiser: NetworkDenoiser, asked: Sampler | None) -> Sampler:
    """The sampler that was asked for, or a student's own."""
    own = denoiser.samplers
    if asked is None:
        if not own:
            raise InputError(
                "a teacher has no sampler of its own; give one, such as "
                "Sampler(num_intervals=18, afs=False, solver=Heun())"
            )
        return own[0]
    if own and replace(asked, guidance=own[0].guidance) not in own:
        raise InputError(
            f"the student was distilled for NFE {', '.join(str(each.nfe) for each in own)} with "
            f"{own[0].solver.name} and {own[0].schedule.text()}, got NFE {asked.nfe} with "
            f"{asked.solver.name} and {asked.schedule.text()}; leave the sampler out, or distil a "
            "student for it"
        )
    return asked


def step_noise(seed: int, images: range, shape: tuple[int, ...]) -> StepNoise:
    """Noise of a stochastic solver, on the CPU; depends on (seed, image, interval) only."""

    def draw(interval: int) -> Tensor:
        return image_noise(seed, Stream.EVALUATION_STEPS, images, shape, interval)

    return draw
