"""The plan of a stage, which needs no torch."""

from dataclasses import dataclass

from bdense.knobs import Knobs, knob


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
