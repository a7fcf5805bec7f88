"""``bdense-search fetch``: download what a study needs, before its workers do."""

from search.spec.file import read_spec
from search.verbs.options import FileOptions
from search.worker.trainer import trainer_of


def fetch(asked: FileOptions) -> None:
    """Download what is missing, and name each part."""
    spec = read_spec(asked.study)
    for line in trainer_of(spec).fetch(spec):
        print(line, flush=True)
    print(f"{spec.name}: everything is here")
