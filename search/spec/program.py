"""Studies of method ``command``: runs of a program of the user's, judged by what it measures."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from bdense.errors import InputError
from bdense.files import sha256_file
from bdense.knobs import KnobError, Knobs, knobs_of
from bdense.methods import StagePlan
from search.errors import SpecError, under
from search.spec.command import (
    COMMAND,
    DEFAULTS,
    CommandConfig,
    NamedSpace,
    command_line,
    require_runnable,
)
from search.spec.metric import Metric
from search.spec.paths import Paths
from search.spec.sections import Facts, as_plain

if TYPE_CHECKING:
    from search.spec.study import StudySpec

# Settings of other sections that only distillations have.
_RESOURCES = (
    "deterministic",
    "compile",
    "compile_mode",
    "channels_last",
    "gradient_checkpointing",
    "log",
)
_PLAN = ("one_shot", "short", "at", "images", "stop")


@dataclass(frozen=True, slots=True)
class CommandWorkload:
    """See ``search.spec.workload.Workload``."""

    spec: "StudySpec"

    unused: ClassVar[tuple[str, ...]] = (
        "data",
        "prompts",
        "teacher",
        "evaluation",
        "precision",
        "trajectories",
        "keep_students",
    )
    has_students: ClassVar[bool] = False
    baselines = (DEFAULTS,)

    @property
    def config(self) -> CommandConfig:
        """The program."""
        return CommandConfig.read(self.spec.method.options, "method")

    @property
    def metric(self) -> Metric:
        return Metric.of({"name": COMMAND, **as_plain(self.config)})

    @property
    def space(self) -> NamedSpace:
        weights = self.spec.weights
        if weights.name != NamedSpace.name:
            raise KnobError(
                "weights",
                f"must be the weights of the program by their names, got {weights}; give "
                "{NAME: {low: ..., high: ..., default: ...}}",
            )
        return NamedSpace.read(weights.options)

    def space_of(self, params: Mapping[str, Any]) -> NamedSpace:
        return self.space

    def budget(self, settings: Mapping[str, Any]) -> str:
        return command_line(CommandConfig.read(settings))

    def check(self) -> None:
        spec = self.spec
        _ = self.config  # refuses its settings
        parts: list[tuple[str, Knobs, tuple[str, ...]]] = [
            ("", spec, self.unused),
            ("resources.", spec.resources, _RESOURCES),
            ("plan.", spec.plan, _PLAN),
        ]
        for prefix, part, names in parts:
            known = knobs_of(type(part))
            for name in names:
                if name in known and getattr(part, name) != known[name].default:
                    raise KnobError(
                        f"{prefix}{name}",
                        "is not for method command, whose program sees to that itself; leave it "
                        "out",
                    )

    def with_absolute_files(self, paths: Paths) -> "StudySpec":
        # Without a folder of its own it is the study file's.
        folder = paths.path("method.folder", self.config.folder or ".")
        return replace(self.spec, method=self.spec.method.with_options({"folder": str(folder)}))

    def resolve(self, source: str) -> "StudySpec":
        from search.spec.space import check_plan  # Optuna

        try:
            with under("weights"):
                space = self.space
            resolved = self._with(self.config)
            require_runnable(self.config, space.distributions())
            check_plan(resolved, resolved.require_fitting)
        except InputError as error:
            raise SpecError(f"{source}: {error}") from error
        return resolved

    def variant(self, changes: Mapping[str, Any], where: str = "method") -> "StudySpec":
        if not changes:
            return self.spec
        for name in changes.keys() & {"metric", "direction", "folder"}:
            raise InputError(f"{where}.{name} is the whole study's; give it in method")
        config = CommandConfig.read(self.spec.method.with_options(changes).options, where)
        require_runnable(config, self.space.distributions(), where)
        return self._with(config)

    def _with(self, config: CommandConfig) -> "StudySpec":
        """The spec of a program, with its facts: one stage, one branch."""
        words = [word for word in config.run if not word.startswith("-")]
        title = Path(words[1] if len(words) > 1 else words[0]).name
        stage = StagePlan(name="", label="", num_updates=1, nfe=1, branched=False)
        facts = Facts(title=title, num_branches=1, batch=1, needs_data=False, stages=(stage,))
        method = self.spec.method.with_options(as_plain(config))
        return replace(self.spec, method=method, facts=facts)

    def conditions(self) -> dict[str, Any]:
        config = self.config
        own = {"run": list(config.run), "metric": config.metric, "direction": config.direction}
        return {"method": {"name": COMMAND, **own}}

    def contents(self) -> dict[str, str]:
        """Digest of each file that decides the program's metric.

        Given arms may be runs of several programs, all of which count; a file that only a variant
        has is named by its path, as a variant has no place of its own.
        """
        spec, config = self.spec, self.config
        files = {f"method.{key}": path for key, path in config.used_files()}
        for changes in spec.plan.settings(spec):
            member = spec.method.with_options(changes)
            for _, path in CommandConfig.read(member.options).used_files():
                if path not in files.values():
                    files[f"method.variants.{os.path.relpath(path, config.cwd)}"] = path
        return {f"{key}_sha256": sha256_file(path) for key, path in files.items()}
