"""How every model of a study is measured: the same latents for all, under the same conditions."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol

from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.sampling import Sampler, draw_images, save_grid
from bdense.metrics.extractors import Extractor
from bdense.metrics.metrics import Metrics, measure_images
from bdense.metrics.references import Reference
from search.spec.promotion_spec import PromotionSpec
from search.spec.study_spec import StudySpec

_GRID_IMAGES = 64


class Yardstick(Protocol):
    """What all of a study's models are measured with, as its assets hold it."""

    @property
    def spec(self) -> StudySpec | PromotionSpec:
        """Says the latents' seed."""
        ...

    @property
    def extractor(self) -> Extractor:
        """Feature network, the one that saw the reference."""
        ...

    @property
    def reference(self) -> Reference:
        """What images are compared with."""
        ...


def measure(
    yardstick: Yardstick,
    denoiser: NetworkDenoiser,
    sampler: Sampler,
    *,
    images: int,
    metrics: Collection[str] = ("fid",),
    training_seed: int | None,
    on_image: Callable[[int], None],
    check: Callable[[], None],
    grid_path: Path | None = None,
) -> Metrics:
    """Draw a model's images from the study's latents and measure them.

    Args:
        yardstick: The study's.
        denoiser: A student, or the teacher.
        sampler: How it draws.
        images: How many.
        metrics: What to measure; the FID always is.
        training_seed: The student's; None for a teacher, which rows of all seeds share.
        on_image: Called with the number of images drawn so far.
        check: Called for every batch of images drawn, before ``on_image``, and for every one
            judged; what it raises ends the work.
        grid_path: Where a grid of the first 64 images goes; None leaves none.

    Raises:
        NonFiniteError: An image, a feature or a distance is not finite.
    """
    spec = yardstick.spec

    def on_drawn(done: int) -> None:
        check()
        on_image(done)

    drawn = draw_images(
        denoiser,
        sampler,
        images,
        seed=spec.seeds.evaluation,
        batch=spec.evaluation.batch,
        on_image=on_drawn,
    )
    if grid_path is not None:
        save_grid(drawn[:_GRID_IMAGES], grid_path)
    trained = {} if training_seed is None else {"training": training_seed}
    return measure_images(
        drawn,
        yardstick.extractor,
        yardstick.reference,
        metrics=metrics,
        nfe=sampler.nfe,
        seeds={**trained, "evaluation": spec.seeds.evaluation},
        on_image=lambda _: check(),
    )
