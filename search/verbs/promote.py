"""``promote``: train a study's confirmed weights beside the baselines, and export the model."""

import argparse
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from bdense.errors import InputError
from bdense.files import require_new
from bdense.knobs import from_options
from search.analysis.comparison import compare, comparisons_of, table_rows, teacher_of
from search.analysis.confirmation import CONFIRM_SUFFIX, confirmed_arm
from search.analysis.plans import (
    PROMOTE_SUFFIX,
    arm_from,
    at_another_k,
    differing,
    fresh_seeds,
    other_budget,
    plan_promotion,
    seeds_of,
)
from search.analysis.recommendation import recommend
from search.export import arm_row, export_trial, is_current, is_of, put_aside, require_students
from search.run.launch import run_rows
from search.spec.file import read_spec, require_variants
from search.spec.sections import ArmsPlan
from search.spec.study import StudySpec
from search.storage.engine import runs_folder
from search.study.arms import Arm, given_arms
from search.study.study import Study
from search.study.summary import headline
from search.study.wording import align
from search.verbs.common import open_search, show_rows, use_workers
from search.verbs.launch import dry_run
from search.verbs.options import FRESH_SEEDS, DryRun, PromoteOptions


def promote(arguments: argparse.Namespace) -> None:
    """Run the promotion, print its figures and export the model."""
    workers, options = use_workers(arguments), from_options(PromoteOptions, arguments)
    study = open_search(arguments)
    require_students(study)
    spec = _spec(options, study)
    asked = _asked(options, study, spec)
    variants = [differing(spec, each) for each in asked]
    require_variants(spec, variants)
    seeds = _seeds(options, study, spec)
    if from_options(DryRun, arguments).dry_run:
        plan = _plan(options, study, spec, seeds, variants)
        dry_run(replace(spec, plan=plan), workers)
        return
    folders = [_folder(options, spec, each, len(asked)) for each in asked]
    for folder in folders if options.out is not None else ():
        if not is_of(folder, spec.name):  # one that this promotion wrote is written anew
            require_new(folder)
    given = options.weights
    arm = confirmed_arm(study) if given is None else arm_from(given)
    if options.weights is None and options.to is None:
        sys.stderr.write("".join({other_budget(study, each) for each in asked}))
    remark = at_another_k(arm, study.spec.resolved.num_branches, spec.resolved.num_branches)
    planned = plan_promotion(study.url, spec, arm, of=study.name, seeds=seeds, variants=variants)
    if remark:
        print(remark, flush=True)
    run_rows(planned, workers)
    show_rows(planned)
    if shown := comparisons_of(planned):
        print(*align(table_rows(shown, teacher_of(planned))), shown[0].conditions_line(), sep="\n")
    for variant, folder in zip(variants, folders, strict=True):
        _hand_over(planned, folder, arm, options.arm, planned.variants.index(variant))


def _spec(options: PromoteOptions, study: Study) -> StudySpec:
    """The study of given arms to run: that of --to, else one under the search's conditions."""
    if options.to is None:
        return given_arms(study.spec, study.name + PROMOTE_SUFFIX)
    spec = read_spec(options.to)
    if spec.is_search:
        raise InputError(
            f"--to {options.to} is a search; give a study of given arms (plan: arms, seeds), or "
            "measure weights under a search's conditions by `bdense-search transfer`"
        )
    return spec


def _asked(options: PromoteOptions, study: Study, spec: StudySpec) -> list[dict[str, Any]]:
    """Settings of the method: the variants of --to or the search's ``confirm``, with options."""
    named = [study.spec.confirm.method] if options.to is None else spec.given.variants
    asked = [dict(each) for each in named]
    if options.kimg:
        asked = [{**each, "kimg": options.kimg} for each in asked]
    if options.nfe:
        asked = [{**each, "nfe": nfe} for each in asked for nfe in options.nfe]
    return asked


def _seeds(options: PromoteOptions, study: Study, spec: StudySpec) -> list[int]:
    given = options.seeds
    if options.to is None:
        given = given or (FRESH_SEEDS,)
        if len(given) > 1 or given[0] < 1:
            raise InputError(
                f"--seeds {','.join(map(str, given))}: without --to it is the number of fresh "
                "seeds; give one number, 1 or more"
            )
        # Not those of the confirmation, which chose the winner.
        return fresh_seeds(study.spec, given[0], seeds_of(study, study.name + CONFIRM_SUFFIX))
    plan = spec.given
    if given is None:
        return list(plan.seeds)
    # One number is their number, several are the seeds themselves.
    seeds = range(given[0]) if len(given) == 1 else given
    return list(replace(plan, seeds=tuple(seeds)).seeds)  # which refuses others


def _plan(
    options: PromoteOptions,
    study: Study,
    spec: StudySpec,
    seeds: list[int],
    variants: list[dict[str, Any]],
) -> ArmsPlan:
    """The plan that the study's file would have."""
    given = options.weights
    promoted = {"winner_of": study.name} if given is None else arm_from(given).params
    return replace(
        spec.given,
        arms=("plain", "uniform", promoted),
        seeds=tuple(seeds),
        variants=tuple(variants),
    )


def _folder(options: PromoteOptions, spec: StudySpec, asked: dict[str, Any], count: int) -> Path:
    """Folder for the model of these settings; models of other settings go beside it."""
    words = [
        f"{name}{value:g}" if isinstance(value, float) else f"{name}{value}"
        for name, value in sorted(asked.items())
    ]
    named = re.sub(r"[^\w.-]+", "-", "-".join(words))
    if options.out is None:
        return runs_folder() / spec.name / ("model" + (f"-{named}" if named else ""))
    return Path(options.out if count == 1 else options.out / named)


def _hand_over(
    planned: Study, folder: Path, promoted: Arm, choice: str | None, variant: int
) -> None:
    """Export the best arm's student, unless an earlier run did and nothing is new since."""
    if planned.left():
        raise InputError(f"{headline(planned)}; run the same command again to continue")
    found = recommend(compare(planned, variant=variant).beside_baselines(promoted))
    if found is not None:
        print(found.text())
    chosen = found.arm.name if found is not None else None
    arm = promoted.name if choice == "weights" else choice or chosen
    if arm is None:
        raise InputError(
            f"{headline(planned)}: no baseline is complete to judge {promoted.name} by; run the "
            "same command again, or choose the student to export by --arm"
        )
    number = arm_row(planned, arm=arm, variant=variant)
    if is_current(folder, planned, number):
        print(f"model folder, written before: {folder}")
    else:
        put_aside(folder)
        for path in export_trial(planned, folder, number=number):
            print(f"model folder: {path}")
    print(f"draw images with it:   bdense sample {folder} --out samples.png")
