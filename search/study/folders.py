"""Where a row keeps its files: in a folder by study and number, under the runs."""

from pathlib import Path

from bdense.errors import InputError
from search.places import runs_folder

# A row's pictures: samples of its student, where weights that it learned went, and its losses.
GRID, WEIGHTS_PLOT, LOSS_PLOT = "samples.png", "weights.png", "loss.png"
# Where a program of the user's keeps its checkpoint, and whatever else it likes.
PROGRAM_FOLDER = "work"


def study_folder(study_name: str) -> Path:
    """Folder of the folders of a study's rows.

    Raises:
        InputError: The study's name, which is not trusted, would lead out of the runs.
    """
    if study_name in ("", ".", "..") or any(c in study_name for c in "/\\\0"):
        raise InputError(
            f"study {study_name!r} has no folder of its own under the runs: its name would lead "
            "elsewhere; launch it under another name"
        )
    return runs_folder() / study_name


def row_folder(study_name: str, number: int) -> Path:
    """Folder of one row; raises as ``study_folder``."""
    return study_folder(study_name) / f"{number:05d}"


def named_file(name: str) -> Path:
    """The path of a file that a row names as study/number/file.

    Raises:
        InputError: It lies elsewhere; rows are not trusted.
    """
    parts = Path(name).parts
    if len(parts) != 3 or Path(name).is_absolute() or ".." in parts or "\0" in name:
        raise InputError(f"a row names the file {name!r}, which is not one of its own")
    return runs_folder() / name


def grid_name(stage: str) -> str:
    """The file name of a stage's sample grid; of a method with one stage ``stage`` is empty."""
    return f"{stage}-{GRID}" if stage else GRID


def pictures(folder: Path) -> list[Path]:
    """A row's pictures: sample grids, of several stages the last first, and its plots."""
    plots = (folder / WEIGHTS_PLOT, folder / LOSS_PLOT)
    found = [folder / GRID, *sorted(folder.glob(f"*-{GRID}")), *plots]
    return [path for path in found if path.is_file()]
