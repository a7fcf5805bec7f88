"""Measures a study's models, all under the same conditions."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bdense import NUMERICS
from bdense.data.datasets import Dataset
from bdense.data.prompts import read_prompts
from bdense.diffusion.codecs import Codec
from bdense.diffusion.conditions import Conditions
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.pictures import save_grid
from bdense.diffusion.sampling import Sampler, draw_images, drawn_with
from bdense.metrics.clip_score import CLIPScorer, load_clip_scorer
from bdense.metrics.extractors import Extractor
from bdense.metrics.metrics import measure_images
from bdense.metrics.records import Metrics, PromptFile
from bdense.metrics.references import Reference, dataset_reference, read_reference
from bdense.metrics.setup import Setup
from bdense.models.zoo import resolve_reference
from search.places import cache_folder
from search.spec.sections import EvaluationSpec
from search.spec.study import StudySpec

_GRID_IMAGES = 64


@dataclass(frozen=True, eq=False)
class Evaluator:
    """Measures every model of a study under the same conditions, from the same latents.

    Attributes:
        spec: Number of images, and the metrics.
        extractor: Feature network, also of the reference.
        reference: What images are compared with.
        latents: Seed of the noise that images are drawn from.
        conditions: What images are drawn under, such as prompts; None is the model's own kind.
        prompts: What the conditions are made of; None where they are none.
        codec: What makes images of latents; None where models draw images.
        clip: Scores images against their prompts; None does not.
    """

    spec: EvaluationSpec
    extractor: Extractor
    reference: Reference
    latents: int
    conditions: Conditions | None = None
    prompts: PromptFile | None = None
    codec: Codec | None = None
    clip: CLIPScorer | None = None

    def measure(
        self,
        denoiser: NetworkDenoiser,
        sampler: Sampler,
        *,
        training_seed: int | None,
        on_image: Callable[[int], None],
        check: Callable[[], None],
        images: int | None = None,
        grid_path: Path | None = None,
    ) -> Metrics:
        """Draw a model's images and measure them.

        Args:
            denoiser: A student, or the teacher.
            sampler: How it draws.
            training_seed: The student's; None for a teacher, which rows of all seeds share.
            on_image: Called with the number of images drawn so far.
            check: Called for every batch of images drawn or measured; an error of its ends the
                work.
            images: Number of images of an intermediate evaluation, which measures the FID alone;
                None is the study's.
            grid_path: Where a grid of the first 64 images goes; None writes none.

        Raises:
            NonFiniteError: An image, a feature or a distance is not finite.
        """

        def on_drawn(done: int) -> None:
            check()
            on_image(done)

        sampler = self.guided(sampler)
        drawn = draw_images(
            denoiser,
            sampler,
            images or self.spec.num_images,
            seed=self.latents,
            batch=self.spec.batch,
            conditions=self.conditions,
            codec=self.codec,
            on_image=on_drawn,
        )
        if grid_path is not None:
            save_grid(drawn[:_GRID_IMAGES], grid_path)
        trained = {} if training_seed is None else {"training": training_seed}
        return measure_images(
            drawn,
            self.extractor,
            self.reference,
            metrics=self.spec.metrics if images is None else ("fid",),
            **drawn_with(sampler, self.codec),
            seeds={**trained, "evaluation": self.latents},
            prompts=self.prompts,
            clip=self.clip if images is None else None,
            on_image=lambda _: check(),
        )

    def guided(self, sampler: Sampler) -> Sampler:
        """The sampler, at ``evaluation.guidance`` where that is set."""
        scale = self.spec.guidance
        return sampler if scale is None else replace(sampler, guidance=scale)

    def setup(self, denoiser: NetworkDenoiser) -> Setup:
        """The setup that a model's FID is measured with, in this process."""
        found = Setup.of(denoiser, self.reference, self.spec.batch, NUMERICS)
        return replace(found, guidance=self.spec.guidance)


def drawn_prompts(spec: StudySpec) -> str | None:
    """The file of prompts that images are drawn under; None where there is none."""
    return spec.evaluation.prompts or spec.prompts


def reference_of(spec: StudySpec, dataset: Dataset | None, extractor: Extractor) -> Reference:
    """Statistics of the study's reference file, or of its data set."""
    if spec.evaluation.reference is not None:
        return read_reference(resolve_reference(spec.evaluation.reference), extractor)
    assert dataset is not None
    with_features = set(spec.evaluation.metrics) != {"fid"}
    return dataset_reference(dataset, extractor, cache=cache_folder(), with_features=with_features)


def clip_scorer_of(spec: StudySpec, device: torch.device) -> CLIPScorer | None:
    """The study's CLIP scorer with its prompts; None where no model is named."""
    if (model := spec.evaluation.clip_score) is None:
        return None
    file = drawn_prompts(spec)
    return load_clip_scorer(model, [] if file is None else read_prompts(file), device)
