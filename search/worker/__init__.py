"""What a worker does with a row: from weights to a FID."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from search.spec.study import StudySpec
    from search.worker.trainer import Trainer


def trainer_of(spec: "StudySpec") -> "type[Trainer]":
    """What trains a study's rows; only what distils imports torch."""
    if spec.is_command:
        from search.worker.command import Command

        return Command
    from search.worker.distillation import Distillation

    return Distillation
