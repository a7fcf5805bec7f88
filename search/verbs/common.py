"""Shared parts of the verbs: opening their storage and study."""

from pathlib import Path

from search.api import is_file, unchanged_search
from search.errors import SpecError
from search.run.machine import require_ray_folders, use_gpus
from search.spec.file import read_tree
from search.storage.engine import resolve_storage_url
from search.study.study import Study
from search.study.summary import failures, headline
from search.verbs.options import StudyOptions, Workers


def use_workers(asked: Workers) -> int | None:
    """Take the GPUs of --gpus and check that Ray can start, if it will; returns --workers."""
    if not asked.dry_run:
        require_ray_folders()
    use_gpus(asked.gpus)
    return asked.workers


def study_name(given: str) -> str:
    """The name of a study given by name or by its YAML file.

    Raises:
        SpecError: A file is named that holds no study.
    """
    if not is_file(given):
        return given
    path = Path(given)
    tree = read_tree(path)
    if not isinstance(tree.get("name"), str):
        raise SpecError(f"{path} has no name: key, so it is not a study file")
    return str(tree["name"])


def open_study(asked: StudyOptions, *, reading: bool = False) -> Study:
    """The study that STUDY names.

    Raises:
        UnknownStudyError: There is none.
    """
    return Study.open(resolve_storage_url(asked.storage), study_name(asked.study), reading=reading)


def open_search(asked: StudyOptions) -> Study:
    """The search that STUDY names, if its conditions are still those that it ran under.

    Raises:
        UnknownStudyError: There is no such search.
        InputError: Another version of bdense launched it.
        SpecChangedError: The conditions of its file, or of its stored spec, have changed.
    """
    file = Path(asked.study) if is_file(asked.study) else None
    return unchanged_search(open_study(asked), file)


def show_rows(study: Study) -> None:
    """Print the number of rows in each state, and why some failed."""
    print(headline(study))
    for line in failures(study):
        print(line)
