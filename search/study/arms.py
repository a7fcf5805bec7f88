"""Arms: given branch weights, each trained under one or more seeds."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from optuna.distributions import BaseDistribution, IntDistribution

from bdense.weights.space import BASELINE, PLAIN
from search.spec.plan import ONE_SHOT_PLAN, ArmsPlan
from search.spec.study import StudySpec

# The parameters of an arm that is a one-shot training, by this key.
ONE_SHOT = "one_shot"

# A row's parameters: its arm, training seed and variant of the method's settings.
ROW_SPACE: Mapping[str, BaseDistribution] = {
    "arm": IntDistribution(0, 10**6),
    "seed": IntDistribution(0, 2**31 - 1),
    "variant": IntDistribution(0, 10**6),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OneShotTask:
    """A search's one-shot training.

    Attributes:
        length: Training length, in trial lengths.
        points: Number of points of the space at which the student is measured.
        box: Lowest and highest value of each coordinate, in which they lie.
    """

    length: float
    points: int
    box: dict[str, list[float]]

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> Self | None:
        """Read an arm's parameters; None for other arms."""
        return cls(**params[ONE_SHOT]) if ONE_SHOT in params else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One set of branch weights, or a search's one-shot training for all of them.

    Attributes:
        name: For people; equal arms may have different ones.
        params: ``baseline`` (plain, uniform or defaults), or those of a weight space, such as a
            and b; or ``one_shot``, the fields of a ``OneShotTask``.
        trial: Number of the search's trial it comes from, if any.
    """

    name: str = field(compare=False)
    params: dict[str, Any]
    trial: int | None = None

    @property
    def baseline(self) -> str | None:
        """``plain``, ``uniform`` or ``defaults``; None for others."""
        return self.params.get(BASELINE)


def baseline_arms(spec: StudySpec) -> list[Arm]:
    """The arms that a study compares with, in the order of ``StudySpec.baselines``."""
    # Of their own space: that of the study may not fit given arms, which do not use it.
    known = {name: {BASELINE: name} for name in spec.baselines}
    labels = {name: spec.workload.space_of(p).label(p) for name, p in known.items()}
    if PLAIN in labels:
        labels[PLAIN] = f"plain {spec.resolved.title}"
    return [Arm(name=label, params={BASELINE: name}) for name, label in labels.items()]


def one_shot_arm(spec: StudySpec) -> Arm | None:
    """A search's one-shot training; None where its plan has none."""
    asked = spec.plan.one_shot
    if asked is None:
        return None
    space = spec.weight_space
    box = {name: [e.low, e.high] for name, e in zip(space.axes, space.box, strict=True)}
    points = asked.points or (13 if len(box) == 1 else 16 * len(box))
    task = OneShotTask(length=asked.length, points=points, box=box)
    return Arm(name=ONE_SHOT_PLAN, params={ONE_SHOT: asdict(task)})


def arms_study(spec: StudySpec, name: str) -> StudySpec:
    """A study of given arms under a study's conditions, each seed on latents of its own."""
    plan = ArmsPlan(arms=(), seeds=(0,), latents="fresh")
    return replace(spec, name=name, plan=plan)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmRow:
    """One training of an arm, whose parameters in the database are these fields.

    Attributes:
        arm: Index of the arm.
        seed: Training seed.
        variant: Index of the changes of the method's settings.
    """

    arm: int
    seed: int
    variant: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a worker trains and measures for one row.

    Attributes:
        params: Of the weights: an arm's or a sampled point's.
        seed: Training seed.
        latents: Seed of the latents of the evaluation.
        variant: Settings of the method that differ from the study's.
        arm: Name of a given arm.
    """

    params: Mapping[str, Any]
    seed: int
    latents: int
    variant: Mapping[str, Any] = field(default_factory=dict)
    arm: str | None = None

    def identity(self, fingerprint: str) -> dict[str, Any]:
        """What the row's folder stores to be known again; the fingerprint is the study's."""
        identity = asdict(self)
        del identity["arm"]
        return {**identity, "fingerprint": fingerprint}
