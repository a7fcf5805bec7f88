"""A promotion's result: FID over the number of steps, for each arm, as a table and a picture.

The paper's figure 2, with its spread. Reads the storage alone.
"""

from typing import Any

from search.judging.comparison import (
    Comparison,
    compare,
    complete_rows,
    difference_text,
    fid_line,
)
from search.records.planned import Planned
from search.records.standing import align
from search.showing.charts import Chart
from search.showing.figures import fid_over_steps
from search.specs.promotion_spec import PromotionSpec

# What a FID in a model card is told with.
CARD_CONDITIONS = ("images", "extractor", "extractor_sha256", "reference", "reference_images")


def chain_steps(spec: PromotionSpec) -> list[int]:
    """N of the teacher, then of each round's student, going down."""
    steps = [spec.chain.first]
    while steps[-1] > spec.chain.last:
        steps.append(steps[-1] // spec.chain.substeps)
    return steps


def by_steps(planned: Planned) -> dict[int, Comparison]:
    """The complete rows compared at each number of steps, going down; not the teacher's."""
    spec = PromotionSpec.model_validate_json(planned.spec_json)
    rounds = {steps: compare(planned, steps=steps) for steps in chain_steps(spec)}
    # At the teacher's own number of steps there is a round only where one converts it.
    return {steps: found for steps, found in rounds.items() if found.results}


def teacher_fid(planned: Planned) -> dict[str, Any] | None:
    """The FID at the chain's first number of steps, the same for all rows."""
    for trial in complete_rows(planned):
        found: dict[str, Any] = trial.user_attrs["teacher_fid"]
        return found
    return None


def chain_table(planned: Planned) -> str:
    """For people: a line for each number of steps and arm."""
    return "\n".join([*align(chain_rows(planned)), *chain_conditions(planned)])


def chain_conditions(planned: Planned) -> list[str]:
    """What the chain's FIDs have in common, once there are any."""
    return [fid_line(found.results[0].conditions) for found in by_steps(planned).values()][:1]


def chain_rows(planned: Planned) -> list[tuple[str, ...]]:
    """A header and the table's lines as cells."""
    rounds = by_steps(planned)
    header = ("steps", "", "mean", "s.e.", "seeds", "vs plain", "vs uniform")
    rows: list[tuple[str, ...]] = [header]
    if (teacher := teacher_fid(planned)) is not None:
        rows.append((str(teacher["nfe"]), "teacher", f"{teacher['value']:.3f}", *["-"] * 4))
    for steps, comparison in rounds.items():
        for result in comparison.results:
            found = result.summary()
            error = f"{found.standard_error:.3f}" if found.n > 1 else "-"
            pairs = [
                difference_text(comparison.against(result, other))
                for other in (comparison.plain, comparison.uniform)
            ]
            cells = (str(steps), result.arm.name, f"{found.mean:.3f}", error, str(found.n))
            rows.append((*cells, *pairs))
    return rows


def fid_table(planned: Planned) -> list[dict[str, Any]]:
    """The same as rows for a model card."""
    table = []
    if (teacher := teacher_fid(planned)) is not None:
        told = {"steps": teacher["nfe"], "arm": "teacher", "fid": teacher["value"]}
        alike = {key: teacher[key] for key in CARD_CONDITIONS}
        table.append({**told, **alike, "evaluation_seed": teacher["seeds"]["evaluation"]})
    for steps, comparison in by_steps(planned).items():
        for result in comparison.results:
            found, first = result.summary(), result.conditions
            table.append(
                {
                    "steps": steps,
                    "arm": result.arm.name,
                    "fid": found.mean,
                    "std_err": found.standard_error if found.n > 1 else None,
                    "n": found.n,
                    **{key: first[key] for key in CARD_CONDITIONS},
                    "training_seeds": " ".join(map(str, sorted(result.fids))),
                    "evaluation_seed": first["seeds"]["evaluation"],
                }
            )
    return table


def chain_chart(planned: Planned) -> Chart:
    """FID over steps, a line for each arm, bars of one standard error."""
    return fid_over_steps(by_steps(planned), teacher_fid(planned), planned.name)
