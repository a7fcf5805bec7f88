"""``bdense-search launch``: start or continue a study, or print its cost."""

import argparse
from typing import Any

from bdense.errors import BdenseError
from bdense.knobs import from_options
from search.run.launch import launch
from search.spec.file import as_yaml, read_spec
from search.spec.study import StudySpec
from search.verbs.common import storage_url, use_workers
from search.verbs.options import DryRun, FileOptions, LaunchOptions


def launch_study(options: argparse.Namespace) -> None:
    """Launch it, or print what it would cost."""
    workers = use_workers(options)
    file, trials = (
        from_options(FileOptions, options).study,
        from_options(LaunchOptions, options).trials,
    )
    changes: dict[str, Any] = {}
    if trials is not None:
        changes = {"plan": {"trials": trials}}
    spec = read_spec(file, changes)
    if from_options(DryRun, options).dry_run:
        dry_run(spec, workers)
        return
    result, succeeded = launch(spec, storage_url(options), file, workers)
    print(result)
    if not succeeded:
        raise BdenseError(f"no row of study {spec.name} is complete; the reasons are above")


def dry_run(spec: StudySpec, workers: int | None) -> None:
    """Print the resolved study, its fingerprint and what it would cost."""
    from search.worker.cost import cost_lines  # with torch

    print(as_yaml(spec), end="")
    print(f"# fingerprint {spec.fingerprint()}")
    for line in cost_lines(spec, workers=workers):
        print(f"# {line}")
