"""``confirm`` a search's best under fresh seeds, and ``transfer`` it to another study."""

import json

from bdense.errors import InputError
from bdense.knobs import KnobError
from search.analysis.comparison import compare
from search.analysis.confirmation import confirmation_of
from search.analysis.pilot import with_known_images
from search.analysis.plans import confirmation_arms, differing, transfer_arms
from search.analysis.recommendation import recommend
from search.api import run_confirmation
from search.run.launch import run_rows
from search.spec.file import read_spec, require_variants_in_child
from search.study.summary import headline
from search.verbs.common import open_search, show_rows, use_workers
from search.verbs.launch import dry_run
from search.verbs.options import ConfirmOptions, TransferOptions, Workers


def confirm(asked: ConfirmOptions, run: Workers) -> None:
    """Run the confirmation, and print its verdict."""
    workers = use_workers(run)
    study = open_search(asked)
    method = study.spec.confirm.method | ({"kimg": asked.kimg} if asked.kimg else {})
    require_variants_in_child(study.spec, [differing(study.spec, method)])
    usual = study.spec.confirm
    seeds, count = asked.seeds or usual.seeds, asked.candidates or usual.candidates
    if run.dry_run:
        if asked.json:
            raise KnobError("json", "is for the result, and `dry_run` has none; drop one of them")
        if (stored := confirmation_of(study)) is not None:
            print(f"# in the storage already: {headline(stored)}")
        asked_for = confirmation_arms(study, method=method, seeds=seeds, count=count)
        dry_run(asked_for.as_spec(), workers)
        return
    planned, found = run_confirmation(study, method, seeds=seeds, count=count, workers=workers)
    if asked.json and found is not None:
        print(json.dumps(found.as_dict()))
        return
    show_rows(planned)
    if found is None:
        raise InputError(f"{planned.name}: no candidate is complete under every seed; see above")
    print(*found.lines(), sep="\n")
    if (recommended := recommend(found.comparison)) is not None:
        print(recommended.text())
    if study.spec.workload.has_students:
        print(f"promote it:   bdense-search promote {study.name}")


def transfer(asked: TransferOptions, run: Workers) -> None:
    """Run the top weights under the other study's conditions, and compare them."""
    workers = use_workers(run)
    study = open_search(asked)
    to = with_known_images(study.url, read_spec(asked.to))
    arms = transfer_arms(study, to, top=asked.top, seeds=asked.seeds)
    if run.dry_run:
        dry_run(arms.as_spec(), workers)
        return
    planned = arms.store(study.url)
    run_rows(planned, workers)
    show_rows(planned)
    comparison = compare(planned)
    if not comparison.results:
        raise InputError(f"{planned.name}: no row is complete; see above")
    print(*comparison.table(), comparison.conditions_line(), sep="\n")
