"""Conditions of the images of a batch, such as their classes.

A network has one kind of condition, ``NetworkDenoiser.conditions``, which draws a ``Condition``
for a batch or reads it from a data set. Its ``arguments`` go into the network's call. B images.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from bdense.errors import InputError
from bdense.randomness import Stream, generator


class Condition(Protocol):
    """The condition of B images."""

    def arguments(self) -> Mapping[str, Tensor]:
        """Keyword arguments of ``NetworkDenoiser.branches``, each with B rows."""

    def part(self, images: slice) -> Self:
        """The condition of some of the images."""

    def to(self, like: Tensor) -> Self:
        """On that tensor's device and in its type."""


class LabelledImages(Protocol):
    """A data set as conditions see it; see ``bdense.data.datasets.Dataset``."""

    def require_labels(self, label_dim: int) -> Tensor:
        """[n] int64 classes, all below ``label_dim``."""


class Conditions(Protocol):
    """A kind of condition: how it is drawn or read from a data set."""

    def drawn(self, seed: int, iteration: int, count: int) -> Condition:
        """For training from noise; depends on (seed, iteration) alone."""

    def evaluation(self, seed: int, images: range) -> Condition:
        """For drawn images; that of image i depends on (seed, i) alone."""

    def require(self, dataset: LabelledImages) -> None:
        """Raise an ``InputError`` for a data set without this condition."""

    def of(self, dataset: LabelledImages, index: Tensor) -> Condition:
        """Of the images [B] of a data set."""


@dataclass(frozen=True, slots=True, eq=False)
class ClassLabels:
    """Each image's class.

    Attributes:
        one_hot: [B, label_dim].
    """

    one_hot: Tensor

    def arguments(self) -> Mapping[str, Tensor]:
        return {"class_labels": self.one_hot}

    def part(self, images: slice) -> "ClassLabels":
        return ClassLabels(self.one_hot[images])

    def to(self, like: Tensor) -> "ClassLabels":
        return ClassLabels(self.one_hot.to(like))


@dataclass(frozen=True, slots=True)
class Unconditional:
    """No condition: the kind and its only member."""

    def arguments(self) -> Mapping[str, Tensor]:
        return {}

    def part(self, images: slice) -> "Unconditional":
        return self

    def to(self, like: Tensor) -> "Unconditional":
        return self

    def drawn(self, seed: int, iteration: int, count: int) -> "Unconditional":
        return self

    def evaluation(self, seed: int, images: range) -> "Unconditional":
        return self

    def require(self, dataset: LabelledImages) -> None:
        return

    def of(self, dataset: LabelledImages, index: Tensor) -> "Unconditional":
        return self


@dataclass(frozen=True, slots=True)
class Classes:
    """One of ``label_dim`` classes, each as likely."""

    label_dim: int

    def drawn(self, seed: int, iteration: int, count: int) -> ClassLabels:
        draw = generator(seed, Stream.LABELS, iteration)
        return self._labels(torch.randint(self.label_dim, (count,), generator=draw))

    def evaluation(self, seed: int, images: range) -> ClassLabels:
        draws = [generator(seed, Stream.EVALUATION_LABELS, i) for i in images]
        index = [torch.randint(self.label_dim, (1,), generator=draw) for draw in draws]
        return self._labels(torch.cat(index))

    def require(self, dataset: LabelledImages) -> None:
        dataset.require_labels(self.label_dim)

    def of(self, dataset: LabelledImages, index: Tensor) -> ClassLabels:
        return self._labels(dataset.require_labels(self.label_dim)[index])

    def _labels(self, index: Tensor) -> ClassLabels:
        return ClassLabels(F.one_hot(index, self.label_dim).float())


@dataclass(frozen=True, slots=True)
class OneClass(Classes):
    """Always the same class.

    Raises:
        InputError: The network does not know it.
    """

    index: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.label_dim:
            raise InputError(
                f"class {self.index} is not one of the network's {self.label_dim}; "
                f"choose from 0..{self.label_dim - 1}"
            )

    def drawn(self, seed: int, iteration: int, count: int) -> ClassLabels:
        return self._labels(torch.full((count,), self.index))

    def evaluation(self, seed: int, images: range) -> ClassLabels:
        return self._labels(torch.full((len(images),), self.index))


def conditions_for(label_dim: int, class_index: int | None = None) -> Conditions:
    """The kind of condition of a network with that many classes, 0 for none.

    Args:
        label_dim: Classes that the network knows.
        class_index: The class of all images; None draws one for each.

    Raises:
        InputError: A class is asked for that the network does not know.
    """
    if class_index is None:
        return Classes(label_dim) if label_dim else Unconditional()
    if not label_dim:
        raise InputError(
            f"class {class_index} was asked of an unconditional network; leave the class out"
        )
    return OneClass(label_dim, class_index)
