"""The pilot of ``evaluation.images: auto``: how many images make the latents' noise small.

Plain distillation and uniform weights are trained under a few seeds and judged on shared latents,
so that the spread of their difference is the training seeds' alone. The latents' part falls with
the square root of the images; the study takes as many as make it half of the seeds' or less.
"""

from dataclasses import replace

from bdense.errors import InputError
from search.analysis.comparison import compare
from search.analysis.recommendation import Noise, noise_of
from search.spec.sections import ArmsPlan
from search.spec.study import StudySpec
from search.study.arms import baseline_arms
from search.study.study import Study

PILOT_SUFFIX = ".pilot"
_SEEDS = 3
PILOT_ROWS = 2 * _SEEDS
# As many as the literature takes for a FID.
_MOST_IMAGES = 50_000


def plan_pilot(url: str, spec: StudySpec) -> Study:
    """The pilot's rows: both baselines under three seeds.

    Raises:
        SpecChangedError: The stored pilot is of other conditions.
    """
    plan = ArmsPlan(arms=(), seeds=(0,), latents="shared")
    settled = spec.with_images(spec.evaluation.num_images)
    given = replace(settled, name=spec.name + PILOT_SUFFIX, plan=plan)
    pilot = Study.create(url, given, facts={"of": spec.name})
    first = spec.seeds.training
    pilot.plan(baseline_arms(given), [(first + index) % 2**31 for index in range(_SEEDS)])
    return pilot


def images_of(pilot: Study) -> tuple[int, Noise]:
    """Images that a pilot's study takes, at least the pilot's, and the noise that it found.

    Raises:
        InputError: Fewer than two pairs of its rows are complete.
    """
    noise = noise_of(compare(pilot))
    if noise.seeds is None or noise.latents is None:
        raise InputError(
            f"evaluation.images auto: {pilot.name} has {pilot.counts().complete} complete rows of "
            f"{pilot.counts().planned}, too few to tell the noise; launch again, or give a number"
        )
    least = pilot.spec.evaluation.num_images
    return min(noise.balanced_images or least, _MOST_IMAGES), noise
