"""What the encoders of a pipeline make of images and prompts, computed once and kept by content.

n images, C channels, H x W pixels, [n, c, h, w] latents; L tokens of a prompt, E channels.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from bdense.data.datasets import Dataset, to_float
from bdense.diffusion.conditions import Prompts
from bdense.errors import CheckpointError, NonFiniteError
from bdense.execution import kept_on, taken
from bdense.files import atomic_write, file_lock, sha256_model
from bdense.models.diffusers_files import folder_of, pipeline_folder
from bdense.models.diffusers_teacher import codec_config
from bdense.models.latents import (
    TEXT_ENCODER,
    TOKENIZER,
    TextEncoder,
    load_codec,
    load_text_encoder,
)

_IMAGES_AT_ONCE, _PROMPTS_AT_ONCE = 64, 256


@dataclass(frozen=True, eq=False, kw_only=True)
class EncodedDataset(Dataset):
    """A data set that a network of latents learns from; ``images`` are its pixels.

    Attributes:
        latents: [n, c, h, w] float32, as the network takes them.
    """

    latents: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.latents.shape[1:])

    def clean(self, index: Tensor) -> Tensor:
        return taken(self.latents, index)

    def on(self, device: torch.device) -> Self:
        return replace(self, latents=kept_on(self.latents, device))


def encode_dataset(
    dataset: Dataset,
    source: str | Path,
    cache: Path,
    device: torch.device,
    on_image: Callable[[int], None] | None = None,
) -> EncodedDataset:
    """A data set as a pipeline's autoencoder sees it: the means of its latents.

    They are computed once and kept: a worker maps the file, and reads the rows that it needs.

    Args:
        source: Folder or hub id of the pipeline in diffusers' format.

    Raises:
        CheckpointError: The pipeline has no autoencoder, or one that is not read.
        NonFiniteError: A latent is not finite.
    """
    if (found := codec_config(folder_of(source))) is None:
        raise CheckpointError(f"{source} has no autoencoder; give its whole pipeline")
    key = f"{dataset.sha256} {sha256_model(found[0])}"
    sha256 = hashlib.sha256(key.encode()).hexdigest()
    count = len(dataset.images)

    def write(file: Path) -> None:
        codec = load_codec(source).to(device)
        shape = codec.encode(to_float(dataset.images[:1])).shape[1:]
        rows = np.lib.format.open_memmap(file, "w+", "float32", (count, *shape))
        for first in range(0, count, _IMAGES_AT_ONCE):
            some = slice(first, min(first + _IMAGES_AT_ONCE, count))
            latents = codec.encode(to_float(dataset.images[some])).float()
            if not bool(latents.isfinite().all()):
                raise NonFiniteError(
                    f"latents of images {some.start} to {some.stop - 1} of {dataset.name} are not "
                    f"finite: the autoencoder of {source} fails on them"
                )
            rows[some] = latents.cpu().numpy()
            if on_image is not None:
                on_image(some.stop)
        rows.flush()

    latents = _kept(cache / "latents" / f"{sha256[:16]}.npy", write)
    return EncodedDataset(dataset.name, dataset.images, sha256, dataset.labels, latents=latents)


def embed_prompts(
    texts: Sequence[str],
    source: str | Path,
    cache: Path,
    *,
    negative: str = "",
    encoder: TextEncoder | None = None,
    on_prompt: Callable[[int, int], None] | None = None,
) -> Prompts:
    """Prompts as a pipeline's text encoder reads them.

    They are embedded once and kept: a worker maps the file, and reads the rows that it needs.

    Args:
        source: Folder or hub id of the pipeline in diffusers' format.
        negative: What guidance leads away from.
        encoder: Of the pipeline; None loads it where it is needed.
        on_prompt: Called with the number of prompts embedded so far, the negative one among them,
            and with the number of all that are cut.

    Raises:
        CheckpointError: The pipeline has no text encoder, or one that is not read.
    """
    folder, wanted = pipeline_folder(source), [*texts, negative]
    parts = [sha256_model(folder / part) for part in (TEXT_ENCODER, TOKENIZER)]
    sha256 = hashlib.sha256(json.dumps([parts, wanted]).encode()).hexdigest()

    def write(file: Path) -> None:
        own = encoder or load_text_encoder(source)
        cut = len(own.too_long(wanted))
        shape = len(wanted), own.length, own.width
        rows = np.lib.format.open_memmap(file, "w+", "float32", shape)
        for first in range(0, len(wanted), _PROMPTS_AT_ONCE):
            some = slice(first, min(first + _PROMPTS_AT_ONCE, len(wanted)))
            rows[some] = own.embed(wanted[some]).numpy()
            if on_prompt is not None:
                on_prompt(some.stop, cut)
        rows.flush()

    kept = _kept(cache / "prompts" / f"{sha256[:16]}.npy", write)
    return Prompts(kept[:-1], kept[-1:])


def _kept(path: Path, write: Callable[[Path], None]) -> Tensor:
    """The array of a file, mapped; ``write`` makes the file if it is missing."""
    with file_lock(path.with_suffix(".lock")):
        if not path.exists():
            with atomic_write(path) as scratch:
                write(scratch)
    return torch.from_numpy(np.load(path, mmap_mode="c"))
