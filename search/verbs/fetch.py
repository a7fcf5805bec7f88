"""``bdense-search fetch``: download what a study needs, before its workers do."""

from search.spec.file import read_spec
from search.verbs.options import FileOptions


def fetch(asked: FileOptions) -> None:
    """Download what is missing, and name each part."""
    spec = read_spec(asked.study)
    if not spec.is_command:  # a program sees to its own downloads
        from search.run.fetching import fetch_all  # with torch

        for line in fetch_all(spec):
            print(line, flush=True)
    print(f"{spec.name}: everything is here")
