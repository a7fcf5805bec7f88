"""``bdense-search fetch``: download what a study needs, before its workers do."""

import argparse
from pathlib import Path

from bdense.command import Verbs, add_verb


def add_fetch(verbs: Verbs) -> None:
    """``fetch`` and its options."""
    parser = add_verb(
        verbs,
        "fetch",
        "download the teacher, data, reference and feature extractor that a study file names",
        "bdense-search fetch studies/cifar10-nfe2.yaml",
        _fetch,
    )
    parser.add_argument("study", metavar="STUDY.yaml", type=Path, help="a study's file")
    parser.set_defaults(storage=None)


def _fetch(options: argparse.Namespace) -> None:
    from search.run.fetching import fetch_all
    from search.spec.file import read_spec

    spec = read_spec(options.study)
    for line in fetch_all(spec):
        print(line, flush=True)
    print(f"{spec.name}: everything is here")
