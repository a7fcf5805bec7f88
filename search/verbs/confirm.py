"""``confirm`` a search's best under fresh seeds, and ``transfer`` it to another study."""

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
        "train a search's best points and both baselines again under fresh seeds",
        "bdense-search confirm digits-nfe2 --seeds 5",
        _confirm,
        json_keys="winner, kimg, ended, arms",
    )
    parser.add_argument(
        "--kimg",
        metavar="X",
        type=thousands,
        help="training length of each student in thousands of images: the one that the winner "
        "will be used at, as the best weights depend on it (default: confirm.method of the "
        "study, else the search's own)",
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
    from search.analysis.confirmation import verdict
    from search.analysis.plans import differing, plan_confirmation
    from search.run.gpus import use_gpus
    from search.run.launch import run_rows
    from search.spec.file import require_variants

    use_gpus(options.gpus)
    study = open_search(options)
    asked = study.spec.confirm
    method = asked.method | ({"kimg": options.kimg} if options.kimg else {})
    require_variants(study.spec, [differing(study.spec, method)])
    planned = plan_confirmation(
        study,
        method=method,
        seeds=options.seeds or asked.seeds,
        count=options.candidates or asked.candidates,
    )
    run_rows(planned, options.workers)
    found = verdict(study)
    if options.json and found is not None:
        print(json.dumps(found.as_dict()))
        return
    show_rows(planned)
    if found is None:
        raise InputError(f"{planned.name}: no candidate is complete under every seed; see above")
    print(*found.lines(), sep="\n")
    print(f"promote it:   bdense-search promote {study.name} --to STUDY.yaml")


def _transfer(options: argparse.Namespace) -> None:
    from search.analysis.comparison import compare
    from search.analysis.plans import plan_transfer
    from search.run.gpus import use_gpus
    from search.run.launch import run_rows
    from search.spec.file import read_spec

    use_gpus(options.gpus)
    study = open_search(options)
    to = read_spec(options.to)
    planned = plan_transfer(study, to, top=options.top, seeds=options.seeds)
    run_rows(planned, options.workers)
    show_rows(planned)
    comparison = compare(planned)
    if not comparison.results:
        raise InputError(f"{planned.name}: no row is complete; see above")
    print(*comparison.table(), comparison.conditions_line(), sep="\n")
