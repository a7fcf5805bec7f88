"""Students of SFD trained again: under other seeds, at another budget, for another NFE."""

from collections.abc import Collection

from search.spec.study_spec import PruningSpec, StudySpec
from search.study.arms import Planned, PlannedRow


def variant(spec: StudySpec, row: PlannedRow) -> StudySpec:
    """The study as a row trains in it: its own seeds, budget and NFE, all else alike.

    Its latents are of its seed too: a fresh seed has nothing in common with the search's.
    """
    seeds = spec.seeds.model_copy(update={"training": row.seed, "evaluation": row.seed})
    budget = spec.budget if row.kimg is None else spec.budget.model_copy(update={"kimg": row.kimg})
    student = spec.student if row.nfe is None else spec.student.model_copy(update={"nfe": row.nfe})
    # Nobody looks at it on its way: at a smaller budget there may be no room to.
    changed = {"seeds": seeds, "budget": budget, "student": student, "pruning": PruningSpec()}
    return spec.model_copy(update=changed)


def variants(planned: Planned, spec: StudySpec) -> list[StudySpec]:
    """Each spec that rows still to be run train in, once."""
    rows = {PlannedRow(arm=0, seed=r.seed, kimg=r.kimg, nfe=r.nfe) for r in planned.unfinished()}
    ordered = sorted(rows, key=lambda row: (row.nfe or 0, row.kimg or 0, row.seed))
    return [variant(spec, row) for row in ordered]


def fresh_seeds(spec: StudySpec, count: int, used: Collection[int] = ()) -> list[int]:
    """The lowest seeds that neither the search nor ``used`` have seen."""
    seen = {spec.seeds.training, spec.seeds.evaluation, *used}
    return [seed for seed in range(count + len(seen)) if seed not in seen][:count]
