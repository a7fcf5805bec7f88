"""How every model of a study is measured: the same latents for all, under the same conditions."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.sampling import Sampler, draw_images, save_grid
from bdense.metrics.extractors import Extractor
from bdense.metrics.metrics import Metrics, measure_images
from bdense.metrics.references import Reference
from search.spec.study import EvaluationSpec

_GRID_IMAGES = 64


@dataclass(frozen=True, eq=False)
class Evaluator:
    """Measures the images of a study's models.

    Attributes:
        spec: How many images, and what is measured of them.
        extractor: Feature network, the one that saw the reference.
        reference: What images are compared with.
        latents: Seed of the noise that images are drawn from.
    """

    spec: EvaluationSpec
    extractor: Extractor
    reference: Reference
    latents: int

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
            check: Called for every batch of images drawn or judged; what it raises ends the work.
            images: Of an intermediate evaluation, which measures the FID alone; None: the study's.
            grid_path: Where a grid of the first 64 images goes; None leaves none.

        Raises:
            NonFiniteError: An image, a feature or a distance is not finite.
        """

        def on_drawn(done: int) -> None:
            check()
            on_image(done)

        drawn = draw_images(
            denoiser,
            sampler,
            images or self.spec.images,
            seed=self.latents,
            batch=self.spec.batch,
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
            nfe=sampler.nfe,
            seeds={**trained, "evaluation": self.latents},
            on_image=lambda _: check(),
        )

    def describe(self) -> dict[str, Any]:
        """What a FID depends on besides the model; equal descriptions compare."""
        return {
            "images": self.spec.images,
            "extractor": self.extractor.sha256,
            "reference": [
                self.reference.name,
                hashlib.sha256(self.reference.statistics.mu.tobytes()).hexdigest(),
            ],
            "latents": self.latents,
        }
