"""Distillation methods, by name."""

from typing import TYPE_CHECKING

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
