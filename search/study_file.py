"""A study file: YAML to a StudySpec, its files found, its mistakes named by their keys."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from bdense.data_names import split_format, split_side
from bdense.public import CHECKPOINTS, REFERENCES
from search.errors import SpecError
from search.spec import StudySpec


def read_spec(path: Path) -> StudySpec:
    """Parse a study file.

    Raises:
        SpecError: The file cannot be read, is no YAML mapping, or a key or value is wrong; one
            line for each, naming the key.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"the study file {path} cannot be read: {error}") from error
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise SpecError(f"{path} is not valid YAML: {reason}") from error
    if not isinstance(tree, dict):
        raise SpecError(f"{path} must be a mapping of keys such as name, data, teacher, student")
    return _with_absolute_files(parse_spec(tree, source=str(path)), source=str(path))


def _with_absolute_files(spec: StudySpec, source: str) -> StudySpec:
    """The spec with its files as they are seen from any folder: workers have folders of their own.

    Raises:
        SpecError: There is no such file.
    """

    def absolute(key: str, file: str, names: Collection[str] = ()) -> str:
        if file in names:
            return file
        path = Path(file).resolve()
        if path.is_dir():
            raise SpecError(
                f"{source}: {key}: {file} is a folder; a model in diffusers' format becomes a "
                f"file by `bdense convert {file} --out teacher.safetensors`"
            )
        if not path.is_file():
            known = f", nor a public one of that name ({', '.join(names)})" if names else ""
            raise SpecError(f"{source}: {key}: there is no file {file}{known}")
        return str(path)

    teacher, evaluation, data = spec.teacher, spec.evaluation, spec.data
    if data is not None:
        data = _absolute_data(data, source)
    if teacher.checkpoint is not None:
        checkpoint = absolute("teacher.checkpoint", teacher.checkpoint, CHECKPOINTS)
        teacher = teacher.model_copy(update={"checkpoint": checkpoint})
    kind, _, file = evaluation.extractor.partition(":")
    if file:
        extractor = f"{kind}:{absolute('evaluation.extractor', file)}"
        evaluation = evaluation.model_copy(update={"extractor": extractor})
    if evaluation.reference is not None:
        reference = absolute("evaluation.reference", evaluation.reference, REFERENCES)
        evaluation = evaluation.model_copy(update={"reference": reference})
    return spec.model_copy(update={"teacher": teacher, "evaluation": evaluation, "data": data})


def _absolute_data(data: str, source: str) -> str:
    """A data set of files with its path as it is seen from any folder; a name stays one."""
    given, side = split_side(data)
    if (found := split_format(given)) is None:
        return data
    kind, path = found[0], Path(found[1]).expanduser().resolve()
    if kind == "folder" and not path.is_dir():
        raise SpecError(f"{source}: data: there is no folder {found[1]}")
    if kind != "folder" and not path.is_file():
        raise SpecError(f"{source}: data: there is no file {found[1]}")
    return f"{kind}:{path}" if side is None else f"{kind}:{path}@{side}"


def parse_spec(tree: dict[str, Any], source: str) -> StudySpec:
    """A spec from a mapping; errors name ``source`` and the key."""
    try:
        return StudySpec.model_validate(tree)
    except ValidationError as error:
        raise SpecError("\n".join(f"{source}: {line}" for line in _lines(error))) from error


def _lines(error: ValidationError) -> list[str]:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in _as_written(problem["loc"])) or "study"
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = "unknown key; check the spelling"
        elif problem["type"] == "missing":
            message = "this key is missing"
        elif problem["type"] == "union_tag_not_found":
            key, message = f"{key}.parameterisation", "this key is missing"
        elif problem["type"] == "union_tag_invalid":
            key = f"{key}.parameterisation"
            known, tag = problem["ctx"]["expected_tags"], problem["ctx"]["tag"]
            message = f"Input should be one of {known}, got {tag!r}"
        elif problem["type"] != "value_error" and not isinstance(problem["input"], dict):
            # Our own messages name the value themselves.
            message = f"{message}, got {problem['input']!r}"
        lines.append(f"{key}: {message}")
    return lines


def _as_written(place: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Where a problem is in the file: pydantic puts the kind of weights between their keys."""
    return (*place[:1], *place[2:]) if place[:1] == ("weights",) else place


def as_yaml(spec: StudySpec) -> str:
    """The resolved spec, every default spelt out."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False)
