"""What a search found, at work: ``confirm``, ``promote``, ``transfer`` and ``export`` it."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bdense.command import Verbs
from bdense.errors import InputError
from search.storage import resolve_storage_url, runs_folder
from search.verbs.common import (
    add_workers,
    numbers,
    open_search,
    positive,
    positive_float,
    storage_verb,
    study_name,
    study_verb,
)

if TYPE_CHECKING:
    from search.planned import Arm, Planned
    from search.promotion_spec import PromotionSpec


def add_confirm(verbs: Verbs) -> None:
    """``confirm`` and its options."""
    parser = study_verb(
        verbs,
        "confirm",
        "train the most promising weights and both baselines again under fresh seeds",
        "bdense-search confirm digits-nfe2",
        _confirm,
        json_keys="winner, kimg, ended, arms",
    )
    parser.add_argument(
        "--kimg",
        metavar="X",
        type=positive_float,
        help="budget of each, that which the winner will be used at, as the best weights move "
        "with it (default: confirm.kimg of the study, else the search's own)",
    )
    parser.add_argument(
        "--seeds", metavar="N", type=positive, help="fresh seeds (default: confirm.seeds, 3)"
    )
    parser.add_argument(
        "--candidates",
        metavar="N",
        type=positive,
        help="points to try, by the posterior mean of a Gaussian process over all evaluations "
        "(default: confirm.candidates, 3)",
    )
    add_workers(parser)


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
        help="progressive distillation (default), or SFD at full budget for each --nfe",
    )
    parser.add_argument(
        "--weights",
        metavar="A,B",
        help="log w_k = a k + b (default: the study's confirmed winner)",
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
        help="pd: training seeds, as in 0,1,2 (default: the file's); sfd: how many fresh ones "
        "(default: 3)",
    )
    parser.add_argument(
        "--nfe", metavar="N", type=numbers, help="sfd: as in 2,3 (default: the study's)"
    )
    parser.add_argument(
        "--kimg",
        metavar="X",
        type=positive_float,
        help="sfd: budget of each student (default: confirm.kimg, else the search's own)",
    )
    parser.add_argument("--name", help="pd: of the promotion (default: the file's)")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="model folder (default: model in the run's folder)"
    )
    add_workers(parser)
    parser.add_argument(
        "-n",
        "--dry-run",
        action="store_true",
        help="pd: print the resolved promotion, its fingerprint and its cost; start nothing",
    )


def add_transfer(verbs: Verbs) -> None:
    """``transfer`` and its options."""
    parser = study_verb(
        verbs,
        "transfer",
        "measure a study's top weights under the conditions of another",
        "bdense-search transfer digits-nfe2 --to studies/fashion-mnist-nfe2.yaml --top 5",
        _transfer,
    )
    parser.add_argument(
        "--to", metavar="STUDY2.yaml", type=Path, required=True, help="the other study's file"
    )
    parser.add_argument(
        "--top", metavar="N", type=positive, default=5, help="how many (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds", metavar="N", type=positive, default=3, help="fresh seeds (default: %(default)s)"
    )
    add_workers(parser)


def add_export(verbs: Verbs) -> None:
    """``export`` and its options."""
    parser = study_verb(
        verbs,
        "export",
        "write a kept student as a model folder: weights, config, card, samples",
        "bdense-search export digits-nfe2 model",
        _export,
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder to write, a new one")
    parser.add_argument(
        "--trial",
        metavar="N",
        type=int,
        help="whose student (default: the confirmed winner's, else the best; of a promotion the "
        "promoted weights' with the first seed)",
    )
    parser.add_argument(
        "--steps", metavar="N", type=positive, help="of a promotion's chain (default: the last)"
    )


def _confirm(options: argparse.Namespace) -> None:
    import json

    from search.confirmation import plan_confirmation, verdict
    from search.launch import run_planned
    from search.promotion import variants
    from search.report import failed_rows

    study, spec = open_search(options)
    asked = spec.confirm
    planned = plan_confirmation(
        study,
        spec,
        kimg=options.kimg or asked.kimg or spec.budget.kimg,
        seeds=options.seeds or asked.seeds,
        count=options.candidates or asked.candidates,
    )
    run_planned(planned, variants(planned, spec), options.workers)
    found = verdict(study)
    if found is None:
        raise InputError(_nothing(planned))
    if options.json:
        print(json.dumps(found.as_dict()))
        return
    print(planned.headline())
    for line in [*failed_rows(planned.ledger, "row"), *found.lines()]:
        print(line)
    print(f"promote it:   bdense-search promote {study.name} --to PROMOTION.yaml")


def _promote(options: argparse.Namespace) -> None:
    if options.method == "sfd":
        _promote_sfd(options)
    else:
        _promote_pd(options)


def _promote_pd(options: argparse.Namespace) -> None:
    from search.chain_report import chain_table
    from search.launch import check_apart, run_planned
    from search.promotion import plan_progressive, said_of_weights
    from search.report import failed_rows

    _refuse(options, "pd", nfe=options.nfe, kimg=options.kimg)
    spec, source = _promotion(options)
    check_apart(spec)
    if options.dry_run:
        _dry_run(spec)
        return
    out = _out(options, spec.name)
    arm, searched_at = _promoted(options, source)
    print(said_of_weights(arm, searched_at, spec.chain.substeps), flush=True)
    url = resolve_storage_url(options.storage)
    planned = plan_progressive(url, spec, arm, of=source, seeds=spec.seeds.training)
    run_planned(planned, [spec], options.workers)
    print(planned.headline())
    for line in failed_rows(planned.ledger, "row"):
        print(line)
    print(chain_table(planned))
    _hand_over(planned, out, [None])


def _promote_sfd(options: argparse.Namespace) -> None:
    from search.comparison import compare
    from search.launch import run_planned
    from search.promotion import SFD_SUFFIX, confirmed_arm, given_arm, plan_full_budget, variants
    from search.report import failed_rows

    _refuse(
        options,
        "sfd",
        to=options.to,
        name=options.name,
        weights_space=options.weights_space,
        dry_run=options.dry_run,
    )
    study, spec = open_search(options)
    out = _out(options, study.name + SFD_SUFFIX)
    arm = given_arm(options.weights) if options.weights else confirmed_arm(study)
    seeds = options.seeds or [3]
    if len(seeds) > 1:
        raise InputError(f"--seeds {seeds}: with --method sfd it is how many fresh ones; give one")
    nfes = options.nfe or [spec.student.nfe]
    kimg = options.kimg or spec.confirm.kimg or spec.budget.kimg
    planned = plan_full_budget(study, spec, arm, nfes=nfes, kimg=kimg, seeds=seeds[0])
    run_planned(planned, variants(planned, spec), options.workers)
    print(planned.headline())
    for line in failed_rows(planned.ledger, "row"):
        print(line)
    for nfe in nfes:
        comparison = compare(planned, kimg=float(kimg), nfe=nfe)
        if comparison.results:
            print("\n".join([*comparison.table(), comparison.conditions_line()]))
    _hand_over(planned, out, nfes)


def _transfer(options: argparse.Namespace) -> None:
    from search.comparison import compare
    from search.launch import check_apart, run_planned
    from search.promotion import variants
    from search.report import failed_rows
    from search.study_file import read_spec
    from search.transfer import plan_transfer

    study, spec = open_search(options)
    to = read_spec(options.to)
    check_apart(to)
    planned = plan_transfer(study, spec, to, top=options.top, seeds=options.seeds)
    run_planned(planned, variants(planned, to), options.workers)
    print(planned.headline())
    for line in failed_rows(planned.ledger, "row"):
        print(line)
    comparison = compare(planned)
    if not comparison.results:
        raise InputError(_nothing(planned))
    print("\n".join([*comparison.table(), comparison.conditions_line()]))


def _export(options: argparse.Namespace) -> None:
    from bdense.files import require_new
    from search.export import export_trial
    from search.records import open_record

    require_new(options.folder)
    record = open_record(resolve_storage_url(options.storage), study_name(options.study))
    for path in export_trial(record, options.folder, number=options.trial, steps=options.steps):
        print(path)


def _promotion(options: argparse.Namespace) -> "tuple[PromotionSpec, str | None]":
    """The promotion as the options change it, and the search its weights come from."""
    from search.promotion_spec import PromotionSpec
    from search.study_file import read_any

    given, source = Path(options.study), None
    found = read_any(given) if given.suffix in (".yaml", ".yml") else None
    spec = found
    if options.to is not None:
        spec, source = read_any(options.to), study_name(options.study)
        if isinstance(found, PromotionSpec):
            raise InputError(f"both STUDY {given} and --to {options.to} are promotions; drop one")
    if not isinstance(spec, PromotionSpec):
        raise InputError(
            "progressive distillation needs a teacher and a chain of steps, which a promotion "
            "file gives: add --to PROMOTION.yaml, such as studies/promote-digits.yaml, or take "
            "--method sfd"
        )
    changes: dict[str, object] = {}
    if options.name:
        changes["name"] = options.name
    if options.weights_space:
        changes["weights_space"] = options.weights_space
    if options.seeds:
        changes["seeds"] = spec.seeds.model_copy(update={"training": tuple(options.seeds)})
    tree = spec.model_copy(update=changes).model_dump()
    return PromotionSpec.model_validate(tree), source or spec.study


def _promoted(options: argparse.Namespace, source: str | None) -> "tuple[Arm, int | None]":
    """The weights to promote, and the K that they were searched at, where they were."""
    from search.promotion import confirmed_arm, given_arm

    if options.weights:
        return given_arm(options.weights), None
    if source is None:
        raise InputError(
            "no study says which weights to promote: name one as STUDY or as study: in the "
            "promotion file, or give --weights A,B"
        )
    options.study = options.study if options.to is not None else source
    study, spec = open_search(options)
    return confirmed_arm(study), spec.student.substeps


def _dry_run(spec: "PromotionSpec") -> None:
    from search.chain_estimate import estimate_promotion
    from search.study_file import as_yaml

    print(as_yaml(spec), end="")
    print(f"# fingerprint {spec.fingerprint()}")
    for line in estimate_promotion(spec, arms=3).lines():
        print(f"# {line}")


def _out(options: argparse.Namespace, name: str) -> Path:
    """Where the model goes; refused before hours of work, not after them."""
    from bdense.files import require_new

    if options.out is not None:
        require_new(options.out)
        return Path(options.out)
    return runs_folder() / name / "model"


def _hand_over(planned: "Planned", out: Path, nfes: Sequence[int | None]) -> None:
    """Export the promoted student, or one for each NFE, unless an earlier run did."""
    from search.export import export_trial, row_of_nfe

    if planned.left():
        raise InputError(f"{planned.headline()}; the same command carries on")
    for nfe in nfes:
        folder = out if len(nfes) == 1 else out / f"nfe-{nfe}"
        if folder.exists():
            print(f"model folder, written before: {folder}")
            continue
        number = None if nfe is None else row_of_nfe(planned, nfe)
        for path in export_trial(planned, folder, number=number, steps=None):
            print(f"model folder: {path}")
    print(f"draw images with it:   bdense sample {folder} --out samples.png")


def _refuse(options: argparse.Namespace, method: str, **given: object) -> None:
    """Options of the other method."""
    wrong = [f"--{name.replace('_', '-')}" for name, value in given.items() if value]
    if wrong:
        raise InputError(f"--method {method} has no {' and no '.join(wrong)}; drop that")


def _nothing(planned: "Planned") -> str:
    from search.report import failed_rows

    return "\n".join(
        [*failed_rows(planned.ledger, "row"), f"{planned.headline()}: nothing to show"]
    )
