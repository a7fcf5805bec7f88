"""``clean``: delete files that a study need not keep."""

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from bdense.errors import InputError
from search.places import cache_folder
from search.storage.engine import retrying
from search.storage.ledger import Ledger
from search.storage.stop_flags import held
from search.study.folders import row_folder
from search.study.retention import clean_checkpoints, clean_students, keep_too, student_files
from search.study.study import TRAJECTORIES, Study
from search.verbs.common import open_study
from search.verbs.options import CleanOptions

_MIB = 2**20


def clean(asked: CleanOptions) -> None:
    """Delete the files, and print how much that was."""
    record = open_study(asked)
    if asked.keep:
        _keep(record, asked.keep)
    if asked.checkpoints:
        freed = sum(map(clean_checkpoints, record.ledgers))
        print(f"{freed / _MIB:.1f} MiB of checkpoints and leftovers deleted")
    if asked.students:
        keep = record.spec.keep_students
        freed = clean_students(_search(record, "--students"), keep)
        print(f"{freed / _MIB:.1f} MiB of students deleted; the best {keep} stay")
    if not (asked.keep or asked.checkpoints or asked.students):
        _trajectories(record)


def _keep(record: Study, asked: Collection[int]) -> None:
    ledger = _search(record, "--keep")
    there = [n for n in asked if student_files(row_folder(record.name, n))]
    running = {row.number for row in ledger.running()}
    if gone := sorted(set(asked) - set(there) - running):
        raise InputError(
            f"--keep {','.join(map(str, gone))}: no student of that trial is there; make one of "
            "its weights by `bdense distill`, and for trials to come raise keep_students before "
            "the next launch"
        )
    kept = keep_too(ledger, asked)
    print(f"students of trials {', '.join(map(str, kept))} of {record.name} stay")


def _search(study: Study, option: str) -> Ledger:
    if study.trials is None:
        raise InputError(
            f"{option} applies to a search: the students of given arms all stay, as `export` and "
            f"the figures of {study.name} name them; when they are exported, delete its folder"
        )
    return study.trials


def _trajectories(record: Study) -> None:
    if working := held(record.ledgers):
        raise InputError(
            f"{working} trials of {record.name} are worked on and read its trajectories; end them "
            f"first: bdense-search stop {record.name} --wait"
        )
    named = _folders(record.ledgers[0].attribute(TRAJECTORIES))
    folders = [folder for folder in named if folder.is_dir()]
    # Anyone who may write to the database could have named any folder of this machine.
    place = (cache_folder() / "trajectories").resolve()
    for folder in folders:
        if folder.resolve().parent != place or folder.is_symlink():
            raise InputError(
                f"study {record.name} names {folder} for its trajectories, which does not lie in "
                f"{place}; set BDENSE_CACHE to the cache that its workers used, or delete it by "
                "hand"
            )
    _refuse_readers(record, folders)
    freed = 0
    for folder in folders:
        freed += sum(path.stat().st_size for path in folder.iterdir())
        shutil.rmtree(folder)
    print(f"{freed / _MIB:.1f} MiB of trajectories deleted")


def _folders(stored: Any) -> list[Path]:  # noqa: ANN401  JSON, or None where nothing is stored
    """Folders of a study's trajectories, one a seed, as its attribute names them."""
    named = stored if isinstance(stored, list) else [stored]
    return [Path(each) for each in named if isinstance(each, str)]


def _refuse_readers(record: Study, folders: Collection[Path]) -> None:
    """Refuse to delete trajectories that workers of another study of this storage read.

    Studies of one teacher, grid and seed share them.
    """
    own = {ledger.name for ledger in record.ledgers}
    for other in retrying(record.ledgers[0].storage.get_all_studies):
        shared = [each for each in _folders(other.user_attrs.get(TRAJECTORIES)) if each in folders]
        if not shared or other.study_name in own:
            continue
        if working := held(Study.open(record.url, other.study_name).ledgers):
            raise InputError(
                f"{working} trials of {other.study_name} are worked on and read the same "
                f"trajectories, {shared[0]}; end them first: bdense-search stop "
                f"{other.study_name} --wait"
            )
