"""``clean``: delete files that a study need not keep."""

from search import removal
from search.study.retention import named_students
from search.verbs.common import open_study
from search.verbs.options import CleanOptions

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
