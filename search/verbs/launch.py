"""``bdense-search launch``: start or continue a study, or print its cost."""

import contextlib
from dataclasses import replace
from pathlib import Path

from bdense.errors import BdenseError
from search.analysis.comparison import settings_text
from search.analysis.pilot import pilot_spec, with_known_images
from search.api import changes_of, is_file, planned, stored_spec
from search.errors import StorageError, UnknownStudyError
from search.run.launch import launch
from search.spec.command import command_line
from search.spec.file import as_yaml, read_spec
from search.spec.study import StudySpec
from search.study.study import Study
from search.study.summary import headline
from search.verbs.common import storage_url, use_workers
from search.verbs.options import DryRun, LaunchOptions, Workers


def launch_study(asked: LaunchOptions, run: Workers, dry: DryRun) -> None:
    """Launch the study, or print what it would cost."""
    workers = use_workers(run, dry)
    url, by_name = storage_url(asked), not is_file(asked.study)
    if by_name:
        spec = stored_spec(url, asked.study, asked.trials)
    else:
        spec = read_spec(Path(asked.study), changes_of(asked.trials))
    if dry.dry_run:
        with contextlib.suppress(UnknownStudyError, StorageError):
            stored = Study.open(url, spec.name, reading=True)
            print(f"# in the storage already: {headline(stored)}")
        dry_run(with_known_images(url, spec), workers)
        return
    study = planned(url, spec, by_name=by_name)
    result, succeeded = launch(study, asked.study, workers)
    print(result)
    if not succeeded:
        raise BdenseError(f"no row of study {spec.name} is complete; the reasons are above")


def _cost(spec: StudySpec, workers: int | None) -> list[str]:
    if spec.is_command:
        return [f"rows: {spec.planned_rows}, each a run of {command_line(spec.program)}"]
    from search.spec.resolve import variant  # with torch
    from search.worker.cost import cost_lines

    if spec.is_search or not any(spec.given.variants):
        return cost_lines(spec, workers=workers)
    lines, one = [], replace(spec, plan=replace(spec.given, variants=({},)))
    for changes in spec.given.variants:
        own = [f"  {line}" for line in cost_lines(variant(one, changes), workers=workers)]
        # What all share, such as a download, is told once.
        lines += [f"with {settings_text(changes)}:", *(line for line in own if line not in lines)]
    return lines


def dry_run(spec: StudySpec, workers: int | None) -> None:
    """Print what the study would cost, its fingerprint, and the study resolved."""
    if spec.evaluation.images == "auto":
        pilot = pilot_spec(spec)
        print(f"# evaluation.images auto: first {pilot.name}, which decides it")
        for line in _cost(pilot, workers):
            print(f"#   {line}")
        print(f"# then {spec.name}, with {spec.evaluation.num_images} images a FID or more")
    for line in _cost(spec, workers):
        print(f"# {line}")
    if spec.evaluation.images != "auto":
        print(f"# fingerprint {spec.fingerprint()}")
    print(as_yaml(spec), end="")
