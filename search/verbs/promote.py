"""``promote``: train a study's confirmed weights beside the baselines, and export the model."""

import functools

from search.analysis.comparison import comparison_rows, comparisons_of, teacher_of
from search.analysis.plans import arm_from
from search.promotion import Asked, Promotion
from search.spec.file import read_spec
from search.study.wording import align
from search.verbs.common import open_search, show_rows, use_workers
from search.verbs.launch import dry_run
from search.verbs.options import PromoteOptions, Workers


def promote(options: PromoteOptions, run: Workers) -> None:
    """Run the promotion, print its figures and export the model."""
    workers = use_workers(run)
    study, given = open_search(options), options.seeds
    asked = Asked(
        to=None if options.to is None else read_spec(options.to),
        weights=None if options.weights is None else arm_from(options.weights),
        # One number is their number, several are the seeds themselves.
        seeds=given[0] if given is not None and len(given) == 1 else given,
        nfe=options.nfe,
        kimg=options.kimg,
        arm=options.arm,
        out=options.out,
    )
    promotion = Promotion(study, asked)
    if run.dry_run:
        dry_run(promotion.planned_spec(), workers)
        return
    planned, arm = promotion.run(workers, remark=functools.partial(print, flush=True))
    show_rows(planned)
    if shown := comparisons_of(planned):
        print(
            *align(comparison_rows(shown, teacher_of(planned))),
            shown[0].conditions_line(),
            sep="\n",
        )
    for each in promotion.models(planned, arm):
        if each.recommended is not None:
            print(each.recommended.text())
        print(each.model.text())
        if each.is_new:
            print(*(f"model folder: {path}" for path in each.model.paths), sep="\n")
        else:
            print(f"model folder, written before: {each.model.folder}")
        print(f"draw images with it:   bdense sample {each.model.folder} --out samples.png")
