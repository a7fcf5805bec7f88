"""Distillation methods, by name, and the plan of their stages; importing this loads no torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bdense.knobs import Knobs, knob
from bdense.registry import Registry

if TYPE_CHECKING:
    from bdense.methods.method import Method

# Knobs of any method. A run from before one of them is a run at this value, its default.
YOUNGER = {
    "guidance_teacher": 1.0,
    "guidance_student": 1.0,
    "accumulate": 1,
    "lora_rank": 0,
    "lora_targets": [],
}

METHODS: "Registry[type[Method]]" = Registry(
    "method",
    "bdense.methods",
    {
        "sfd": "bdense.methods.sfd:SFD",
        "progressive": "bdense.methods.progressive:Progressive",
        "consistency": "bdense.methods.consistency:Consistency",
        "epd": "bdense.methods.epd:EPDMethod",
    },
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan(Knobs):
    """What is known of a stage without its teacher.

    Attributes:
        name: What its files are called, such as ``00032``; empty where the method has one stage.
        label: For people, such as ``2 NFE`` or ``32 steps``.
        num_updates: Iterations of the training loop.
        nfe: Network evaluations an image costs the student; the fewest, where it serves several.
            Stages of one method differ in it: results are kept by NFE.
        branched: Whether it uses the branch weights; else it has one branch of weight 1.
    """

    name: str = knob()
    label: str = knob()
    num_updates: int = knob()
    nfe: int = knob()
    branched: bool = knob(True)
