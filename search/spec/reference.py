"""The study file's reference, made from the declarations: ``python -m search.spec.reference``."""

from bdense.knobs import Knobs, knobs_of, reference
from bdense.methods import METHODS
from bdense.weights import WEIGHT_SPACES
from search.spec.study import (
    ArmsPlan,
    ConfirmSpec,
    EvaluationSpec,
    Member,
    ResourcesSpec,
    SearchPlan,
    SeedsSpec,
    StudySpec,
    TeacherSpec,
    TrajectoriesSpec,
)

_HEAD = """\
# The study file

[studies/digits-nfe2.yaml](../studies/digits-nfe2.yaml) is a whole study, and
[studies/promote-digits.yaml](../studies/promote-digits.yaml) one of given arms. A misspelt key is an error that names the
nearest known one. `bdense-search launch STUDY.yaml --dry-run` prints the file with every default and what it costs.
Files of the two older forms (`student` and `budget`; `chain` and `round`) are read, with a line that says how they are
written now.

What decides a number is the study's fingerprint: `data`, `teacher`, `method`, `evaluation` without `batch` and `metrics`,
`precision`, the name of the weight space, and the seeds. Once a row has started, a launch that differs in it is refused,
naming what differs. `plan`, bounds of `weights`, `resources` (but for the number of GPUs that share a batch),
`keep_students`, `confirm` and the mode of `trajectories` may change at any time.

Under Adam b changes nothing: the update is the same when the loss is scaled. So the digits study searches a alone; results
always store (a, b).

| file in studies/ | what it is for |
|---|---|
| `digits-nfe2`, `digits-learned`, `digits-pd`, `digits-consistency`, `promote-digits` | minutes on a laptop without a GPU; [results](results.md) |
| `fashion-mnist-nfe2`, `promote-fashion-mnist` | one to two hours on two CPU cores; [results](results.md) |
| `cifar10-nfe2` to `-nfe5`, `imagenet64-nfe2`, `-nfe3`, `ffhq-nfe2` | EDM's public teachers with SFD's hyperparameters, for GPUs |
| `promote-cifar10` | the paper's PD run, as far as it can be recovered, for GPUs |
| `cifar10-cpu`, `fashion-mnist-cpu` | check in minutes that everything runs on those images; their numbers mean nothing |

This page is made from the declarations in the code by `python -m search.spec.reference`.
"""
_SECTIONS: tuple[tuple[str, str, type[Knobs]], ...] = (
    ("The whole file", "", StudySpec),
    ("`teacher`", "Either `checkpoint` or `train`.", TeacherSpec),
    ("`plan` of a search", "", SearchPlan),
    ("`plan` of given arms", "", ArmsPlan),
    ("`evaluation`", "", EvaluationSpec),
    ("`seeds`", "", SeedsSpec),
    ("`trajectories`", "", TrajectoriesSpec),
    ("`resources`", "", ResourcesSpec),
    ("`confirm`", "", ConfirmSpec),
)


def page() -> str:
    """The whole reference, in Markdown."""
    parts = [_HEAD]
    for title, remark, section in _SECTIONS:
        parts += [f"## {title}\n", f"{remark}\n" if remark else "", _table(section)]
    for name in METHODS:
        method = METHODS[name]
        parts += [
            f"## `method: {{name: {name}, ...}}`\n",
            _first_line(method),
            _table(method.Config),
        ]
    for name in WEIGHT_SPACES:
        space = WEIGHT_SPACES[name]
        parts += [f"## `weights: {{name: {name}, ...}}`\n", _first_line(space), _table(space)]
    return "\n".join(part for part in parts if part)


def _table(section: type[Knobs]) -> str:
    """A section's settings; those that are sections of their own by name alone."""
    if section is not StudySpec:
        return reference(section)
    rows = ["| key | default | what it says |", "|---|---|---|"]
    for name, known in knobs_of(section).items():
        if name == "facts":
            continue
        default = "must be given" if known.required else _short(known.default)
        rows.append(f"| `{name}` | {default} | {known.help} |")
    return "\n".join(rows) + "\n"


def _short(default: object) -> str:
    if default is None:
        return "none"
    return f"`{default}`" if isinstance(default, str | int | Member) else "see below"


def _first_line(described: type) -> str:
    return f"{(described.__doc__ or '').splitlines()[0]}\n"


if __name__ == "__main__":
    import sys

    sys.stdout.write(page())
