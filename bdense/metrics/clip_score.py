"""CLIP score: how well images fit their prompts (Hessel et al. 2021, arXiv 2104.08718).

100 max(cos(image, prompt), 0) of CLIP's projected embeddings, the mean over images, as
torchmetrics defines it. Needs the ``diffusers`` extra, which has transformers. n images, d
channels of an embedding.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdense.errors import InputError, NonFiniteError, extra
from bdense.execution import exact_products
from bdense.files import sha256_model
from bdense.metrics.records import CLIPScore
from bdense.models.diffusers_files import (
    folder_of,
    load_processor,
    load_transformers,
    public_name,
)

FILES = ("*.json", "merges.txt", "model.safetensors", "model-*.safetensors")


@dataclass(frozen=True, eq=False, kw_only=True)
class CLIPScorer:
    """A CLIP model, and the prompts that images are scored against.

    Attributes:
        name: Its folder's name or hub id, without folders of this machine.
        sha256: Hex digest of its weights and configurations.
        prompts: Image i has prompt i, from the start again after the last.
    """

    name: str
    sha256: str
    model: Any
    tokenizer: Any
    processor: Any
    prompts: tuple[str, ...]

    @functools.cached_property
    def texts(self) -> Tensor:
        """[number of prompts, d] unit embeddings; what is longer than the model reads is cut."""
        return torch.cat(
            [self._texts(self.prompts[i : i + 64]) for i in range(0, len(self.prompts), 64)]
        )

    @torch.no_grad()
    def scores(
        self, images: Tensor, batch: int = 64, on_image: Callable[[int], None] | None = None
    ) -> Tensor:
        """100 max(cos, 0) of each image [n, C, H, W] uint8, C = 1 or 3: [n] float64."""
        found = []
        for first in range(0, len(images), batch):
            some = images[first : first + batch].expand(-1, 3, -1, -1)
            index = [i % len(self.prompts) for i in range(first, first + len(some))]
            pixels = self.processor(images=list(some), return_tensors="pt").pixel_values
            with exact_products():
                out = self.model.vision_model(pixels.to(self._device)).pooler_output
                seen = torch.nn.functional.normalize(self.model.visual_projection(out)).cpu()
            found.append((seen * self.texts[index]).sum(1).double())
            if on_image is not None:
                on_image(first + len(some))
        return 100 * torch.cat(found).clamp(min=0)

    def measure(
        self,
        images: Tensor,
        *,
        nfe: int,
        seeds: dict[str, int],
        on_image: Callable[[int], None] | None = None,
    ) -> CLIPScore:
        """The mean score of images [n, C, H, W] uint8.

        Raises:
            NonFiniteError: An embedding is not finite.
        """
        scores = self.scores(images, on_image=on_image)
        value, noise = float(scores.mean()), float(scores.std()) / math.sqrt(len(scores))
        if not math.isfinite(value):
            raise NonFiniteError(f"the CLIP score is {value}")
        return CLIPScore(
            value=value,
            noise=noise,
            nfe=nfe,
            images=len(images),
            extractor=self.name,
            extractor_sha256=self.sha256,
            reference="prompts",
            reference_images=None,
            prompts=len(self.prompts),
            seeds=seeds,
        )

    @property
    def _device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    @torch.no_grad()
    def _texts(self, prompts: Sequence[str]) -> Tensor:
        given = self.tokenizer(
            list(prompts),
            padding=True,
            truncation=True,
            max_length=int(self.model.config.text_config.max_position_embeddings),
            return_tensors="pt",
        ).to(self._device)
        with exact_products():
            out = self.model.text_model(given.input_ids, given.attention_mask).pooler_output
            return torch.nn.functional.normalize(self.model.text_projection(out)).cpu()


def load_clip_scorer(
    source: str | Path, prompts: Sequence[str], device: torch.device
) -> CLIPScorer:
    """The CLIP model of a folder as ``save_pretrained`` writes it, or of a hub id.

    Args:
        source: Such as ``openai/clip-vit-base-patch16``; only safetensors are read.

    Raises:
        CheckpointError: It is not a CLIP model, or lacks weights, tokenizer or image processor.
        InputError: There are no prompts, transformers is not installed, or the hub cannot be
            reached.
    """
    if not prompts:
        raise InputError("the CLIP score compares images with prompts, and there are none")
    with extra("diffusers", "the CLIP score"):  # before anything is downloaded
        import transformers  # noqa: F401
    folder = folder_of(source, FILES)
    return CLIPScorer(
        name=public_name(source, folder),
        sha256=sha256_model(folder),
        model=load_transformers("CLIPModel", folder, "the CLIP score").to(device),
        tokenizer=load_processor("CLIPTokenizer", folder),
        processor=load_processor("CLIPImageProcessor", folder),
        prompts=tuple(prompts),
    )
