"""``promote``: train a study's confirmed weights beside the baselines, and export the model."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdense.command import Verbs
from bdense.errors import InputError
from search.storage.engine import runs_folder
from search.verbs.common import (
    add_workers,
    numbers,
    open_search,
    positives,
    show_rows,
    storage_verb,
    thousands,
)

if TYPE_CHECKING:
    from search.spec.study import StudySpec
    from search.study.arms import Arm
    from search.study.study import Study


def add_promote(verbs: Verbs) -> None:
    """``promote`` and its options."""
    parser = storage_verb(
        verbs,
        "promote",
        "train a study's confirmed weights again beside its baselines, and export the model",
        "bdense-search promote digits-nfe2 --to studies/promote-digits.yaml",
        _promote,
    )
    parser.add_argument("study", metavar="STUDY", help="a search's name or its YAML file")
    parser.add_argument(
        "--to",
        metavar="STUDY2.yaml",
        type=Path,
        help="a study of given arms, of any method, under whose conditions, seeds and name they "
        "are trained (default: the search's own method, under fresh seeds)",
    )
    parser.add_argument(
        "--weights",
        metavar="A,B",
        help="weights to promote, log w_k = a k + b (default: the study's confirmed winner); "
        "where A is negative, --weights=A,B",
    )
    parser.add_argument(
        "--seeds",
        metavar="N",
        type=numbers,
        help="number of seeds, or with --to the seeds themselves, as in 0,1,2 (default: the "
        "file's; 3 fresh ones without --to)",
    )
    parser.add_argument(
        "--nfe",
        metavar="N",
        type=positives,
        help="network evaluations an image, as in 2,3: a model for each (default: the method's)",
    )
    parser.add_argument(
        "--kimg",
        metavar="X",
        type=thousands,
        help="training length of each student in thousands of images (default: confirm.method "
        "of the study, else the method's own)",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="model folder to write (default: one in the run's folder)",
    )
    add_workers(parser)
    parser.add_argument(
        "-n",
        "--dry-run",
        action="store_true",
        help="print the resolved study, its fingerprint and its cost; start nothing",
    )


def _promote(options: argparse.Namespace) -> None:
    from search.analysis.comparison import table_rows, teacher_of
    from search.analysis.plans import (
        at_another_k,
        other_budget,
        plan_promotion,
    )
    from search.run.gpus import use_gpus
    from search.run.launch import run_rows
    from search.study.wording import align
    from search.verbs.launch import dry_run

    use_gpus(options.gpus)
    if options.to is not None:
        spec = _given(options)
        if options.dry_run:
            dry_run(spec, options.workers)
            return
    study = open_search(options)
    spec = _given(options) if options.to is not None else _own(study)
    variants = _variants(options, study, own=options.to is None)
    if options.dry_run:
        dry_run(spec, options.workers)
        return
    folders = [_folder(options, spec, variant, len(variants)) for variant in variants]
    _require_free(options, spec.name, folders)
    arm = _arm(options, study)
    if options.weights is None and options.to is None:
        sys.stderr.write("".join({other_budget(study, variant) for variant in variants}))
    told = at_another_k(arm, study.spec.resolved.num_branches, spec.resolved.num_branches)
    planned = plan_promotion(
        study.url,
        spec,
        arm,
        of=study.name,
        seeds=_seeds(options, study, spec),
        variants=variants,
    )
    if told:
        print(told, flush=True)
    run_rows(planned, options.workers)
    show_rows(planned)
    from search.analysis.comparison import comparisons_of

    if shown := comparisons_of(planned):
        print(*align(table_rows(shown, teacher_of(planned))), shown[0].conditions_line(), sep="\n")
    for variant, folder in zip(variants, folders, strict=True):
        _hand_over(planned, folder, arm, variant)


def _given(options: argparse.Namespace) -> "StudySpec":
    """The study of --to, with the seeds of the options."""
    from search.spec.file import read_spec

    spec = read_spec(options.to)
    if spec.is_search:
        raise InputError(
            f"--to {options.to} is a search; give a study of given arms (plan: arms, seeds), or "
            "measure weights under a search's conditions by `bdense-search transfer`"
        )
    return spec


def _own(study: "Study") -> "StudySpec":
    from search.analysis.plans import PROMOTE_SUFFIX
    from search.study.arms import given_arms

    return given_arms(study.spec, study.name + PROMOTE_SUFFIX)


def _variants(options: argparse.Namespace, study: "Study", *, own: bool) -> list[dict[str, Any]]:
    """Changes of the method's settings that --kimg and --nfe ask for."""
    base: dict[str, Any] = dict(study.spec.confirm.method) if own else {}
    if options.kimg:
        base["kimg"] = options.kimg
    return [{**base, "nfe": nfe} for nfe in options.nfe] if options.nfe else [base]


def _seeds(options: argparse.Namespace, study: "Study", spec: "StudySpec") -> list[int]:
    from search.analysis.confirmation import CONFIRM_SUFFIX
    from search.analysis.plans import fresh_seeds, seeds_of
    from search.spec.study import ArmsPlan

    if options.to is not None:
        assert isinstance(spec.plan, ArmsPlan)
        if not options.seeds:
            return list(spec.plan.seeds)
        # One number is how many, several are the seeds themselves.
        return list(range(options.seeds[0])) if len(options.seeds) == 1 else options.seeds
    count = options.seeds or [3]
    if len(count) > 1 or count[0] < 1:
        raise InputError(
            f"--seeds {','.join(map(str, count))}: without --to it is how many fresh ones; give "
            "one number, 1 or more"
        )
    # Nor the seeds that the winner was chosen by.
    return fresh_seeds(study.spec, count[0], seeds_of(study, study.name + CONFIRM_SUFFIX))


def _arm(options: argparse.Namespace, study: "Study") -> "Arm":
    from search.analysis.confirmation import confirmed_arm
    from search.analysis.plans import arm_from

    return arm_from(options.weights) if options.weights is not None else confirmed_arm(study)


def _folder(
    options: argparse.Namespace, spec: "StudySpec", variant: dict[str, Any], count: int
) -> Path:
    """Where a variant's model goes; those of others may come beside it."""
    named = "-".join(f"{name}{value:g}" for name, value in sorted(variant.items()))
    if options.out is None:
        return runs_folder() / spec.name / ("model" + (f"-{named}" if named else ""))
    return Path(options.out if count == 1 else options.out / named)


def _require_free(options: argparse.Namespace, name: str, folders: list[Path]) -> None:
    """Refuse folders of somebody else's before hours of work, not after them.

    Those that this promotion wrote before are left, or written anew once it has gone on.
    """
    from bdense.files import require_new
    from search.export import is_of

    if options.out is not None:
        for folder in folders:
            if not is_of(folder, name):
                require_new(folder)


def _hand_over(planned: "Study", folder: Path, arm: "Arm", variant: dict[str, Any]) -> None:
    """Export the promoted student, unless an earlier run did and nothing is new since."""
    from search.export import arm_row, export_trial, is_current, put_aside
    from search.study.summary import headline

    if planned.left():
        raise InputError(f"{headline(planned)}; run the same command again to continue")
    number = arm_row(planned, arm=arm.name, variant=planned.variants.index(variant))
    if is_current(folder, planned):
        print(f"model folder, written before: {folder}")
    else:
        put_aside(folder)
        for path in export_trial(planned, folder, number=number):
            print(f"model folder: {path}")
    print(f"draw images with it:   bdense sample {folder} --out samples.png")
