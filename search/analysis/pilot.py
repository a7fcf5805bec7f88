"""The pilot of ``evaluation.images: auto``: how many images make the latents' noise small.

Plain distillation and uniform weights are trained under a few seeds and judged on shared latents,
so that the spread of their difference is the training seeds' alone. The latents' part falls with
the square root of the images; the search takes as many as make it half of the seeds' or less.
"""

from contextlib import suppress
from dataclasses import replace

from bdense.errors import InputError
from search.analysis.comparison import compare
from search.analysis.plans import plan_given
from search.analysis.recommendation import Noise, noise_of
from search.errors import SpecChangedError, UnknownStudyError
from search.spec.plan import ArmsPlan
from search.spec.sections import MOST_IMAGES
from search.spec.study import StudySpec
from search.storage.ledger import Ledger
from search.study.study import Study

PILOT_SUFFIX = ".pilot"
_SEEDS = 3


class NoiseUnknownError(InputError):
    """A pilot has too few complete rows to tell their noise."""


def with_known_images(url: str, spec: StudySpec) -> StudySpec:
    """With a number of images in place of auto, if the study or its pilot has settled it."""
    if spec.evaluation.images != "auto":
        return spec
    with suppress(UnknownStudyError):
        stored = Study.open(url, spec.name)
        if stored.has_started():
            return spec.with_images(stored.spec.evaluation.num_images)
        pilot = pilot_of(stored)
        if pilot is not None and not pilot.left():
            with suppress(SpecChangedError, NoiseUnknownError):
                pilot.refuse_other_conditions(pilot_spec(spec))
                return spec.with_images(images_of(pilot)[0])
    return spec


def pilot_of(study: Study) -> Study | None:
    """The pilot of a search; None without one."""
    return study.sibling(study.name + PILOT_SUFFIX)


def ledgers_with_pilot(study: Study) -> list[Ledger]:
    """The ledgers that a launch of the study works on."""
    pilot = pilot_of(study)
    return [*study.ledgers, *(() if pilot is None else pilot.ledgers)]


def pilot_spec(spec: StudySpec) -> StudySpec:
    """Both baselines under three seeds, all else as in the search."""
    return replace(
        spec.with_images(spec.evaluation.num_images),
        name=spec.name + PILOT_SUFFIX,
        plan=ArmsPlan(arms=spec.baselines, seeds=tuple(spec.seeds.following(_SEEDS))),
    )


def plan_pilot(url: str, spec: StudySpec) -> Study:
    """The pilot of a search, planned.

    Raises:
        SpecChangedError: The stored pilot is of other conditions.
    """
    pilot = pilot_spec(spec)
    try:
        return plan_given(url, pilot)
    except SpecChangedError as error:
        raise SpecChangedError(
            f"{error}; or delete the pilot, which is trained again then: bdense-search delete "
            f"{pilot.name}"
        ) from error


def images_of(pilot: Study) -> tuple[int, Noise]:
    """Images that a pilot's search takes, at least the pilot's, and the noise that it found.

    Raises:
        NoiseUnknownError: Fewer than two pairs of its rows are complete.
    """
    noise, counts = noise_of(compare(pilot)), pilot.counts()
    if noise.seeds is None or noise.latents is None:
        way_out = (
            "launch again to train the others"
            if counts.complete < counts.planned
            else f"see bdense-search status {pilot.name}"
        )
        raise NoiseUnknownError(
            f"evaluation.images auto: {counts.complete} of the {counts.planned} rows of "
            f"{pilot.name} are complete, and their noise cannot be told; {way_out}, or give a "
            "number"
        )
    least = pilot.spec.evaluation.num_images
    return min(noise.balanced_images or least, MOST_IMAGES), noise
