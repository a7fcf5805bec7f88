"""Explicit random generators, one for each (seed, stream, index).

Each draw is made without those before it, so a resumed run, a recorded trajectory and a parallel
worker see the same noise. Draws are made on the CPU and moved: they do not depend on the device.
"""

import contextlib
from collections.abc import Iterator
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from bdense.errors import InputError


class Stream(IntEnum):
    """The purpose of a draw; two streams of one seed never share numbers."""

    TRAJECTORY = 0
    EVALUATION = 1
    DROPOUT = 2
    INITIALISATION = 3
    TEACHER_BATCH = 4
    CLASSIFIER = 5
    INTERVALS = 6
    LABELS = 7
    EVALUATION_LABELS = 8
    IMAGES = 9
    EVALUATION_STEPS = 10
    ONE_SHOT = 11
    CODEC = 12


def derive_seed(seed: int, stream: Stream, *index: int) -> int:
    """A 63-bit seed for that draw."""
    if seed < 0:
        raise InputError(f"a seed must not be negative, got {seed}")
    # The length is included because SeedSequence ignores trailing zeros.
    sequence = np.random.SeedSequence((seed, int(stream), len(index), *index))
    return int(sequence.generate_state(1, np.uint64)[0]) >> 1


def generator(seed: int, stream: Stream, *index: int) -> torch.Generator:
    """A new CPU generator for that draw."""
    return torch.Generator().manual_seed(derive_seed(seed, stream, *index))


def image_noise(
    seed: int, stream: Stream, images: range, shape: tuple[int, ...], *index: int
) -> Tensor:
    """[B, *shape] unit noise; image i depends only on (seed, stream, i, index)."""
    draws = [generator(seed, stream, i, *index) for i in images]
    return torch.stack([torch.randn(shape, generator=draw) for draw in draws])


@contextlib.contextmanager
def seeded(device: torch.device, seed: int, stream: Stream, *index: int) -> Iterator[None]:
    """Seed the global generators inside the context, for code that draws from them (dropout)."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive_seed(seed, stream, *index))
        yield


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Use one CPU thread, so that trained weights do not depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
