"""``launch`` a study, or print its cost; ``fetch`` what it needs before its workers do."""

import contextlib
from pathlib import Path

from bdense.errors import BdenseError
from search.analysis.pilot import pilot_spec, with_known_images
from search.api import changes_of, is_file, planned, stored_spec
from search.errors import StorageError, UnknownStudyError
from search.run.launch import launch
from search.spec.file import as_yaml, read_spec
from search.spec.study import StudySpec
from search.storage.engine import resolve_storage_url
from search.study.study import Study
from search.study.summary import headline
from search.verbs.common import use_workers
from search.verbs.options import FileOptions, LaunchOptions, Workers
from search.worker.trainer import trainer_of


def launch_study(asked: LaunchOptions, run: Workers) -> None:
    """Launch the study, or print what it would cost."""
    workers = use_workers(run)
    url, by_name = resolve_storage_url(asked.storage), not is_file(asked.study)
    if by_name:
        spec = stored_spec(url, asked.study, asked.trials)
    else:
        spec = read_spec(Path(asked.study), changes_of(asked.trials))
    if run.dry_run:
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


def dry_run(spec: StudySpec, workers: int | None) -> None:
    """Print what the study would cost, its fingerprint, and the study resolved."""
    cost_lines = trainer_of(spec).cost_lines
    if spec.evaluation.images == "auto":
        pilot = pilot_spec(spec)
        print(f"# evaluation.images auto: first {pilot.name}, which decides it")
        for line in cost_lines(pilot, workers):
            print(f"#   {line}")
        print(f"# then {spec.name}, with {spec.evaluation.num_images} images a FID or more")
    for line in cost_lines(spec, workers):
        print(f"# {line}")
    if spec.evaluation.images != "auto":
        print(f"# fingerprint {spec.fingerprint()}")
    print(as_yaml(spec), end="")


def fetch(asked: FileOptions) -> None:
    """Download what is missing, and name each part."""
    spec = read_spec(asked.study)
    for line in trainer_of(spec).fetch(spec):
        print(line, flush=True)
    print(f"{spec.name}: everything is here")
