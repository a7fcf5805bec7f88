"""``clean`` files that a study need not keep, and ``delete`` a study with all of them."""

import sys

from bdense.errors import InputError
from search import removal
from search.redaction import redact
from search.study.folders import study_folder
from search.study.retention import named_students
from search.study.wording import counts_line
from search.verbs.common import open_study
from search.verbs.options import CleanOptions, DeleteOptions

_MIB = 2**20


def clean(asked: CleanOptions) -> None:
    """Delete the files, and print how much that was."""
    study = open_study(asked)
    freed = removal.clean(
        study, keep=asked.keep or (), checkpoints=asked.checkpoints, students=asked.students
    )
    if asked.keep:
        kept = ", ".join(map(str, sorted(named_students(study.search))))
        print(f"students of trials {kept} of {study.name} stay")
    more = {
        "checkpoints": "checkpoints and leftovers deleted",
        "students": f"students deleted; the best {study.spec.keep_students} stay",
        "trajectories": "trajectories deleted",
    }
    for kind, size in freed.items():
        print(f"{size / _MIB:.1f} MiB of {more[kind]}")


def delete(asked: DeleteOptions) -> None:
    """Say what would be deleted, ask, and delete it."""
    study = open_study(asked)
    ledgers = removal.to_delete(study)
    print(f"in {redact(study.url)}:")
    for ledger in ledgers:
        folder = study_folder(ledger.name)
        files = f", with the folder {folder}" if folder.is_dir() else ""
        print(f"  {ledger.name}: {counts_line(ledger.counts(), 'rows')}{files}")
    if not asked.yes and not _agreed(study.name):
        print("nothing is deleted")
        return
    removal.delete(ledgers)
    print(
        f"{study.name} is deleted; its trajectories stay in the cache, as other studies may use "
        "them"
    )


def _agreed(name: str) -> bool:
    if not sys.stdin.isatty():
        raise InputError(f"deleting {name} needs a yes: give --yes, or run it in a terminal")
    return input("Delete all of it? [y/N] ").strip().lower() in ("y", "yes")
