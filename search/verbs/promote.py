"""``promote`` confirmed weights: progressive distillation with them, or SFD trained again."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bdense.command import Verbs
from bdense.errors import InputError
from search.storage.engine import resolve_storage_url, runs_folder
from search.verbs.common import (
    add_workers,
    numbers,
    open_search,
    positives,
    show_rows,
    storage_verb,
    study_name,
    thousands,
)

if TYPE_CHECKING:
    from search.spec.promotion_spec import PromotionSpec
    from search.study.arms import Arm, Planned


def add_promote(verbs: Verbs) -> None:
    """``promote`` and its options."""
    parser = storage_verb(
        verbs,
        "promote",
        "retrain with a study's confirmed weights, beside its baselines, and export the model",
        "bdense-search promote digits-nfe2 --to studies/promote-digits.yaml",
        _promote,
    )
    parser.add_argument(
        "study",
        metavar="STUDY",
        help="a study's name or its YAML file; or a promotion's file, which names its study",
    )
    parser.add_argument(
        "--to",
        metavar="PROMOTION.yaml",
        type=Path,
        help="the promotion file: teacher, chain of steps, rounds (needed by --method pd)",
    )
    parser.add_argument(
        "--method",
        choices=("pd", "sfd"),
        default="pd",
        help="progressive distillation (default), or SFD of --kimg for each --nfe",
    )
    parser.add_argument(
        "--weights",
        metavar="A,B",
        help="weights to promote, log w_k = a k + b (default: the study's confirmed winner); "
        "where A is negative, --weights=A,B",
    )
    parser.add_argument(
        "--weights-space",
        choices=("clean", "state"),
        help="pd: take w_k as they are (default), or multiply them by 1 - t_{n,k} / t_n, as "
        "SFD's loss in the space of states does by itself",
    )
    parser.add_argument(
        "--seeds",
        metavar="N",
        type=numbers,
        help="number of seeds; pd: seeds 0 to N - 1, or the seeds themselves, as in 0,1,2 "
        "(default: the file's); sfd: fresh ones (default: 3)",
    )
    parser.add_argument(
        "--nfe",
        metavar="N",
        type=positives,
        help="sfd: network evaluations an image, as in 2,3 (default: the study's)",
    )
    parser.add_argument(
        "--kimg",
        metavar="X",
        type=thousands,
        help="sfd: training length of each student in thousands of images (default: confirm.kimg, "
        "else the search's own)",
    )
    parser.add_argument("--name", help="pd: name of the promotion (default: the file's)")
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
        help="pd: print the resolved promotion, its fingerprint and its cost; start nothing",
    )


def _promote(options: argparse.Namespace) -> None:
    from search.run.gpus import use_gpus

    use_gpus(options.gpus)
    if options.method == "sfd":
        _promote_sfd(options)
    else:
        _promote_pd(options)


def _promote_pd(options: argparse.Namespace) -> None:
    from search.analysis.promotion import plan_progressive, said_of_weights
    from search.report.chain_report import chain_table
    from search.run.launch import check_apart, run_planned

    _refuse(options, "pd", nfe=options.nfe, kimg=options.kimg)
    spec, source = _promotion(options)
    check_apart(spec)
    if options.dry_run:
        _dry_run(spec, options.workers)
        return
    url = resolve_storage_url(options.storage)
    folder = options.out or runs_folder() / spec.name / "model"
    _require_free(options, url, spec.name, [folder])
    arm, searched_at = _promoted(options, source)
    planned = plan_progressive(url, spec, arm, of=source, seeds=spec.seeds.training)
    print(said_of_weights(arm, searched_at, spec.chain.substeps), flush=True)
    run_planned(planned, [spec], options.workers)
    show_rows(planned)
    print(chain_table(planned))
    _hand_over(planned, folder)


def _promote_sfd(options: argparse.Namespace) -> None:
    from search.analysis.comparison import compare
    from search.analysis.promotion import (
        SFD_SUFFIX,
        confirmed_arm,
        given_arm,
        plan_retraining,
        said_of_budget,
    )
    from search.analysis.retraining import variants
    from search.run.launch import run_planned

    _refuse(
        options,
        "sfd",
        to=options.to,
        name=options.name,
        weights_space=options.weights_space,
        dry_run=options.dry_run,
    )
    study, spec = open_search(options)
    seeds = options.seeds or [3]
    if len(seeds) > 1 or seeds[0] < 1:
        raise InputError(
            f"--seeds {','.join(map(str, seeds))}: with --method sfd it is how many fresh ones; "
            "give one number, 1 or more"
        )
    nfes = options.nfe or [spec.student.nfe]
    kimg = float(options.kimg or spec.confirm.kimg or spec.budget.kimg)
    name = study.name + SFD_SUFFIX
    folders = {nfe: _sfd_folder(options, name, nfe, len(nfes), kimg) for nfe in nfes}
    _require_free(options, study.url, name, list(folders.values()))
    given = options.weights is not None
    arm = given_arm(options.weights) if given else confirmed_arm(study)
    if not given:
        sys.stderr.write(said_of_budget(study, kimg))
    planned = plan_retraining(study, spec, arm, nfes=nfes, kimg=kimg, seeds=seeds[0])
    run_planned(planned, variants(planned, spec), options.workers)
    show_rows(planned)
    for nfe, folder in folders.items():
        comparison = compare(planned, kimg=kimg, nfe=nfe)
        if comparison.results:
            print(*comparison.table(), comparison.conditions_line(), sep="\n")
        _hand_over(planned, folder, arm=arm.name, nfe=nfe, kimg=kimg)


def _sfd_folder(options: argparse.Namespace, name: str, nfe: int, count: int, kimg: float) -> Path:
    """Where the student for that NFE goes; those of other budgets may come beside it."""
    if options.out is None:
        return runs_folder() / name / f"model-nfe{nfe}-{kimg:g}kimg"
    return Path(options.out if count == 1 else options.out / f"nfe-{nfe}")


def _promotion(options: argparse.Namespace) -> "tuple[PromotionSpec, str | None]":
    """The promotion as the options change it, and the search its weights come from."""
    from search.spec.promotion_spec import PromotionSpec
    from search.spec.study_file import parse_promotion, read_any, read_promotion

    given, source = Path(options.study), None
    found = read_any(given) if given.suffix in (".yaml", ".yml") else None
    spec = found
    if options.to is not None:
        spec, source = read_promotion(Path(options.to)), study_name(options.study)
        if isinstance(found, PromotionSpec):
            raise InputError(f"both STUDY {given} and --to {options.to} are promotions; drop one")
    if not isinstance(spec, PromotionSpec):
        raise InputError(
            "progressive distillation needs a teacher and a chain of steps, which a promotion "
            "file gives: add --to PROMOTION.yaml, such as studies/promote-digits.yaml, or take "
            "--method sfd"
        )
    changes: dict[str, object] = {}
    if options.name is not None:
        changes["name"] = options.name
    if options.weights_space:
        changes["weights_space"] = options.weights_space
    if options.seeds:
        changes["seeds"] = spec.seeds.model_copy(
            update={"training": _training_seeds(options.seeds)}
        )
    tree = spec.model_copy(update=changes).model_dump()
    file = f"{options.to or given} with these options"
    return parse_promotion(tree, source=file), source or spec.study


def _training_seeds(given: list[int]) -> tuple[int, ...]:
    """One number is how many, several are the seeds themselves."""
    return tuple(range(given[0])) if len(given) == 1 else tuple(given)


def _promoted(options: argparse.Namespace, source: str | None) -> "tuple[Arm, int | None]":
    """The weights to promote, and the K that they were searched at, where they were."""
    from search.analysis.promotion import confirmed_arm, given_arm

    if options.weights is not None:
        return given_arm(options.weights), None
    if source is None:
        raise InputError(
            "no study says which weights to promote: name one as STUDY or as study: in the "
            "promotion file, or give --weights A,B"
        )
    options.study = options.study if options.to is not None else source
    study, spec = open_search(options)
    return confirmed_arm(study), spec.student.substeps


def _dry_run(spec: "PromotionSpec", workers: int | None) -> None:
    from search.spec.study_file import as_yaml
    from search.worker.cost import cost_lines

    print(as_yaml(spec), end="")
    print(f"# fingerprint {spec.fingerprint()}")
    for line in cost_lines(spec, arms=3, workers=workers):
        print(f"# {line}")


def _require_free(options: argparse.Namespace, url: str, name: str, folders: list[Path]) -> None:
    """Refuse folders of somebody else's before hours of work, not after them.

    Those that this promotion wrote before are left, or written anew once it has gone on.
    """
    from bdense.files import require_new
    from search.export import is_of

    if options.out is not None:
        for folder in folders:
            if not is_of(folder, name):
                require_new(folder)


def _hand_over(
    planned: "Planned",
    folder: Path,
    *,
    arm: str | None = None,
    nfe: int | None = None,
    kimg: float | None = None,
) -> None:
    """Export the promoted student, unless an earlier run did and nothing is new since."""
    from search.export import export_trial, is_current, promoted_row, put_aside

    if planned.left():
        raise InputError(f"{planned.headline()}; run the same command again to continue")
    number = promoted_row(planned, arm=arm, nfe=nfe, kimg=kimg)
    if is_current(folder, planned):
        print(f"model folder, written before: {folder}")
    else:
        put_aside(folder)
        for path in export_trial(planned, folder, number=number):
            print(f"model folder: {path}")
    print(f"draw images with it:   bdense sample {folder} --out samples.png")


def _refuse(options: argparse.Namespace, method: str, **given: object) -> None:
    """Options of the other method."""
    wrong = [f"--{name.replace('_', '-')}" for name, value in given.items() if value]
    if wrong:
        raise InputError(f"--method {method} has no {' and no '.join(wrong)}; drop that")
