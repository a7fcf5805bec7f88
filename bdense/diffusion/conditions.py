"""Conditions of the images of a batch, such as their classes or prompts.

A network has one kind of condition, ``NetworkDenoiser.conditions``, which draws a ``Condition``
for a batch or reads it from a data set; prompts are given. Its ``arguments`` go into the network's
call. B images, L tokens of a prompt, E channels of a token.
"""

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from bdense.errors import InputError
from bdense.execution import moved
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

    @property
    def name(self) -> str:
        """For people."""

    @property
    def images(self) -> Tensor:
        """[n, C, H, W]."""

    @property
    def labels(self) -> Tensor | None:
        """[n] int64 classes."""

    @property
    def num_classes(self) -> int:
        """0 without labels."""

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

    def null(self) -> Condition | None:
        """One row that stands for no condition, as guidance needs it; None where there is none."""

    def describe(self) -> dict[str, Any]:
        """What draws depend on beside the network and the seed, as JSON values."""


@dataclass(frozen=True, slots=True, eq=False)
class TensorCondition:
    """A condition of one tensor.

    Attributes:
        name: The network's argument, such as ``class_labels``.
        values: [B, ..], a row for each image.
    """

    name: str
    values: Tensor

    def arguments(self) -> Mapping[str, Tensor]:
        return {self.name: self.values}

    def part(self, images: slice) -> Self:
        return replace(self, values=self.values[images])

    def to(self, like: Tensor) -> Self:
        return replace(self, values=moved(self.values, like))


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

    def null(self) -> None:
        return None

    def describe(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True, slots=True)
class Classes:
    """One of ``label_dim`` classes, each as likely.

    Attributes:
        label_dim: Number of classes.
        has_null: Whether the network knows a row of zeros as no class in particular.
    """

    label_dim: int
    has_null: bool = field(default=False, kw_only=True)

    def drawn(self, seed: int, iteration: int, count: int) -> TensorCondition:
        draw = generator(seed, Stream.LABELS, iteration)
        return self._labels(torch.randint(self.label_dim, (count,), generator=draw))

    def evaluation(self, seed: int, images: range) -> TensorCondition:
        draws = [generator(seed, Stream.EVALUATION_LABELS, i) for i in images]
        index = [torch.randint(self.label_dim, (1,), generator=draw) for draw in draws]
        return self._labels(torch.cat(index))

    def require(self, dataset: LabelledImages) -> None:
        dataset.require_labels(self.label_dim)

    def of(self, dataset: LabelledImages, index: Tensor) -> TensorCondition:
        return self._labels(dataset.require_labels(self.label_dim)[index])

    def null(self) -> TensorCondition | None:
        if not self.has_null:
            return None
        return TensorCondition("class_labels", torch.zeros(1, self.label_dim))

    def describe(self) -> dict[str, Any]:
        return {}

    def _labels(self, index: Tensor) -> TensorCondition:
        return TensorCondition("class_labels", F.one_hot(index, self.label_dim).float())


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

    def drawn(self, seed: int, iteration: int, count: int) -> TensorCondition:
        return self._labels(torch.full((count,), self.index))

    def evaluation(self, seed: int, images: range) -> TensorCondition:
        return self._labels(torch.full((len(images),), self.index))

    def describe(self) -> dict[str, Any]:
        return {"class": self.index}


@dataclass(frozen=True, eq=False)
class Prompts:
    """A set of prompts: each as likely in training, and one after the other in evaluation.

    Of a data set they are the captions: one for each image, or for each class.

    Attributes:
        embeddings: [n, L, E] of the prompts.
        empty: [1, L, E] of the empty or negative prompt, which guidance leads away from; None
            allows no guidance.

    Raises:
        InputError: There are no prompts, or they do not fit together.
    """

    embeddings: Tensor
    empty: Tensor | None = None

    def __post_init__(self) -> None:
        shape = list(self.embeddings.shape)
        if len(shape) != 3 or not shape[0]:
            raise InputError(f"prompts must be [n, L, E] embeddings, one or more, got {shape}")
        if self.empty is not None and list(self.empty.shape) != [1, *shape[1:]]:
            raise InputError(
                f"the empty prompt must be [1, {shape[1]}, {shape[2]}] as the others are, "
                f"got {list(self.empty.shape)}"
            )

    def drawn(self, seed: int, iteration: int, count: int) -> TensorCondition:
        draw = generator(seed, Stream.LABELS, iteration)
        return self._texts(torch.randint(len(self.embeddings), (count,), generator=draw))

    def evaluation(self, seed: int, images: range) -> TensorCondition:
        """Image i has prompt i, from the start again after the last; the seed does not matter."""
        return self._texts(torch.tensor([i % len(self.embeddings) for i in images]))

    def require(self, dataset: LabelledImages) -> None:
        captions(len(self.embeddings), dataset)

    def of(self, dataset: LabelledImages, index: Tensor) -> TensorCondition:
        return self._texts(captions(len(self.embeddings), dataset)[index])

    def null(self) -> TensorCondition | None:
        return None if self.empty is None else TensorCondition("text", self.empty)

    def describe(self) -> dict[str, Any]:
        return {"prompts": self._sha256}

    def _texts(self, index: Tensor) -> TensorCondition:
        return TensorCondition("text", self.embeddings[index])

    @functools.cached_property
    def _sha256(self) -> str:
        digest = hashlib.sha256()
        for value in (self.embeddings, self.empty):
            if value is not None:
                digest.update(repr((str(value.dtype), list(value.shape))).encode())
                digest.update(value.cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()


class NeedsText:
    """The kind of a network that is conditioned on text, where no prompts are given."""

    def _refuse(self, *_: object) -> NoReturn:
        raise InputError("the network is conditioned on text; give prompts")

    drawn = evaluation = require = of = null = describe = _refuse


def captions(count: int, dataset: LabelledImages) -> Tensor:
    """[n] int64: which of so many prompts describes each image of a data set.

    Raises:
        InputError: There is neither one for each image nor one for each class.
    """
    images, classes = len(dataset.images), dataset.num_classes
    if count == images:
        return torch.arange(images)
    if dataset.labels is not None and count == classes:
        return dataset.labels
    of_classes = f" and {classes} classes" if classes else ""
    raise InputError(
        f"{count} prompts cannot be the captions of {dataset.name}, which has {images} images"
        f"{of_classes}; give a prompt for each image, in their order"
        f"{', or for each class' if classes else ''}, or take a method that learns from noise, "
        "such as sfd"
    )
