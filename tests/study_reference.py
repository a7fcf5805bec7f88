"""The tables of docs/study.md, made from the declarations; tests/test_knobs.py compares them."""

from bdense.knob_options import reference
from bdense.knobs import Knobs, knobs_of
from bdense.methods import METHODS
from bdense.weights import WEIGHT_SPACES
from search.spec.command import CommandConfig, NamedWeight
from search.spec.plan import ArmsPlan, SearchPlan
from search.spec.sections import (
    ConfirmSpec,
    EvaluationSpec,
    Member,
    ResourcesSpec,
    SeedsSpec,
    TeacherSpec,
    TrajectoriesSpec,
)
from search.spec.study import StudySpec

_SECTIONS: tuple[tuple[str, str, type[Knobs]], ...] = (
    ("The whole file", "", StudySpec),
    ("`teacher`", "One of `checkpoint`, `train` and `recipe`.", TeacherSpec),
    ("`plan` of a search", "", SearchPlan),
    ("`plan` of given arms", "", ArmsPlan),
    ("`evaluation`", "", EvaluationSpec),
    ("`seeds`", "", SeedsSpec),
    ("`trajectories`", "", TrajectoriesSpec),
    ("`resources`", "", ResourcesSpec),
    ("`confirm`", "", ConfirmSpec),
)


def page() -> str:
    """Every setting of a study, in Markdown."""
    parts = []
    for title, remark, section in _SECTIONS:
        parts += [f"## {title}\n", f"{remark}\n" if remark else "", _table(section)]
    for name in METHODS:
        method = METHODS[name]
        parts += [
            f"## `method: {{name: {name}, ...}}`\n",
            _first_line(method),
            _table(method.Config),
        ]
    parts += [
        "## `method: {name: command, ...}`\n",
        f"{_first_line(CommandConfig)}\nSee [any-trainer.md](any-trainer.md).\n",
        _table(CommandConfig),
        "## `weights: {NAME: {...}, ...}` of method command\n",
        _first_line(NamedWeight),
        _table(NamedWeight),
    ]
    for name in WEIGHT_SPACES:
        space = WEIGHT_SPACES[name]
        parts += [f"## `weights: {{name: {name}, ...}}`\n", _first_line(space), _table(space)]
    return "\n".join(part for part in parts if part)


def _table(section: type[Knobs]) -> str:
    """A section's settings; of those that are sections themselves only the name and the help."""
    if section is not StudySpec:
        return reference(section)
    rows = ["| key | default | what it says |", "|---|---|---|"]
    for name, known in knobs_of(section).items():
        default = "must be given" if known.required else _short(known.default)
        rows.append(f"| `{name}` | {default} | {known.help} |")
    return "\n".join(rows) + "\n"


def _short(default: object) -> str:
    if default is None:
        return "none"
    return f"`{default}`" if isinstance(default, str | int | Member) else "see below"


def _first_line(described: type) -> str:
    return f"{(described.__doc__ or '').splitlines()[0]}\n"
