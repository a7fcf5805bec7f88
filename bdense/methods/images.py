"""Batches of data for methods that learn from images: clean, noise, and an interval for each.

B batch, C channels, H x W pixels.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bdense.data.datasets import Dataset
from bdense.diffusion.conditions import Condition, Conditions, Unconditional
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.execution import moved
from bdense.randomness import Stream, generator


@dataclass(frozen=True, slots=True, eq=False)
class ImageBatch:
    """What one update learns from.

    Attributes:
        clean: [B, C, H, W] images in [-1, 1].
        noise: [B, C, H, W], unit.
        interval: [B] int64 n in 0..N - 1, counted from the noisy end.
        condition: Of the images, such as their classes.
    """

    clean: Tensor
    noise: Tensor
    interval: Tensor
    condition: Condition = field(default_factory=Unconditional)

    def levels(self, fine: Tensor, substeps: int) -> Tensor:
        """[K + 1, B] t_{n,0}..t_{n,K} of each image's own interval, for levels [N K + 1]."""
        return fine[substeps * self.interval + torch.arange(substeps + 1)[:, None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageDraw:
    """Draws batches of images, with replacement; each depends on (seed, round, iteration) alone.

    Attributes:
        dataset: Where images come from.
        conditions: What is told of them.
        count: B of the whole batch.
        seed: Of images, noise, intervals and flips.
        round: Keeps the draws of several stages of one seed apart.
        flip: Mirror each image with probability 1/2.
    """

    dataset: Dataset
    conditions: Conditions
    count: int
    seed: int
    round: int = 0
    flip: bool = False

    def __call__(
        self, student: NetworkDenoiser, iteration: int, num_intervals: int, images: slice
    ) -> ImageBatch:
        """Some images of that iteration's batch, on the student's device."""
        like = next(student.parameters())
        draw = generator(self.seed, Stream.IMAGES, self.round, iteration)
        index = torch.randint(len(self.dataset.images), (self.count,), generator=draw)
        clean = self.dataset.clean(index)
        noise = torch.randn(clean.shape, generator=draw)
        interval = torch.randint(num_intervals, (self.count,), generator=draw)
        if self.flip:
            mirrored = torch.rand(self.count, generator=draw) < 0.5
            clean[mirrored] = clean[mirrored].flip(-1)
        return ImageBatch(
            moved(clean[images], like),
            moved(noise[images], like),
            interval[images],
            self.conditions.of(self.dataset, index[images]).to(like),
        )
