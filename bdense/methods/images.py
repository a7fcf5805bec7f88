"""Methods that learn from images: their batches of clean, noise, and an interval for each.

B batch, C channels, H x W pixels.
"""

import abc
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from bdense.data.datasets import Dataset
from bdense.diffusion.conditions import Condition, Conditions
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.execution import moved
from bdense.methods.method import MethodStage, require_shape
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


class ImageStage(MethodStage):
    """A stage that learns from images, drawn with replacement.

    Attributes:
        teacher: Its device and type are the batch's.
        seed: Of images, noise, intervals and flips.
    """

    teacher: NetworkDenoiser
    dataset: Dataset
    conditions: Conditions
    seed: int

    def _require_images(self, method: str) -> None:
        """Refuse a teacher or a data set that cannot train by a method of that name."""
        self.teacher.execution.require_training(method)
        require_shape(self.dataset, self.teacher.image_shape)
        self.conditions.require(self.dataset)

    @functools.cached_property
    def _data(self) -> Dataset:
        return self.dataset.on(next(self.teacher.parameters()).device)

    @abc.abstractmethod
    def intervals_at(self, iteration: int) -> int:
        """N of that iteration."""

    @property
    def round(self) -> int:
        """Keeps the draws of several stages of one seed apart."""
        return 0

    def batch(self, iteration: int, images: slice) -> ImageBatch:
        """Some images of that iteration's batch, which depends on (seed, round, iteration) alone.

        So runs of one seed see the same, whatever their weights.
        """
        count, like = self.batch_size, next(self.teacher.parameters())
        draw = generator(self.seed, Stream.IMAGES, self.round, iteration)
        index = torch.randint(len(self.dataset.images), (count,), generator=draw)
        clean = self._data.clean(index)
        noise = torch.randn(clean.shape, generator=draw)
        interval = torch.randint(self.intervals_at(iteration), (count,), generator=draw)
        if self.config.flip:
            mirrored = moved((torch.rand(count, generator=draw) < 0.5).view(-1, 1, 1, 1), clean)
            clean = torch.where(mirrored > 0, clean.flip(-1), clean)
        return ImageBatch(
            moved(clean[images], like),
            moved(noise[images], like),
            interval[images],
            self.conditions.of(self.dataset, index[images]).to(like),
        )
