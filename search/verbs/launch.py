"""``bdense-search launch``: start or continue a study, or print its cost."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdense.command import Verbs
from bdense.errors import BdenseError
from search.storage.engine import resolve_storage_url
from search.verbs.common import add_workers, positive, storage_verb

if TYPE_CHECKING:
    from search.spec.study import StudySpec


def add_launch(verbs: Verbs) -> None:
    """``launch`` and its options."""
    parser = storage_verb(
        verbs,
        "launch",
        "start a study, or continue it if its name is already in the storage",
        "bdense-search launch studies/digits-nfe2.yaml --trials 32",
        _launch,
    )
    parser.add_argument("study", metavar="STUDY.yaml", type=Path, help="the study file")
    parser.add_argument(
        "--trials",
        metavar="N",
        type=positive,
        help="trials in all, counting those that are done (default: plan.trials of the file)",
    )
    add_workers(parser)
    parser.add_argument(
        "-n",
        "--dry-run",
        action="store_true",
        help="print the resolved study, its fingerprint and its cost; start nothing",
    )


def _launch(options: argparse.Namespace) -> None:
    from search.run.gpus import use_gpus
    from search.run.launch import launch
    from search.spec.file import read_spec

    use_gpus(options.gpus)
    changes: dict[str, Any] = {}
    if options.trials is not None:
        changes = {"plan": {"trials": options.trials}}
    spec = read_spec(options.study, changes)
    if options.dry_run:
        dry_run(spec, options.workers)
        return
    url = resolve_storage_url(options.storage)
    result, succeeded = launch(spec, url, options.study, options.workers)
    print(result)
    if not succeeded:
        raise BdenseError(f"no row of study {spec.name} is complete; the reasons are above")


def dry_run(spec: "StudySpec", workers: int | None) -> None:
    """Print the resolved study, its fingerprint and what it would cost."""
    from search.spec.file import as_yaml
    from search.worker.cost import cost_lines

    print(as_yaml(spec), end="")
    print(f"# fingerprint {spec.fingerprint()}")
    for line in cost_lines(spec, workers=workers):
        print(f"# {line}")
