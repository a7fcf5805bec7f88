"""From noise to images with a few-step student, counting its network evaluations.

B batch, C channels, H x W pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from bdense.diffusion.ddpm import DDPMSchedule
from bdense.diffusion.denoiser import Denoiser, NetworkDenoiser
from bdense.diffusion.schedules import Levels, Schedule
from bdense.diffusion.solvers import DDIM, Euler, Solver, analytical_first_step, make_solver, solve
from bdense.diffusion.vp import CosineSchedule
from bdense.errors import InputError, NonFiniteError
from bdense.files import atomic_write
from bdense.randomness import Stream, generator, image_noise


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """How images are drawn: the grid walked, the solver, and whether its first step is free.

    Attributes:
        num_intervals: N steps.
        afs: Analytical first step: NFE is one less.
        schedule: How the levels are spaced; on one that ends at 0 the solver is ``ddim``.
        solver: Any solver; a student of SFD needs ``euler``, one of PD ``ddim``.
    """

    num_intervals: int
    afs: bool
    schedule: Levels = field(default_factory=Schedule)
    solver: Solver = field(default_factory=Euler)

    def __post_init__(self) -> None:
        if self.nfe < 1:
            raise InputError(
                f"num_intervals={self.num_intervals} with afs={self.afs} leaves no network "
                "evaluation; NFE must be at least 1"
            )

    @property
    def nfe(self) -> int:
        """Network evaluations an image costs."""
        return self.solver.nfe(self.num_intervals) - (1 if self.afs else 0)

    @property
    def num_points(self) -> int:
        """N + 1, the number that a step-conditional student is told."""
        return self.num_intervals + 1

    def __call__(self, denoise: Denoiser, noise: Tensor) -> Tensor:
        """[B, C, H, W] unit noise to images, nominally in [-1, 1].

        A conditional network comes with its conditions bound: ``NetworkDenoiser.given``.
        """
        levels = self.schedule.grid(self.num_intervals)
        model = analytical_first_step(denoise, levels[0]) if self.afs else denoise
        return solve(self.solver, model, self.schedule.start(noise), levels)

    def describe(self) -> dict[str, Any]:
        """JSON-able; ``sampler_from`` reads it back.

        Raises:
            InputError: The solver is neither Euler nor DDIM, whose steps students are trained for.
        """
        described = {
            "num_intervals": self.num_intervals,
            "afs": self.afs,
            "schedule": self.schedule.describe(),
        }
        if isinstance(self.solver, Euler):
            return described | {"solver": "euler"}
        if isinstance(self.solver, DDIM):
            return described | {"solver": "ddim", "clip": self.solver.clip}
        raise InputError(
            f"a student's sampler is kept with euler or ddim alone, got {self.solver}; "
            "students are trained for those steps"
        )


def sampler_from(description: Mapping[str, Any]) -> Sampler:
    """The sampler that ``Sampler.describe`` wrote down."""
    return Sampler(
        num_intervals=description["num_intervals"],
        afs=description["afs"],
        schedule=schedule_from(description["schedule"]),
        solver=make_solver(description["solver"], clip=description.get("clip", False)),
    )


def schedule_from(description: Mapping[str, Any]) -> Levels:
    """The schedule that ``Levels.describe`` wrote down."""
    options = dict(description)
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
    served = metadata.get("nfe", [own.nfe])
    return [replace(own, num_intervals=nfe + (1 if own.afs else 0)) for nfe in sorted(served)]


def served_metadata(samplers: Sequence[Sampler]) -> dict[str, Any]:
    """What ``samplers_from`` reads back; the samplers differ in their NFE alone."""
    ordered = sorted(samplers, key=lambda sampler: sampler.nfe)
    several = {"nfe": [sampler.nfe for sampler in ordered]} if len(ordered) > 1 else {}
    return {"sampler": ordered[0].describe(), **several}


def draw_images(
    denoiser: NetworkDenoiser,
    sampler: Sampler,
    count: int,
    *,
    seed: int,
    batch: int = 128,
    class_index: int | None = None,
    on_image: Callable[[int], None] | None = None,
) -> Tensor:
    """Draw images as a user's files would hold them.

    Image i starts from noise (seed, i): not from the batch size, nor from how many are drawn.

    Args:
        denoiser: In eval mode.
        sampler: Grid, solver and AFS.
        count: Images to draw.
        seed: Of the latents.
        batch: Images at a time.
        class_index: The class of all images; None draws one for each, each as likely.
        on_image: Called with the number of images drawn so far.

    Returns:
        [count, C, H, W] uint8 on the CPU.

    Raises:
        NonFiniteError: An image holds NaN or infinity.
    """
    require_class(denoiser, class_index)
    if count < 1:
        raise InputError(f"the number of images must be at least 1, got {count}")
    if batch < 1:
        raise InputError(f"batch must be at least 1, got {batch}")
    device = next(denoiser.parameters()).device
    drawn = []
    for first in range(0, count, batch):
        size = min(batch, count - first)
        noise = image_noise(seed, Stream.EVALUATION, first, size, denoiser.image_shape)
        labels = _labels(denoiser, seed, range(first, first + size), class_index)
        images = sampler(conditioned(denoiser, sampler, labels), noise.to(device))
        drawn.append(to_uint8(images).cpu())
        if on_image is not None:
            on_image(first + size)
    return torch.cat(drawn)


def conditioned(denoiser: NetworkDenoiser, sampler: Sampler, labels: Tensor | None) -> Denoiser:
    """The network as a sampler of that many steps calls it, with these classes [B, label_dim]."""
    return denoiser.given(
        class_labels=labels, num_points=sampler.num_points if denoiser.step_condition else None
    )


def require_class(denoiser: NetworkDenoiser, class_index: int | None) -> None:
    """Refuse a class that the network does not know.

    Raises:
        InputError: It is not one of its classes, or it has none.
    """
    classes = denoiser.label_dim
    if class_index is not None and not 0 <= class_index < classes:
        if not classes:
            raise InputError(
                f"class {class_index} was asked of an unconditional network; leave the class out"
            )
        raise InputError(
            f"class {class_index} is not one of the network's {classes}; "
            f"choose from 0..{classes - 1}"
        )


def _labels(
    denoiser: NetworkDenoiser, seed: int, images: range, class_index: int | None
) -> Tensor | None:
    """[B, label_dim] one-hot; image i's class depends on (seed, i) alone."""
    classes = denoiser.label_dim
    if not classes:
        return None
    if class_index is None:
        draws = [generator(seed, Stream.EVALUATION_LABELS, i) for i in images]
        index = torch.cat([torch.randint(classes, (1,), generator=draw) for draw in draws])
    else:
        index = torch.full((len(images),), class_index)
    return F.one_hot(index, classes).float().to(next(denoiser.parameters()))


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] to 0..255 as EDM writes files: clip(127.5 x + 128), fractions cut off; any shape.

    Raises:
        NonFiniteError: An image holds NaN or infinity, which no byte stands for.
    """
    if not bool(torch.isfinite(images).all()):
        bad = int((~torch.isfinite(images)).sum())
        raise NonFiniteError(
            f"{bad} of {images.numel()} pixel values of images {list(images.shape)} are not "
            "finite; the model diverged"
        )
    return (images * 127.5 + 128).clip(0, 255).to(torch.uint8)


def image_grid(images: Tensor, columns: int) -> Tensor:
    """Tile uint8 images [n, C, H, W] row by row into one picture [H', W', 3 or 1 channels]."""
    if columns < 1:
        raise InputError(f"columns must be at least 1, got {columns}")
    n, c, h, w = images.shape
    rows = -(-n // columns)
    canvas = images.new_zeros(rows * columns, c, h, w)
    canvas[:n] = images
    tiled = canvas.view(rows, columns, c, h, w).permute(0, 3, 1, 4, 2)
    return tiled.reshape(rows * h, columns * w, c)


def save_grid(images: Tensor, path: Path, columns: int = 16) -> None:
    """Write uint8 images [n, C, H, W] as one PNG, small ones enlarged to 32 pixels at least."""
    picture = image_grid(images, columns).squeeze(-1).numpy()
    image = Image.fromarray(picture)
    zoom = max(1, 32 // images.shape[-1])
    image = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
    with atomic_write(path) as scratch:
        image.save(scratch, format="PNG")
