"""``bdense export``: write a student as a folder that diffusers loads: a pipeline, or adapters."""

from bdense.errors import InputError
from bdense.knobs import KnobError
from bdense.models.diffusers_export import export_pipeline
from bdense.models.latents import draws_latents
from bdense.models.lora_export import export_lora
from bdense.models.store import load_stored
from bdense.verbs.options import ExportOptions
from bdense.verbs.sample import missing_pipeline


def export(own: ExportOptions) -> None:
    """Run the verb."""
    student, metadata = load_stored(own.student)
    if not student.samplers:
        raise InputError(f"{own.student} is a teacher; draw with its own pipeline instead")
    if own.pipeline is None and draws_latents(student, metadata):
        raise missing_pipeline(own.student)
    metadata.pop("identity", None)
    if own.lora:
        if own.pipeline is None:
            raise KnobError(
                "lora", f"is for a student of latents, and {own.student} draws pixels; drop it"
            )
        export_lora(own.out, student, metadata, teacher=own.pipeline)
    else:
        export_pipeline(own.out, student, metadata, teacher=own.pipeline)
    print(own.out)
