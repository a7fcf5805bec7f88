"""Studies of distillations: students of a teacher, judged by their FID."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from bdense import NUMERICS
from bdense.files import sha256_file, sha256_model
from bdense.knobs import KnobError
from bdense.methods import YOUNGER
from bdense.models.diffusers_files import is_hub_id
from bdense.models.zoo import PUBLIC_MODELS, REFERENCES
from bdense.weights import WEIGHT_SPACES, space_of
from bdense.weights.space import PLAIN, UNIFORM, WeightSpace
from search.spec.command import NamedSpace
from search.spec.contents import content_of, content_of_prompts
from search.spec.metric import FID_METRIC
from search.spec.paths import Paths
from search.spec.sections import TeacherSpec, as_plain

if TYPE_CHECKING:
    from search.spec.study import StudySpec

# A study from before a knob is a study at its default, under the same fingerprint.
_YOUNGER = {"tail": None, **YOUNGER}


@dataclass(frozen=True, slots=True)
class DistillationWorkload:
    """See ``search.spec.workload.Workload``."""

    spec: "StudySpec"

    unused: ClassVar[tuple[str, ...]] = ()
    has_students: ClassVar[bool] = True
    metric = FID_METRIC
    baselines = (PLAIN, UNIFORM)

    @property
    def space(self) -> WeightSpace:
        weights, facts = self.spec.weights, self.spec.facts
        if weights.name == NamedSpace.name:
            raise KnobError(
                "weights",
                f"must be a mapping with a name and its settings, got {weights.options!r}; "
                "only method command has weights by names of your own",
            )
        member: WeightSpace = WEIGHT_SPACES[weights.name].read(weights.options, "weights")
        if facts is None:
            return member
        return member.of_method(facts.num_branches, facts.num_intervals)

    def space_of(self, params: Mapping[str, Any]) -> WeightSpace:
        return space_of(params)

    def budget(self, settings: Mapping[str, Any]) -> str:
        if "kimg" in settings:
            return f"{settings['kimg']:g} kimg"
        return f"{self.spec.resolved.stages[0].num_updates} updates a stage"

    def check(self) -> None:
        if self.spec.teacher == TeacherSpec():
            raise KnobError(
                "teacher",
                "is missing: give one of checkpoint: FILE, train: {...} and recipe: NAME, got "
                "none of them",
            )

    def with_absolute_files(self, paths: Paths) -> "StudySpec":
        spec, evaluation, method = self.spec, self.spec.evaluation, self.spec.method
        data = paths.data(spec.data)
        checkpoint = paths.file(
            "teacher.checkpoint", spec.teacher.checkpoint, PUBLIC_MODELS, folder=True
        )
        kind, colon, file = evaluation.extractor.partition(":")
        extractor = paths.file("evaluation.extractor", file or None) or file
        reference = paths.file("evaluation.reference", evaluation.reference, REFERENCES)
        prompts = paths.prompts("prompts", spec.prompts)
        own = paths.prompts("evaluation.prompts", evaluation.prompts)
        scorer, beside = evaluation.clip_score, Path(paths.source).parent
        # A hub id stays one where there is no such folder.
        if scorer is not None and (not is_hub_id(scorer) or (beside / scorer).exists()):
            scorer = paths.file("evaluation.clip_score", scorer, folder=True)
        if isinstance(table := method.options.get("epd_table"), str):
            method = method.with_options({"epd_table": paths.file("method.epd_table", table)})
        return replace(
            spec,
            data=data,
            prompts=prompts,
            teacher=replace(spec.teacher, checkpoint=checkpoint),
            method=method,
            evaluation=replace(
                evaluation,
                extractor=f"{kind}{colon}{extractor}",
                reference=reference,
                prompts=own,
                clip_score=scorer,
            ),
            resources=replace(spec.resources, log=tuple(map(paths.log, spec.resources.log))),
        )

    def resolve(self, source: str) -> "StudySpec":
        from search.spec.resolve import resolve  # torch

        return resolve(self.spec, source)

    def variant(self, changes: Mapping[str, Any], where: str = "method") -> "StudySpec":
        from search.spec.resolve import variant  # torch

        return variant(self.spec, changes, where)

    def conditions(self) -> dict[str, Any]:
        spec = self.spec
        kept: dict[str, Any] = {
            "numerics": NUMERICS,
            "evaluation": {
                name: value
                for name in ("images", "guidance")
                if (value := getattr(spec.evaluation, name)) is not None
            },
            # A table counts by its content, see ``contents``.
            "method": {
                name: value
                for name, value in as_plain(spec.method).items()
                if (name, value) not in _YOUNGER.items() and name != "epd_table"
            },
        }
        if spec.teacher.train is not None:
            kept["teacher"] = {"train": as_plain(spec.teacher.train)}
        if spec.teacher.recipe is not None:
            kept["teacher"] = {"recipe": spec.teacher.recipe}
        if spec.precision != "float32":
            kept["precision"] = spec.precision
        return kept

    def contents(self) -> dict[str, str]:
        spec = self.spec
        kind, _, file = spec.evaluation.extractor.partition(":")
        extractor = f"{kind}:{sha256_file(Path(file))}" if file else spec.evaluation.extractor
        found = {"evaluation.extractor": extractor}
        if spec.data is not None:
            found["data"] = content_of(spec.data)
        if (checkpoint := spec.teacher.checkpoint) is not None:
            if checkpoint in PUBLIC_MODELS:
                found["teacher.checkpoint"] = checkpoint
            else:
                found["teacher.checkpoint_sha256"] = sha256_model(Path(checkpoint))
        if (reference := spec.evaluation.reference) is not None:
            is_name = reference in REFERENCES
            found["evaluation.reference"] = reference if is_name else sha256_file(Path(reference))
        if (table := spec.method.options.get("epd_table")) is not None:
            found["method.epd_table_sha256"] = sha256_file(Path(table))
        if spec.prompts is not None:
            found["prompts_sha256"] = content_of_prompts(spec.prompts)
        if spec.evaluation.prompts is not None:
            found["evaluation.prompts_sha256"] = content_of_prompts(spec.evaluation.prompts)
        return found
