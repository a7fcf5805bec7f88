"""A promotion's result: FID over the number of steps, for each arm, as a table and a picture.

The paper's figure 2, with its spread. Reads the storage alone.
"""

from typing import Any

from search.analysis.comparison import (
    ArmResult,
    Comparison,
    compare,
    difference_text,
    fid_line,
)
from search.report.charts import Chart
from search.report.plots import fid_over_steps
from search.spec.promotion_spec import PromotionSpec
from search.study.arms import Planned
from search.study.wording import align

# What a FID in a model card is told with.
_CARD_CONDITIONS = ("images", "extractor", "extractor_sha256", "reference", "reference_images")


def by_steps(planned: Planned) -> dict[int, Comparison]:
    """The complete rows compared at each number of steps, going down; not the teacher's."""
    chain = planned.spec(PromotionSpec).chain
    rounds = {steps: compare(planned, steps=steps) for steps in chain.steps}
    # At the teacher's own number of steps there is a round only where one converts it.
    return {steps: found for steps, found in rounds.items() if found.results}


def teacher_fid(planned: Planned) -> dict[str, Any] | None:
    """The FID at the chain's first number of steps, the same for all rows."""
    for trial in planned.complete():
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
            pairs = [
                difference_text(comparison.against(result, other))
                for other in (comparison.plain, comparison.uniform)
            ]
            cells = (str(steps), result.arm.name, f"{found.mean:.3f}", found.error_text())
            rows.append((*cells, str(found.n), *pairs))
    return rows


def fid_table(planned: Planned) -> list[dict[str, Any]]:
    """The same as rows for a model card."""
    table = []
    if (teacher := teacher_fid(planned)) is not None:
        told = {"steps": teacher["nfe"], "arm": "teacher", "fid": teacher["value"]}
        alike = {key: teacher[key] for key in _CARD_CONDITIONS}
        table.append({**told, **alike, "evaluation_seed": teacher["seeds"]["evaluation"]})
    for steps, comparison in by_steps(planned).items():
        for result in comparison.results:
            latents = result.conditions["seeds"]["evaluation"]
            seeds = {"training_seeds": seeds_text(result), "evaluation_seed": latents}
            table.append({"steps": steps, **card_row(result), **seeds})
    return table


def card_row(result: ArmResult) -> dict[str, Any]:
    """An arm's FID as a model card tells it, but for where and under which seeds."""
    found = result.summary()
    return {
        "arm": result.arm.name,
        "fid": found.mean,
        "std_err": found.standard_error,
        "n": found.n,
        **{key: result.conditions[key] for key in _CARD_CONDITIONS},
    }


def seeds_text(result: ArmResult) -> str:
    """The training seeds that an arm was measured under."""
    return " ".join(map(str, sorted(result.fids)))


def chain_chart(planned: Planned) -> Chart:
    """FID over steps, a line for each arm, bars of one standard error."""
    return fid_over_steps(by_steps(planned), teacher_fid(planned), planned.name)
