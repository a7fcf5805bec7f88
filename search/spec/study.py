"""A study: what is distilled by which method, what is searched, how it is judged, what it costs.

One form for all methods, for searches and for given arms. A misspelt key is an error and a parsed
spec never changes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from bdense.data.prompts import PROMPTS
from bdense.errors import InputError
from bdense.execution import Precision
from bdense.knobs import KnobError, Knobs, knob, knobs_of
from bdense.weights.space import PLAIN, SearchSpace, WeightSpace
from search.errors import SpecError
from search.spec.command import COMMAND, NamedSpace
from search.spec.contents import fingerprint_of, flatten
from search.spec.distillation import DistillationWorkload
from search.spec.metric import Metric
from search.spec.plan import ArmsPlan, SearchPlan, read_plan
from search.spec.program import CommandWorkload
from search.spec.sections import (
    ConfirmSpec,
    EvaluationSpec,
    Facts,
    Member,
    ResourcesSpec,
    SeedsSpec,
    TeacherSpec,
    TrajectoriesSpec,
    as_plain,
)
from search.spec.workload import Workload

# Folders under the runs that all studies share (search.storage.engine, search.study.artifacts).
TAKEN_NAMES = ("artifacts", "cache")


@dataclass(frozen=True, slots=True, kw_only=True)
class StudySpec(Knobs):
    """A whole study."""

    name: str = knob(help="lower-case letters, digits and hyphens; also its folder under runs/")
    data: str | None = knob(
        None,
        "what a teacher is trained on and the FID's reference: a name, or folder:, zip:, idx: and "
        "a path; not needed where teacher.checkpoint and evaluation.reference are there and the "
        "method does not learn from data",
    )
    prompts: str | None = knob(
        None,
        f"{PROMPTS}, of a text-conditional teacher: each is as likely in every batch; a method "
        "that learns from images takes them for the captions of the data set's images, or of its "
        "classes, in their order",
    )
    teacher: TeacherSpec = knob(
        TeacherSpec(), "whose steps are distilled; must be given, but for method command"
    )
    method: Member = knob(
        help="a distillation method's name and its settings, or command and a program of yours"
    )
    weights: Member = knob(
        Member("normalised"),
        "a weight space's name and its settings; of method command each weight by its name",
    )
    plan: SearchPlan | ArmsPlan = knob(
        help="a search (trials, ..., or the word one-shot) or given arms (arms, ...)"
    )
    evaluation: EvaluationSpec = knob(EvaluationSpec(), "how students are judged")
    precision: Precision = knob(
        "float32",
        "number format of teacher, training and sampling: float32, bfloat16, or for a GPU tf32 "
        "or fast, which is bfloat16 compiled in NHWC order; features are always float32",
    )
    seeds: SeedsSpec = knob(SeedsSpec(), "seeds of a search")
    trajectories: TrajectoriesSpec = knob(TrajectoriesSpec(), "the teacher's trajectories")
    resources: ResourcesSpec = knob(ResourcesSpec(), "resources of a trial")
    keep_students: int = knob(3, "how many of a search's best students stay on the disk", low=1)
    confirm: ConfirmSpec = knob(ConfirmSpec(), "how a search's best is confirmed")
    # Written by search.spec.resolve, never by users: no knob.
    facts: Facts | None = None

    def __post_init__(self) -> None:
        Knobs.__post_init__(self)
        if self.name in TAKEN_NAMES:
            raise KnobError(
                "name",
                f"{self.name!r} is a folder under the runs that all studies share; choose another",
            )
        self.plan.check(self)
        self.workload.check()

    @classmethod
    def read(cls, tree: Mapping[str, Any], where: str = "") -> Self:
        """Read a study; the error has a line for each mistake."""
        values, problems = dict(tree), []
        facts = values.pop("facts", None)
        for name, known in knobs_of(cls).items():
            try:
                if name in values:
                    values[name] = given = _section(name, values[name])
                    if known.nests(given):
                        given = known.type.read_all(known.merged(given))
                    known.accept(given)
            except InputError as error:
                problems += str(SpecError.under(name, error)).splitlines()
        try:
            # Finds keys that are unknown or missing.
            if not problems or values.keys() - knobs_of(cls).keys():
                spec = super(StudySpec, cls).read_all(values, where)
                return spec if facts is None else replace(spec, facts=Facts.read(facts))
        except InputError as error:
            problems += str(error).splitlines()
        raise InputError("\n".join(dict.fromkeys(problems)))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, which ``read`` accepts."""
        plain: dict[str, Any] = as_plain(self)
        for name in self.workload.unused:
            del plain[name]
        return plain

    @property
    def workload(self) -> Workload:
        """What its rows train and are judged by."""
        if self.method.name == COMMAND:
            return CommandWorkload(self)
        return DistillationWorkload(self)

    @property
    def metric(self) -> Metric:
        """What rows are judged by."""
        return self.workload.metric

    @property
    def baselines(self) -> tuple[str, ...]:
        """Names of the baselines, the simplest first; each has an arm."""
        return self.workload.baselines

    def baseline_key(self, name: str) -> str:
        """A baseline's name in JSON: plain distillation is called as its method."""
        return self.method.name if name == PLAIN else name

    @property
    def space(self) -> SearchSpace:
        """Where weights are searched, read from ``weights``."""
        return self.workload.space

    @property
    def weight_space(self) -> WeightSpace:
        """``space`` of a distillation: that of its branch weights."""
        return DistillationWorkload(self).space

    def require_fitting(self, params: Mapping[str, Any]) -> None:
        """Raise an ``InputError`` for an arm's parameters that this study has no use for."""
        space, facts = self.workload.space_of(params), self.resolved
        space.require_fitting(params, facts.num_branches, facts.num_intervals)

    def with_images(self, images: int) -> Self:
        """This study with a number in place of ``evaluation.images: auto``."""
        if self.evaluation.images != "auto":
            return self
        return replace(self, evaluation=replace(self.evaluation, images=images))

    @property
    def is_search(self) -> bool:
        """Whether points are proposed, rather than arms given."""
        return isinstance(self.plan, SearchPlan)

    @property
    def baseline_seeds(self) -> list[int]:
        """Training seeds of a search's baselines, that of the trials first; else that one."""
        return self.seeds.following(self.plan.replicates)

    @property
    def search(self) -> SearchPlan:
        """The plan of a search."""
        assert isinstance(self.plan, SearchPlan)
        return self.plan

    @property
    def given(self) -> ArmsPlan:
        """The plan of given arms."""
        assert isinstance(self.plan, ArmsPlan)
        return self.plan

    @property
    def resolved(self) -> Facts:
        """The engine's facts, which every stored spec has."""
        assert self.facts is not None
        return self.facts

    @property
    def uses_data(self) -> bool:
        """Whether students, teacher or the FID's reference need the data set."""
        made = self.teacher.train is not None or self.evaluation.reference is None
        return made or (self.facts is not None and self.facts.needs_data)

    def conditions(self, contents: Mapping[str, str] | None = None) -> dict[str, Any]:
        """All that changes a row's FID, flat: ``section.key`` -> value.

        Trial count, bounds, sampler, pruner, mode of trajectories and resources may change, except
        the number of GPUs that share a batch. ``contents`` of None reads the files.
        """
        if contents is None:
            contents = self.workload.contents()
        kept = self.workload.conditions() | self.plan.conditions(self)
        if self.trajectories.mode == "recorded" and self.trajectories.dtype != "float32":
            kept["trajectories"] = {"dtype": self.trajectories.dtype}
        if self.resources.team > 1 and self.workload.has_students:
            kept["resources"] = {"gpus": self.resources.team}
        return {**flatten(kept), **contents}

    def fingerprint(self) -> str:
        """16 hex digits over ``conditions``."""
        return fingerprint_of(self.conditions())


def _section(name: str, given: Any) -> Any:  # noqa: ANN401  as YAML has it
    """``method``, ``weights`` and ``plan`` as their classes; other sections as given."""
    if (
        name == "weights"
        and isinstance(given, Mapping)
        and isinstance(given.get("name", {}), Mapping)  # a weight called name, which is refused
    ):
        return Member(NamedSpace.name, dict(given))
    if name in ("method", "weights"):
        return Member.of(given, name)
    return read_plan(given) if name == "plan" else given
