"""Study files: YAML to a spec, with absolute paths; mistakes are named by line and key."""

import functools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from bdense.errors import InputError, did_you_mean
from search.child import in_child
from search.errors import SpecError
from search.spec.contents import flatten
from search.spec.legacy import translated
from search.spec.paths import Paths
from search.spec.plan import spelt_plan
from search.spec.study import StudySpec

_MOST_VALUES = 10_000
_MOST_LEVELS = 100  # a spec has fewer than ten
_MOST_BITS = 1024  # of a whole number; a float has no more
_SHOWN = 40  # letters of a value


def read_spec(path: Path, changes: dict[str, Any] | None = None) -> StudySpec:
    """Parse a study file, check it and fill in the method's defaults.

    That needs torch, which would stay in the launcher's memory (500 MB): a child process does it.

    Args:
        path: The file.
        changes: Values of options, such as ``{"plan": {...}}``, merged key by key.

    Raises:
        SpecError: The file cannot be read, or keys or values are wrong; a line for each key.
    """
    return in_child(functools.partial(_read, Path(path), changes or {}))


def read_here(
    given: str | Path | Mapping[str, Any] | StudySpec, changes: dict[str, Any]
) -> StudySpec:
    """Read a study in this process: a file, what one holds, or a spec.

    A script need not guard its main module then, as a child process would import that.

    Raises:
        SpecError: As by ``read_spec``.
    """
    if isinstance(given, str | Path):
        return _read(Path(given), changes)
    tree = given.as_dict() if isinstance(given, StudySpec) else dict(given)
    tree.pop("facts", None)
    tree, place = _merged(_spelt(tree), changes), str(Path.cwd() / "study")
    try:
        return parse(tree, source=place).workload.resolve("study")
    except SpecError as error:  # there is no such file: it only says what paths are relative to
        raise SpecError(str(error).replace(f"{place}: ", "study: ")) from error


def require_variants(spec: StudySpec, variants: Sequence[dict[str, Any]]) -> None:
    """Check settings of the method that differ from a resolved study's.

    Raises:
        InputError: The method has no such setting, or refuses the value.
    """
    for changes in filter(None, variants):
        spec.workload.variant(changes)


def require_variants_in_child(spec: StudySpec, variants: Sequence[dict[str, Any]]) -> None:
    """``require_variants`` in a child process, which frees the memory of torch."""
    if any(variants):
        in_child(functools.partial(require_variants, spec, variants))


def _read(path: Path, changes: dict[str, Any]) -> StudySpec:
    tree = read_tree(path)
    try:
        try:
            tree, hint = translated(tree)
        except SpecError as error:
            raise SpecError(f"{path}: {error}") from error
        spec = parse(_merged(_spelt(tree), changes), source=str(path))
        if hint:
            sys.stderr.write(f"bdense-search: {path}: {hint}\n")
        return spec.workload.resolve(str(path))
    except SpecError as error:
        raise SpecError(_with_lines(str(error), path, changes)) from error


def _with_lines(message: str, path: Path, changes: Mapping[str, Any]) -> str:
    """A message with line and column after the file, where a line of it begins with a key."""
    places = key_places(yaml.compose(path.read_text(), Loader=yaml.SafeLoader))
    for key in flatten(dict(changes)):  # given on the command line
        places.pop(key, None)

    def located(line: str) -> str:
        file, found, problem = line.partition(f"{path}: ")
        if file or not found:
            return line
        key = re.split(r"[ :]", problem, maxsplit=1)[0]
        while key and key not in places:
            key = key.rpartition(".")[0]
        return f"{path}:{places[key]}: {problem}" if key else line

    return "\n".join(map(located, message.splitlines()))


def key_places(node: yaml.Node | None, prefix: str = "") -> dict[str, str]:
    """LINE:COLUMN, from 1, of every key by its dotted name; items of lists by their number."""
    found: dict[str, str] = {}
    if isinstance(node, yaml.MappingNode):
        parts = [(str(key.value), key.start_mark, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        parts = [(str(index), each.start_mark, each) for index, each in enumerate(node.value)]
    else:
        return found
    for name, mark, value in parts:
        found[prefix + name] = f"{mark.line + 1}:{mark.column + 1}"
        found |= key_places(value, f"{prefix}{name}.")
    return found


def _spelt(tree: dict[str, Any]) -> dict[str, Any]:
    return {**tree, "plan": spelt_plan(tree["plan"])} if "plan" in tree else tree


def _merged(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(tree)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def read_tree(path: Path) -> dict[str, Any]:
    """A YAML file's mapping.

    Raises:
        SpecError: It cannot be read, or is no mapping.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error  # an OSError names the file, too
        there = [each.name for each in path.parent.glob("*.y*ml")]
        hint = "" if path.exists() else did_you_mean(path.name, there)
        raise SpecError(f"the study file {path} cannot be read: {reason}{hint}") from error
    try:
        tree = yaml.load(text, Loader=_Loader)  # noqa: S506  a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise SpecError(f"{path}{place}: not valid YAML: {error.problem}") from error
    # A ValueError or OverflowError: an escape such as \U00110000, which is no character.
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise SpecError(f"{path}: not valid YAML: {reason}") from error
    _require_small(tree, path)
    if not isinstance(tree, dict):
        raise SpecError(f"{path} must be a mapping of keys such as name, data, teacher, method")
    return tree


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which the last would count, and what is no value.

    It also refuses deep nesting as soon as it is reached, because the time to read grows with the
    square of the depth.
    """

    _level = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:  # noqa: ANN401
        self._level += 1
        if self._level > _MOST_LEVELS:
            problem = f"it is nested more than {_MOST_LEVELS} levels deep"
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, problem, mark)
        node = super().compose_node(parent, index)
        self._level -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:  # noqa: ANN401
        try:
            found = super().construct_object(node, deep)  # type: ignore[no-untyped-call]
        # Of a date such as 2026-02-30, or a tag that does not fit.
        except (ValueError, LookupError, AttributeError) as error:
            raise _no_value(node) from error
        if isinstance(found, int) and found.bit_length() > _MOST_BITS:
            raise _no_value(node)
        return found

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                problem = f"the key {key.value} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _no_value(node: yaml.Node) -> yaml.constructor.ConstructorError:
    kind = node.tag.rpartition(":")[2]  # int, float, bool, timestamp
    problem = f"{str(node.value)[:_SHOWN]!r} is not a valid {kind}"
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _require_small(tree: Any, path: Path) -> None:  # noqa: ANN401  whatever YAML holds
    """Refuse aliases that multiply: a few lines can stand for more values than fit into memory."""
    left, waiting = _MOST_VALUES, [tree]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict | list):
            left -= len(each)
            waiting += each.values() if isinstance(each, dict) else each
        if left < 0:
            raise SpecError(
                f"{path} stands for more than {_MOST_VALUES} values; its aliases multiply"
            )


def parse(tree: dict[str, Any], source: str) -> StudySpec:
    """A study from a mapping, its files with absolute paths.

    Raises:
        SpecError: A line for each mistake, naming ``source`` and the key.
    """
    if "facts" in tree:
        raise SpecError(f"{source}: facts is written by bdense; leave it out")
    problems, name = [], tree.get("name")
    if isinstance(name, str) and not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,63}", name):
        problems.append(
            f"name must be lower-case letters, digits and hyphens, at most 64, got {name!r}"
        )
    try:
        spec = StudySpec.read(tree)
    except InputError as error:
        problems += str(error).splitlines()
    if problems:
        raise SpecError.of_lines(source, problems)
    return spec.workload.with_absolute_files(Paths(source))


@functools.lru_cache(maxsize=64)
def read_stored(name: str, text: str) -> StudySpec:
    """The spec of a study, from the JSON that its last launch stored; not to be changed.

    Raises:
        InputError: Another version of bdense stored it.
    """
    try:
        tree = json.loads(text)
        # A search from before baselines had replicates.
        if "trials" in tree.get("plan", {}):
            tree["plan"] = {"replicates": 1, **tree["plan"]}
        return StudySpec.read(tree)
    except InputError as error:
        first, *more = str(error).splitlines()
        others = f" and {len(more)} more" if more else ""
        raise InputError(
            f"this bdense cannot read the study's spec ({name}: {first}{others}); use the version "
            "that launched it"
        ) from error


def as_yaml(spec: StudySpec) -> str:
    """The resolved spec, every default spelt out."""
    tree = spec.as_dict()
    del tree["facts"]
    return yaml.safe_dump(tree, sort_keys=False)
