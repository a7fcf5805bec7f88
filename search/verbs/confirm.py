"""``confirm`` what a search found, and ``transfer`` it to another study's conditions."""

import argparse
import json
from pathlib import Path

from bdense.command import Verbs
from bdense.errors import InputError
from search.verbs.common import (
    add_workers,
    open_search,
    positive,
    seeds_to_pair,
    show_rows,
    study_verb,
    thousands,
)


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
        type=thousands,
        help="training length of each student in thousands of images: that at which the winner "
        "will be used, as the best weights depend on it (default: confirm.kimg of the study, else "
        "the search's own)",
    )
    parser.add_argument(
        "--seeds",
        metavar="N",
        type=seeds_to_pair,
        help="number of fresh seeds, 3 or more (default: confirm.seeds, 3)",
    )
    parser.add_argument(
        "--candidates",
        metavar="N",
        type=positive,
        help="number of points to try, those that a Gaussian process over all evaluations ranks "
        "first by its posterior mean (default: confirm.candidates, 3)",
    )
    add_workers(parser)


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
        "--top",
        metavar="N",
        type=positive,
        default=5,
        help="weights to measure, the best first (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds",
        metavar="N",
        type=positive,
        default=3,
        help="number of fresh seeds (default: %(default)s)",
    )
    add_workers(parser)


def _confirm(options: argparse.Namespace) -> None:
    from search.analysis.confirmation import plan_confirmation, verdict
    from search.analysis.retraining import variants
    from search.run.gpus import use_gpus
    from search.run.launch import run_planned

    use_gpus(options.gpus)
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
    if options.json and found is not None:
        print(json.dumps(found.as_dict()))
        return
    show_rows(planned)
    if found is None:
        raise InputError(f"{planned.name}: no candidate is complete under every seed; see above")
    print(*found.lines(), sep="\n")
    print(f"promote it:   bdense-search promote {study.name} --to PROMOTION.yaml")


def _transfer(options: argparse.Namespace) -> None:
    from search.analysis.comparison import compare
    from search.analysis.retraining import variants
    from search.analysis.transfer import plan_transfer
    from search.run.gpus import use_gpus
    from search.run.launch import check_apart, run_planned
    from search.spec.study_file import read_spec

    use_gpus(options.gpus)
    study, spec = open_search(options)
    to = read_spec(options.to)
    check_apart(to)
    planned = plan_transfer(study, spec, to, top=options.top, seeds=options.seeds)
    run_planned(planned, variants(planned, to), options.workers)
    show_rows(planned)
    comparison = compare(planned)
    if not comparison.results:
        raise InputError(f"{planned.name}: no row is complete; see above")
    print(*comparison.table(), comparison.conditions_line(), sep="\n")
