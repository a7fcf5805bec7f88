"""A study: what is distilled by which method, what is searched, how it is judged, what it costs.

One form for all methods, for searches and for given arms. A misspelt key is an error and a parsed
spec never changes.
"""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from bdense import NUMERICS
from bdense.data.prompts import PROMPTS
from bdense.errors import InputError
from bdense.execution import Precision
from bdense.files import sha256_file, sha256_model
from bdense.knobs import KnobError, Knobs, knob, knobs_of
from bdense.methods import YOUNGER
from bdense.models.zoo import PUBLIC_MODELS, REFERENCES
from bdense.weights import WEIGHT_SPACES, space_of
from bdense.weights.space import PLAIN, UNIFORM, SearchSpace, WeightSpace
from search.errors import SpecError
from search.spec.command import (
    COMMAND,
    DEFAULTS,
    CommandConfig,
    NamedSpace,
)
from search.spec.contents import content_of, content_of_prompts, fingerprint_of, flatten
from search.spec.metric import Metric
from search.spec.sections import (
    ONE_SHOT_PLAN,
    ArmsPlan,
    ConfirmSpec,
    EvaluationSpec,
    Facts,
    Member,
    ResourcesSpec,
    SearchPlan,
    SeedsSpec,
    TeacherSpec,
    TrajectoriesSpec,
)

# Folders under the runs that all studies share (search.storage.engine, search.study.artifacts).
TAKEN_NAMES = ("artifacts", "cache")

# A study from before a knob is a study at its default, under the same fingerprint.
_YOUNGER = {"tail": None, **YOUNGER}

# Sections and settings that say how students are distilled and judged.
_NOT_FOR_PROGRAMS = (
    "data",
    "prompts",
    "teacher",
    "evaluation",
    "precision",
    "trajectories",
    "keep_students",
)
_RESOURCES = (
    "deterministic",
    "compile",
    "compile_mode",
    "channels_last",
    "gradient_checkpointing",
    "log",
)
_PLAN = ("one_shot", "at", "images", "stop")


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
        "number format of teacher, training and sampling; features are always float32",
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
        known = self.baselines
        for arm in () if self.is_search else self.given.arms:
            if isinstance(arm, str) and arm not in known:
                raise KnobError(
                    "plan.arms", f"must be {', '.join(known)} or a mapping, got {arm!r}"
                )
        if self.evaluation.images == "auto" and not self.is_search:
            raise KnobError(
                "evaluation.images", "auto is settled by the launch of a search; give a number"
            )
        if self.is_command:
            _ = self.program  # refuses its settings
            self._refuse_foreign()
        elif not self.teacher.is_given:
            raise KnobError(
                "teacher",
                "is missing: give one of checkpoint: FILE, train: {...} and recipe: NAME, got "
                "none of them",
            )

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
        if self.is_command:
            for name in _NOT_FOR_PROGRAMS:
                del plain[name]
        return plain

    @property
    def is_command(self) -> bool:
        """Whether trials are runs of a program of the user's, and nothing is distilled."""
        return self.method.name == COMMAND

    @property
    def program(self) -> CommandConfig:
        """The program of method ``command``."""
        return CommandConfig.read(self.method.options, "method")

    @property
    def metric(self) -> Metric:
        """What rows are judged by."""
        return Metric.of({"name": COMMAND, **self.program.as_dict()} if self.is_command else {})

    @property
    def baselines(self) -> tuple[str, ...]:
        """Names of the baselines, the simplest first; each has an arm."""
        return (DEFAULTS,) if self.is_command else (PLAIN, UNIFORM)

    def baseline_key(self, name: str) -> str:
        """A baseline's name in JSON: plain distillation is called as its method."""
        return self.method.name if name == PLAIN else name

    @property
    def space(self) -> SearchSpace:
        """Where weights are searched, read from ``weights``."""
        return self.named_space if self.is_command else self.weight_space

    @property
    def named_space(self) -> NamedSpace:
        """The weights of method ``command``.

        Raises:
            KnobError: ``weights`` are branch weights, or are not of this form.
        """
        if self.weights.name != NamedSpace.name:
            raise KnobError(
                "weights",
                f"must be the weights of the program by their names, got {self.weights}; give "
                "{NAME: {low: ..., high: ..., default: ...}}",
            )
        return NamedSpace.read(self.weights.options)

    def space_of(self, params: Mapping[str, Any]) -> SearchSpace:
        """The space of an arm's parameters, which another study may have found.

        Raises:
            InputError: No space has them.
        """
        return self.named_space if self.is_command else space_of(params)

    def require_fitting(self, params: Mapping[str, Any]) -> None:
        """Raise an ``InputError`` for an arm's parameters that this study has no use for."""
        if self.is_command:
            self.named_space.require_fitting(params)
            return
        facts = self.resolved
        space_of(params).require_fitting(params, facts.num_branches, facts.num_intervals)

    @property
    def weight_space(self) -> WeightSpace:
        """The space of branch weights of a distillation.

        Raises:
            InputError: There is no such space, or it refuses a setting.
        """
        if self.weights.name == NamedSpace.name:
            raise KnobError(
                "weights",
                f"must be a mapping with a name and its settings, got {self.weights.options!r}; "
                "only method command has weights by names of your own",
            )
        member: WeightSpace = WEIGHT_SPACES[self.weights.name].read(
            self.weights.options, "weights"
        )
        if self.facts is None:
            return member
        return member.of_method(self.facts.num_branches, self.facts.num_intervals)

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
        """Training seeds of a search's baselines, that of the trials first."""
        return self.seeds.following(self.search.replicates)

    @property
    def planned_rows(self) -> int:
        """Trials of a search with its baselines, or given arms under all seeds and variants."""
        if self.is_search:
            return self.search.trials + len(self.baselines) * self.search.replicates
        given = self.given
        return len(given.arms) * len(given.seeds) * len(given.variants)

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
    def fresh_latents(self) -> bool:
        """Whether each training seed is judged on latents of its own."""
        return not self.is_search and self.given.latents == "fresh"

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
            contents = self.contents()
        kept: dict[str, Any]
        kept = (
            {"method": self.program.identity()} if self.is_command else self._engine_conditions()
        )
        if self.is_search:
            seeds = {"training": self.seeds.training, "evaluation": self.seeds.evaluation}
            kept |= {"weights": self.space.identity(), "seeds": seeds}
        else:
            kept["latents"] = "fresh" if self.fresh_latents else self.seeds.evaluation
        if self.trajectories.mode == "recorded" and self.trajectories.dtype != "float32":
            kept["trajectories"] = {"dtype": self.trajectories.dtype}
        if self.resources.team > 1 and not self.is_command:
            kept["resources"] = {"gpus": self.resources.team}
        return {**flatten(kept), **contents}

    def _engine_conditions(self) -> dict[str, Any]:
        """What decides the students of a distillation, beside weights and seeds."""
        kept: dict[str, Any] = {
            "numerics": NUMERICS,
            "evaluation": {
                name: value
                for name in ("images", "guidance")
                if (value := getattr(self.evaluation, name)) is not None
            },
            # A table counts by its content, see ``contents``.
            "method": {
                name: value
                for name, value in as_plain(self.method).items()
                if (name, value) not in _YOUNGER.items() and name != "epd_table"
            },
        }
        if self.teacher.train is not None:
            kept["teacher"] = {"train": as_plain(self.teacher.train)}
        if self.teacher.recipe is not None:
            kept["teacher"] = {"recipe": self.teacher.recipe}
        if self.precision != "float32":
            kept["precision"] = self.precision
        return kept

    def _refuse_foreign(self) -> None:
        """Refuse settings of a program's study that are only for distillation."""
        parts: list[tuple[str, Knobs, tuple[str, ...]]] = [
            ("", self, _NOT_FOR_PROGRAMS),
            ("resources.", self.resources, _RESOURCES),
        ]
        if self.is_search:
            parts.append(("plan.", self.search, _PLAN))
        for prefix, part, names in parts:
            known = knobs_of(type(part))
            for name in names:
                if getattr(part, name) != known[name].default:
                    raise KnobError(
                        f"{prefix}{name}",
                        "is not for method command, whose program sees to that itself; leave it "
                        "out",
                    )

    def fingerprint(self) -> str:
        """16 hex digits over ``conditions``."""
        return fingerprint_of(self.conditions())

    def contents(self) -> dict[str, str]:
        """Data, teacher, extractor and reference by their key among the conditions.

        Files are identified by their digest, published ones by their name.
        """
        if self.is_command:
            return self._program_contents()
        kind, _, file = self.evaluation.extractor.partition(":")
        extractor = f"{kind}:{sha256_file(Path(file))}" if file else self.evaluation.extractor
        found = {"evaluation.extractor": extractor}
        if self.data is not None:
            found["data"] = content_of(self.data)
        if (checkpoint := self.teacher.checkpoint) is not None:
            if checkpoint in PUBLIC_MODELS:
                found["teacher.checkpoint"] = checkpoint
            else:
                found["teacher.checkpoint_sha256"] = sha256_model(Path(checkpoint))
        if (reference := self.evaluation.reference) is not None:
            is_name = reference in REFERENCES
            found["evaluation.reference"] = reference if is_name else sha256_file(Path(reference))
        if (table := self.method.options.get("epd_table")) is not None:
            found["method.epd_table_sha256"] = sha256_file(Path(table))
        if self.prompts is not None:
            found["prompts_sha256"] = content_of_prompts(self.prompts)
        if self.evaluation.prompts is not None:
            found["evaluation.prompts_sha256"] = content_of_prompts(self.evaluation.prompts)
        return found

    def _program_contents(self) -> dict[str, str]:
        """Digest of each file that decides a program's metric, by its key among the conditions.

        Given arms may be runs of several programs, all of which count; a file that only a variant
        has is named by its path, as a variant has no place of its own.
        """
        config = self.program
        files = {f"method.{key}": path for key, path in config.used_files()}
        if not self.is_search:
            for changes in (*self.given.variants, self.confirm.method):
                member = self.method.with_options(changes)
                for _, path in CommandConfig.read(member.options).used_files():
                    if path not in files.values():
                        files[f"method.variants.{os.path.relpath(path, config.cwd)}"] = path
        return {f"{key}_sha256": sha256_file(path) for key, path in files.items()}


def as_plain(value: Any) -> Any:  # noqa: ANN401  any part of a spec
    """Dataclasses as mappings, members with their name among their settings, tuples as lists."""
    if isinstance(value, Member):
        return {"name": value.name, **as_plain(value.options)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {each.name: as_plain(getattr(value, each.name)) for each in fields}
    if isinstance(value, Mapping):
        return {key: as_plain(each) for key, each in value.items()}
    return [as_plain(each) for each in value] if isinstance(value, list | tuple) else value


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
    if name == "plan":
        given = spelt_plan(given)
        if not isinstance(given, Mapping):
            raise KnobError(
                name, f"must be {ONE_SHOT_PLAN} or a mapping with trials or arms, got {given!r}"
            )
        if "arms" in given:
            if others := given.keys() & (knobs_of(SearchPlan).keys() - knobs_of(ArmsPlan).keys()):
                raise KnobError(
                    name,
                    f"has arms, which are given, and {', '.join(sorted(others))} of a search; "
                    "drop one of the two",
                )
            return ArmsPlan.read_all(given)
        members = {key: given[key] for key in ("sampler", "pruner") if given.get(key) is not None}
        if given.get("one_shot") is not None and "trials" not in given:
            known = knobs_of(SearchPlan)["one_shot"].accept(given["one_shot"])
            given = {**given, "trials": known.best}
        return SearchPlan.read_all(
            {**given, **{key: Member.of(each, key) for key, each in members.items()}}
        )
    return given


def spelt_plan(given: Any) -> Any:  # noqa: ANN401  as YAML has it
    """``plan``, with a mapping in place of the word for one."""
    return {"one_shot": {}} if given == ONE_SHOT_PLAN else given
