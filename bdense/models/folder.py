"""Model folders: a student with its card and pictures.

``bdense sample FOLDER`` and ``bdense.load_model(FOLDER)`` read it.
"""

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.pictures import save_grid
from bdense.diffusion.sampling import Sampler, draw_images, measured_samplers
from bdense.errors import InputError
from bdense.files import atomic_folder, require_new
from bdense.models.card import EXAMPLE_PROMPTS, folder_card, readable_json
from bdense.models.diffusers_files import INDEX, MODEL_FILE, PIPELINE
from bdense.models.latents import draws_latents
from bdense.models.store import save_denoiser

CONFIG, CARD, SAMPLES = "config.json", "README.md", "samples.png"
# Samples that are drawn if none are given: the defaults of `bdense sample FOLDER`.
SAMPLE_COUNT, SAMPLE_SEED = 64, 0
_PICTURE_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")

# A file to copy, or a function that writes to the path it is called with.
Picture = Path | Callable[[Path], object]


def export_folder(
    folder: Path,
    denoiser: NetworkDenoiser,
    metadata: Mapping[str, Any],
    *,
    extra_card: str = "",
    pictures: Mapping[str, Picture] | None = None,
    prompts: Sequence[str] = EXAMPLE_PROMPTS,
    finish: Callable[[Path], object] | None = None,
) -> tuple[Path, ...]:
    """Write a student as a folder, which appears whole or not at all.

    It holds the weights with their metadata (``model.safetensors``), the metadata as readable
    JSON (``config.json``), the model card (``README.md``), 64 images (``samples.png``) and the
    given pictures.

    Args:
        denoiser: A student of one branch.
        metadata: JSON values, ``sampler`` among them.
        extra_card: Markdown for the end of the card.
        pictures: By file name; the card shows them. A ``samples.png`` replaces the images drawn
            here; a student of latents needs one.
        prompts: Examples for the card of a student of text.
        finish: Called with the folder before it appears, to add files.

    Returns:
        The files, pictures last.

    Raises:
        InputError: The folder exists, the student has several branches, the metadata have no
            sampler, or a picture cannot be used or is missing; checked before any work.
    """
    folder = Path(folder)
    given = dict(pictures or {})
    require_new(folder)
    _require_pictures(given)
    sampler = measured_sampler(metadata)
    require_one_branch(denoiser)
    if SAMPLES not in given and draws_latents(denoiser, metadata):
        raise InputError(
            f"the student draws latents, which are images once its teacher's autoencoder decodes "
            f"them; give {SAMPLES} in pictures"
        )
    shown = [SAMPLES, *(name for name in given if name != SAMPLES)]
    with atomic_folder(folder) as scratch:
        save_denoiser(scratch / MODEL_FILE, denoiser, metadata)
        (scratch / CONFIG).write_text(readable_json(MODEL_FILE, denoiser, metadata))
        for name, picture in given.items():
            _put(picture, scratch / name)
        if SAMPLES not in given:
            _draw_samples(denoiser, sampler, scratch / SAMPLES)
        if finish is not None:
            finish(scratch)
        card = folder_card(
            folder.name,
            denoiser,
            metadata,
            pictures=shown,
            extra=extra_card,
            prompts=prompts,
            has_pipeline=(scratch / PIPELINE / INDEX).is_file(),
        )
        (scratch / CARD).write_text(card)
    return tuple(folder / name for name in (MODEL_FILE, CONFIG, CARD, *shown))


def measured_sampler(metadata: Mapping[str, Any]) -> Sampler:
    """The sampler that draws a student as measured; of several, the one with the lowest NFE.

    Raises:
        InputError: The metadata have none.
    """
    if not (samplers := measured_samplers(metadata)):
        raise InputError(
            "the metadata of an exported student have no sampler; add 'sampler': "
            "Sampler(...).describe()"
        )
    return samplers[0]


def require_one_branch(denoiser: NetworkDenoiser) -> None:
    """Raise an InputError if a student still has several branches."""
    if denoiser.num_branches != 1:
        raise InputError(
            f"the student has {denoiser.num_branches} branches, but inference uses one; take one "
            "with export_branch first"
        )


def _require_pictures(pictures: Mapping[str, Picture]) -> None:
    for name, picture in pictures.items():
        if not _PICTURE_NAME.fullmatch(name) or name in (MODEL_FILE, CONFIG, CARD):
            raise InputError(
                f"a picture in the folder cannot have the name {name!r}; choose a plain file name "
                "such as 'fid.png'"
            )
        if isinstance(picture, Path) and not picture.is_file():
            raise InputError(f"there is no picture {picture} to copy as {name}; make it first")


def _put(picture: Picture, path: Path) -> None:
    if isinstance(picture, Path):
        shutil.copyfile(picture, path)
    else:
        picture(path)
        if not path.is_file():
            raise InputError(
                f"the function for {path.name} wrote no file; it must write to the path it is "
                "called with"
            )


def _draw_samples(denoiser: NetworkDenoiser, sampler: Sampler, path: Path) -> None:
    training = denoiser.training
    denoiser.eval()
    try:
        images = draw_images(denoiser, sampler, SAMPLE_COUNT, seed=SAMPLE_SEED)
    finally:
        denoiser.train(training)
    save_grid(images, path)
