"""Studies of method ``command``: their programs checked, and what others need to know of them."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bdense.errors import InputError
from bdense.methods.plan import StagePlan
from search.errors import under
from search.spec.command import CommandConfig, require_runnable
from search.spec.sections import Facts
from search.spec.space import check_plan
from search.spec.study import StudySpec


def resolve_command(spec: StudySpec) -> StudySpec:
    """The spec with the method's defaults and its facts, all checked.

    Raises:
        InputError: The program cannot be run, or something asked for is not for programs.
    """
    with under("weights"):
        _ = spec.space
    config = spec.program
    resolved = replace(
        spec, method=spec.method.with_options(config.as_dict()), facts=_facts(config)
    )
    require_runnable(config, spec.space.distributions())
    check_plan(resolved, command_variant, spec.require_fitting)
    return resolved


def command_variant(
    spec: StudySpec, changes: Mapping[str, Any], where: str = "method"
) -> StudySpec:
    """A resolved spec with some of the program's settings replaced; ``where`` is their key.

    Raises:
        InputError: There is no such setting, or it is the whole study's.
    """
    if not changes:
        return spec
    for name in changes.keys() & {"metric", "direction", "folder"}:
        raise InputError(f"{where}.{name} is the whole study's; give it in method")
    member = spec.method.with_options(changes)
    config = CommandConfig.read(member.options, where)
    require_runnable(config, spec.space.distributions(), where)
    return replace(spec, method=member.with_options(config.as_dict()), facts=_facts(config))


def _facts(config: CommandConfig) -> Facts:
    """Facts of a program: one stage, one branch."""
    words = [word for word in config.run if not word.startswith("-")]
    title = Path(words[1] if len(words) > 1 else words[0]).name
    stage = StagePlan(name="", label="", num_updates=1, nfe=1, branched=False)
    return Facts(title=title, num_branches=1, batch=1, needs_data=False, stages=(stage,))
