"""Untrained students in the folders of their rows, each different, with a picture."""

from pathlib import Path

from PIL import Image

from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.sampling import Sampler
from bdense.models.store import denoiser_sha256, save_denoiser
from search.places import runs_folder
from search.storage.ledger import Ledger
from search.study.folders import grid_name
from search.study.study import Study
from tests.small import small_teacher

METADATA = {"kind": "student", "sampler": Sampler(num_intervals=2, afs=False).describe()}


def student(number: int, nfe: int = 2) -> NetworkDenoiser:
    """The student of a row; ``shade`` of its picture is 10 x number + nfe."""
    return small_teacher(seed=10 * number + nfe)


def digest(number: int, nfe: int = 2) -> str:
    """Digest of that student's weights."""
    return denoiser_sha256(student(number, nfe))


def keep(study: Study, *numbers: int, ledger: Ledger | None = None) -> None:
    """Write the students of some rows (default: all), one for each stage.

    ``ledger`` is the study's main one by default.
    """
    for trial in (ledger or study.main).study.trials:
        if numbers and trial.number not in numbers:
            continue
        last = runs_folder() / trial.user_attrs["student"]
        stages = study.spec.resolved.stages
        for stage in stages:
            name = stage.name if len(stages) > 1 else "student"
            path = last.with_name(f"{name}.safetensors")
            metadata = METADATA | {"identity": {"a": 1}}
            save_denoiser(path, student(trial.number, stage.nfe), metadata)
            grey = 10 * trial.number + stage.nfe
            Image.new("L", (8, 8), grey).save(last.with_name(grid_name(stage.name)))


def shade(path: Path) -> int:
    """Grey level of a picture that ``keep`` made."""
    with Image.open(path) as picture:
        return picture.getpixel((0, 0))
