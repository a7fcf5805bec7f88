"""``bdense-search launch``: start or continue a study, or print its cost."""

import argparse
from dataclasses import replace
from pathlib import Path

from bdense.errors import BdenseError, InputError
from bdense.knobs import from_options
from search.analysis.plans import plan_given
from search.analysis.priors import require_priors
from search.log import say
from search.run.launch import launch
from search.spec.command import budget
from search.spec.file import as_yaml, read_spec
from search.spec.study import StudySpec
from search.study.study import Study
from search.verbs.common import is_file, storage_url, use_workers
from search.verbs.options import DryRun, LaunchOptions


def launch_study(options: argparse.Namespace) -> None:
    """Launch it, or print what it would cost."""
    workers = use_workers(options)
    asked = from_options(LaunchOptions, options)
    url, by_name = storage_url(options), not is_file(asked.study)
    if by_name:
        spec = Study.open(url, asked.study).spec
        if asked.trials is not None:
            spec = _with_trials(spec, asked.trials)
    else:
        changes = {} if asked.trials is None else {"plan": {"trials": asked.trials}}
        spec = read_spec(Path(asked.study), changes)
    if from_options(DryRun, options).dry_run:
        dry_run(spec, workers)
        return
    if spec.is_search:
        for line in require_priors(url, spec):
            say(line)
        study = Study.create(url, spec)
    elif by_name:
        study = Study.open(url, spec.name)
        study.plan_failed_again()
    else:
        study = plan_given(url, spec)
    result, succeeded = launch(study, asked.study, workers)
    print(result)
    if not succeeded:
        raise BdenseError(f"no row of study {spec.name} is complete; the reasons are above")


def _with_trials(spec: StudySpec, trials: int) -> StudySpec:
    if not spec.is_search:
        raise InputError(
            f"--trials {trials}: {spec.name} has given arms and no trials; leave it out"
        )
    return replace(spec, plan=replace(spec.search, trials=trials))


def _cost(spec: StudySpec, workers: int | None) -> list[str]:
    if spec.is_command:
        return [f"rows: {spec.planned_rows}, each a run of {budget(spec.program)}"]
    from search.worker.cost import cost_lines  # with torch

    return cost_lines(spec, workers=workers)


def dry_run(spec: StudySpec, workers: int | None) -> None:
    """Print what the study would cost, its fingerprint, and the study resolved."""
    for line in _cost(spec, workers):
        print(f"# {line}")
    print(f"# fingerprint {spec.fingerprint()}")
    print(as_yaml(spec), end="")
