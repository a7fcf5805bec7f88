"""FIDs that the verbs measure."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdense import NUMERICS
from bdense.diffusion import BATCH
from bdense.diffusion.codecs import Codec
from bdense.diffusion.conditions import Prompts
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.sampling import SETUP, Sampler, draw_images, drawn_with
from bdense.execution import Execution
from bdense.files import plain_json, write_json
from bdense.metrics.extractors import Extractor
from bdense.metrics.metrics import measure_images, require_measurable
from bdense.metrics.records import FID, PromptFile
from bdense.metrics.references import Reference
from bdense.metrics.settings import MetricSettings
from bdense.metrics.setup import Setup
from bdense.models.store import denoiser_sha256


@dataclass(frozen=True, eq=False, kw_only=True)
class FIDEvaluation:
    """The conditions under which FIDs of several models are measured.

    Attributes:
        extractor, reference: See ``measure_images``.
        image_shape: (C, H, W) of the models' images.
        batch, conditions, codec: See ``draw_images``.

    Raises:
        InputError: See ``require_measurable``.
    """

    extractor: Extractor
    reference: Reference
    image_shape: tuple[int, ...]
    images: int
    batch: int = BATCH
    conditions: Prompts | None = None
    prompts: PromptFile | None = None
    codec: Codec | None = None

    def __post_init__(self) -> None:
        settings = MetricSettings()
        require_measurable(
            ["fid"], settings, self.images, self.reference, self.image_shape, self.extractor
        )

    def fid(
        self,
        model: NetworkDenoiser,
        sampler: Sampler,
        *,
        seed: int,
        on_image: Callable[[int], None] | None = None,
    ) -> FID:
        """Draw images from the latents of a seed, and measure their FID."""
        images = draw_images(
            model,
            sampler,
            self.images,
            seed=seed,
            batch=self.batch,
            conditions=self.conditions,
            codec=self.codec,
            on_image=on_image,
        )
        measured = measure_images(
            images,
            self.extractor,
            self.reference,
            **drawn_with(sampler, self.codec),
            seeds={"evaluation": seed},
            prompts=self.prompts,
        )
        return measured.fid

    def setup(self, model: NetworkDenoiser) -> Setup:
        """What a model's FID is measured with, in this process."""
        return Setup.of(model, self.reference, self.batch, NUMERICS)

    def kept(
        self,
        path: Path,
        model: NetworkDenoiser,
        sampler: Sampler,
        *,
        seed: int,
        on_image: Callable[[int], None],
    ) -> dict[str, Any]:
        """Metadata with a model's FID, which is measured once and kept in a file.

        ``fid`` is what ``bdense fid`` prints.
        """
        precision = unusual_precision(model.execution)
        conditions = plain_json(
            {
                "numerics": NUMERICS,
                "model": denoiser_sha256(model),
                "sampler": sampler.describe(),
                "images": self.images,
                "seed": seed,
                "data": self.reference.data_sha256,
                "extractor": self.extractor.sha256,
                **({} if self.conditions is None else self.conditions.describe()),
                **({} if self.codec is None else {"codec": self.codec.describe()}),
                **precision,
            }
        )
        kept = _read(path)
        if kept.get("of") != conditions:
            fid = self.fid(model, sampler, seed=seed, on_image=on_image)
            kept = {
                "fid": fid.as_dict() | sequential(sampler) | precision,
                SETUP: self.setup(model).as_dict(),
                "of": conditions,
            }
            write_json(path, kept)
        return {key: kept[key] for key in ("fid", SETUP) if key in kept}


def no_kept_fid(path: Path) -> str:
    """Why an existing file is not what ``FIDEvaluation.kept`` writes; "" if it is."""
    return "" if _read(path) else "does not hold a FID that bdense distill keeps"


def _read(path: Path) -> dict[str, Any]:
    """A FID with its conditions; empty for a file that is missing or of another kind."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and "of" in found else {}


def sequential(sampler: Sampler) -> dict[str, int]:
    """Network calls one after another, where they are fewer than the evaluations."""
    calls = sampler.sequential_nfe
    return {} if calls == sampler.nfe else {"sequential_nfe": calls}


def unusual_precision(execution: Execution) -> dict[str, str]:
    """A FID's condition if the model was not computed in float32."""
    precision = execution.precision
    return {} if precision == "float32" else {"precision": precision}
