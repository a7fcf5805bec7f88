"""Batches of data for methods that learn from images: clean, noise, and an interval for each.

B batch, C channels, H x W pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bdense.data.datasets import Dataset
from bdense.diffusion.conditions import Condition, Conditions
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
    condition: Condition

    def levels(self, fine: Tensor, substeps: int) -> Tensor:
        """[K + 1, B] t_{n,0}..t_{n,K} of each image's own interval, for levels [N K + 1]."""
        return fine[substeps * self.interval + torch.arange(substeps + 1)[:, None]]


def image_batch(
    dataset: Dataset,
    conditions: Conditions,
    iteration: int,
    images: slice,
    *,
    count: int,
    num_intervals: int,
    seed: int,
    round: int = 0,
    flip: bool = False,
    like: Tensor,
) -> ImageBatch:
    """Some images of that iteration's batch, drawn with replacement.

    The whole batch depends on (seed, round, iteration) alone.

    Args:
        dataset: Where images come from.
        conditions: Of the images.
        iteration: Counted from 0.
        images: Of the batch.
        count: B of the whole batch.
        num_intervals: N.
        seed: Of images, noise, intervals and flips.
        round: Keeps the draws of several stages of one seed apart.
        flip: Mirror each image with probability 1/2.
        like: Has the type and device of the batch.
    """
    draw = generator(seed, Stream.IMAGES, round, iteration)
    index = torch.randint(len(dataset.images), (count,), generator=draw)
    clean = dataset.clean(index)
    noise = torch.randn(clean.shape, generator=draw)
    interval = torch.randint(num_intervals, (count,), generator=draw)
    if flip:
        mirrored = torch.rand(count, generator=draw) < 0.5
        clean[mirrored] = clean[mirrored].flip(-1)
    return ImageBatch(
        moved(clean[images], like),
        moved(noise[images], like),
        interval[images],
        conditions.of(dataset, index[images]).to(like),
    )
