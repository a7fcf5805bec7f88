"""Deletes a study, or files that it need not keep."""

import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from bdense.errors import InputError
from bdense.knobs import KnobError
from search.analysis.confirmation import confirmation_of
from search.analysis.pilot import ledgers_with_pilot
from search.places import cache_folder
from search.storage.engine import retrying
from search.storage.ledger import Ledger
from search.storage.stop_flags import held
from search.study.artifacts import artifact_store, remove_attached
from search.study.folders import row_folder, study_folder
from search.study.retention import clean_checkpoints, clean_students, keep_too, student_files
from search.study.study import TRAJECTORIES, Study


def clean(
    study: Study, *, keep: Collection[int] = (), checkpoints: bool = False, students: bool = False
) -> dict[str, int]:
    """Delete files that a study need not keep, see ``search.api.OpenStudy.clean``."""
    freed = {}
    search = _search(study, "students") if students else None
    if keep:
        _keep(study, keep)
    if checkpoints:
        freed["checkpoints"] = sum(map(clean_checkpoints, study.ledgers))
    if search is not None:
        freed["students"] = clean_students(search, study.spec.keep_students)
    if not (keep or checkpoints or students):
        freed["trajectories"] = _clean_trajectories(study)
    return freed


def _keep(study: Study, asked: Collection[int]) -> None:
    ledger = _search(study, "keep")
    there = [n for n in asked if student_files(row_folder(study.name, n))]
    running = {row.number for row in ledger.running()}
    if gone := sorted(set(asked) - set(there) - running):
        raise KnobError(
            "keep",
            f"{','.join(map(str, gone))}: no student of that trial is there; make one of its "
            "weights by `bdense distill`, and for trials to come raise keep_students before the "
            "next launch",
        )
    keep_too(ledger, asked)


def _search(study: Study, knob: str) -> Ledger:
    if study.trials is None:
        raise KnobError(
            knob,
            "applies to a search: the students of given arms all stay, as `export` and the "
            f"figures of {study.name} name them; when they are exported, delete its folder",
        )
    return study.trials


def _refuse_at_work(ledgers: Sequence[Ledger], name: str, why: str = "") -> None:
    if working := held(ledgers):
        raise InputError(
            f"{working} trials of {name} are worked on{why}; end them first: bdense-search "
            f"stop {name} --wait"
        )


def _clean_trajectories(study: Study) -> int:
    _refuse_at_work(study.ledgers, study.name, " and read its trajectories")
    named = _folders(study.ledgers[0].attribute(TRAJECTORIES))
    folders = [folder for folder in named if folder.is_dir()]
    # Anyone who may write to the database could have named any folder of this machine.
    place = (cache_folder() / "trajectories").resolve()
    for folder in folders:
        if folder.resolve().parent != place or folder.is_symlink():
            raise InputError(
                f"study {study.name} names {folder} for its trajectories, which does not lie in "
                f"{place}; set BDENSE_CACHE to the cache that its workers used, or delete it by "
                "hand"
            )
    _refuse_readers(study, folders)
    freed = 0
    for folder in folders:
        freed += sum(path.stat().st_size for path in folder.iterdir())
        shutil.rmtree(folder)
    return freed


def _folders(stored: Any) -> list[Path]:  # noqa: ANN401  JSON, or None where nothing is stored
    """Folders of a study's trajectories, one a seed, as its attribute names them."""
    named = stored if isinstance(stored, list) else [stored]
    return [Path(each) for each in named if isinstance(each, str)]


def _refuse_readers(study: Study, folders: Collection[Path]) -> None:
    """Refuse to delete trajectories that workers of another study of this storage read.

    Studies of one teacher, grid and seed share them.
    """
    own = {ledger.name for ledger in study.ledgers}
    for other in retrying(study.ledgers[0].storage.get_all_studies):
        shared = [each for each in _folders(other.user_attrs.get(TRAJECTORIES)) if each in folders]
        if shared and other.study_name not in own:
            ledgers = Study.open(study.url, other.study_name).ledgers
            what = f" and read the same trajectories, {shared[0]}"
            _refuse_at_work(ledgers, other.study_name, what)


def to_delete(study: Study) -> list[Ledger]:
    """What is deleted with a study: its confirmation, its pilot and, last, itself.

    Interrupted, the deletion can be asked for again.

    Raises:
        InputError: Trials are worked on.
    """
    confirmation = confirmation_of(study)
    ledgers = [*(() if confirmation is None else confirmation.ledgers)]
    ledgers += reversed(ledgers_with_pilot(study))
    _refuse_at_work(ledgers, study.name)
    return ledgers


def delete(ledgers: Sequence[Ledger]) -> None:
    """Delete rows with their pictures and files, these first: only the rows name them."""
    store = artifact_store()
    for ledger in ledgers:
        folder = study_folder(ledger.name)
        remove_attached(ledger.storage, ledger.study.get_trials(deepcopy=False), store)
        if folder.is_symlink():
            folder.unlink()
        elif folder.is_dir():
            shutil.rmtree(folder)
        ledger.delete()
