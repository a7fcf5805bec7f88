"""``delete``: a study, its rows and their files."""

import shutil
import sys
from pathlib import Path

from bdense.errors import InputError
from search.analysis.confirmation import confirmation_of
from search.analysis.pilot import ledgers_with_pilot
from search.redaction import redact
from search.storage.ledger import Ledger
from search.storage.stop_flags import held
from search.study.artifacts import Store, artifact_store, remove_attached
from search.study.folders import study_folder
from search.study.wording import counts_line
from search.verbs.common import open_study
from search.verbs.options import DeleteOptions


def delete(asked: DeleteOptions) -> None:
    """Say what would be deleted, ask, and delete it."""
    study = open_study(asked)
    confirmation = confirmation_of(study)
    # The study itself last: interrupted, the command can be given again.
    ledgers = [*(() if confirmation is None else confirmation.ledgers)]
    ledgers += reversed(ledgers_with_pilot(study))
    if working := held(ledgers):
        raise InputError(
            f"{working} trials of {study.name} are worked on; end them first: bdense-search stop "
            f"{study.name} --wait"
        )
    print(f"in {redact(study.url)}:")
    for ledger in ledgers:
        folder = _folder(ledger)
        files = f", with the folder {folder}" if folder.is_dir() else ""
        print(f"  {ledger.name}: {counts_line(ledger.counts(), 'rows')}{files}")
    if not asked.yes and not _agreed(study.name):
        print("nothing is deleted")
        return
    store = artifact_store()
    for ledger in ledgers:
        _delete(ledger, store)
    print(
        f"{study.name} is deleted; its trajectories stay in the cache, as other studies may use "
        "them"
    )


def _agreed(name: str) -> bool:
    """Ask on the terminal.

    Raises:
        InputError: stdin is not a terminal.
    """
    if not sys.stdin.isatty():
        raise InputError(f"deleting {name} needs a yes: give --yes, or run it in a terminal")
    return input("Delete all of it? [y/N] ").strip().lower() in ("y", "yes")


def _folder(ledger: Ledger) -> Path:
    return study_folder(ledger.name)


def _delete(ledger: Ledger, store: Store) -> None:
    """Delete pictures and files first: without the rows nothing would name them."""
    folder = _folder(ledger)
    remove_attached(ledger.storage, ledger.study.get_trials(deepcopy=False), store)
    if folder.is_symlink():
        folder.unlink()
    elif folder.is_dir():
        shutil.rmtree(folder)
    ledger.delete()
