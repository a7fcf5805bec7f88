"""Where a row keeps its files: by study and number, never by process, and never elsewhere."""

from pathlib import Path

from bdense.errors import InputError
from search.storage.engine import runs_folder

# A row's pictures: samples of its student, and where weights that it learned went.
GRID, WEIGHTS_PLOT = "samples.png", "weights.png"


def row_folder(study_name: str, number: int) -> Path:
    """Folder of one trial or planned row.

    Raises:
        InputError: The study's name, which anybody who may write to the database chose, would
            lead out of the runs.
    """
    if study_name in ("", ".", "..") or any(c in study_name for c in "/\\\0"):
        raise InputError(
            f"study {study_name!r} has no folder of its own under the runs, as its name is no "
            "plain one; launch it under another name"
        )
    return runs_folder() / study_name / f"{number:05d}"


def named_file(name: str) -> Path:
    """The path of a file that a row names as study/number/file.

    Raises:
        InputError: It lies elsewhere; rows are not trusted, as others may write to the database.
    """
    parts = Path(name).parts
    if len(parts) != 3 or Path(name).is_absolute() or ".." in parts or "\0" in name:
        raise InputError(f"a row names the file {name!r}, which is none of its own under the runs")
    return runs_folder() / name


def pictures(folder: Path) -> list[Path]:
    """A row's pictures: of a student its grid, of a chain each round's, last round first."""
    found = [folder / GRID, *sorted(folder.glob(f"*-{GRID}")), folder / WEIGHTS_PLOT]
    return [path for path in found if path.is_file()]
