"""A study's or promotion's file: YAML to its spec, its files found, its mistakes named by key."""

from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from bdense.data.names import split_format, split_side
from bdense.errors import InputError
from bdense.models.public import REFERENCES, published_names
from search.errors import SpecError
from search.spec.model_spec import ModelSpec, Strict
from search.spec.promotion_spec import PromotionSpec
from search.spec.study_spec import StudySpec

Spec = TypeVar("Spec", bound=ModelSpec)
# What kinds of specs are called, and a key that one kind alone has.
_NAMES: dict[type[ModelSpec], str] = {StudySpec: "study", PromotionSpec: "promotion"}
_OF_PROMOTIONS = "chain"


def read_spec(path: Path) -> StudySpec:
    """Parse a study file.

    Raises:
        SpecError: The file cannot be read, is no YAML mapping, or a key or value is wrong; one
            line for each, naming the key.
    """
    tree = _read(path, StudySpec)
    if _OF_PROMOTIONS in tree:
        raise SpecError(
            f"{path} is a promotion, not a study: it has a {_OF_PROMOTIONS}; give it to "
            f"`bdense-search promote STUDY --to {path}`"
        )
    return _with_absolute_files(parse_spec(tree, source=str(path)), source=str(path))


def read_promotion(path: Path) -> PromotionSpec:
    """Parse a promotion's file.

    Raises:
        SpecError: As of ``read_spec``.
    """
    tree = _read(path, PromotionSpec)
    if "student" in tree and _OF_PROMOTIONS not in tree:
        raise SpecError(
            f"{path} is a study, not a promotion: it has a student and no {_OF_PROMOTIONS}; give "
            f"it to `bdense-search launch {path}`"
        )
    return _with_absolute_files(parse_promotion(tree, source=str(path)), source=str(path))


def read_any(path: Path) -> StudySpec | PromotionSpec:
    """Parse a file of either kind; one with the key ``chain`` is a promotion's.

    Raises:
        SpecError: As of ``read_spec``.
    """
    tree = _read(path, StudySpec)
    return read_promotion(path) if _OF_PROMOTIONS in tree else read_spec(path)


def _read(path: Path, kind: type[ModelSpec]) -> dict[str, Any]:
    path = Path(path)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"the {_NAMES[kind]} file {path} cannot be read: {error}") from error
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise SpecError(f"{path} is not valid YAML: {reason}") from error
    if not isinstance(tree, dict):
        own = "student" if kind is StudySpec else _OF_PROMOTIONS
        raise SpecError(f"{path} must be a mapping of keys such as name, data, teacher, {own}")
    return tree


def _with_absolute_files(spec: Spec, source: str) -> Spec:
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
        checkpoint = absolute("teacher.checkpoint", teacher.checkpoint, published_names())
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
    """A study from a mapping; errors name ``source`` and the key."""
    return _parse(StudySpec, tree, source)


def parse_promotion(tree: dict[str, Any], source: str) -> PromotionSpec:
    """A promotion from a mapping, likewise."""
    return _parse(PromotionSpec, tree, source)


def read_stored(kind: type[Spec], name: str, text: str) -> Spec:
    """The spec of the study of that name, from the JSON that its last launch stored.

    Raises:
        InputError: It is one of another version of bdense.
    """
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        count = error.error_count()
        more = f" and {count - 1} more" if count > 1 else ""
        raise InputError(
            f"this bdense cannot read the study's spec ({name}: {place}: {first['msg']}{more}); "
            "use the version that launched it"
        ) from error


def _parse(kind: type[Spec], tree: dict[str, Any], source: str) -> Spec:
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        lines = _lines(error, tree, _NAMES[kind])
        raise SpecError("\n".join(f"{source}: {line}" for line in lines)) from error


def _lines(error: ValidationError, tree: dict[str, Any], whole: str) -> list[str]:
    """One line for each key that is wrong; ``whole`` stands for the file itself."""
    told: dict[str, list[str]] = {}
    values: dict[str, Any] = {}
    for problem in error.errors():
        place = _as_written(problem["loc"], tree, missing=problem["type"] == "missing")
        key = ".".join(str(part) for part in place) or whole
        message = problem["msg"].removeprefix("Value error, ")
        given = problem["input"]
        of_several = len(place) < len(problem["loc"])
        if of_several and problem["type"] == "literal_error" and isinstance(given, dict):
            continue  # a mapping was meant where a word would do; what is wrong in it follows
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
        elif problem["type"] != "value_error" and not isinstance(given, dict):
            # Our own messages name the value themselves.
            values[key] = given
            if problem["type"] == "model_type":
                message = f"Input should be a mapping of {_keys(problem['ctx']['class_name'])}"
        told.setdefault(key, []).append(message)
    return [f"{key}: {_joined(told[key])}{_got(key, values)}" for key in told]


def _joined(messages: list[str]) -> str:
    """Several for one key are what its kinds of values ask for each."""
    first, *others = messages
    return " or ".join([first, *(text.removeprefix("Input should be ") for text in others)])


def _got(key: str, values: dict[str, Any]) -> str:
    return f", got {values[key]!r}" if key in values else ""


def _keys(class_name: str) -> str:
    """What a section has, for people."""
    sections = {section.__name__: section for section in Strict.__subclasses__()}
    return ", ".join(sections[class_name].model_fields)


def _as_written(
    place: tuple[int | str, ...], tree: dict[str, Any], *, missing: bool
) -> tuple[int | str, ...]:
    """Where a problem is in the file: pydantic puts the kind of a value between its keys."""
    written: list[int | str] = []
    at: Any = tree
    for index, part in enumerate(place):
        is_item = isinstance(at, list) and isinstance(part, int)
        if is_item or (isinstance(at, dict) and part in at):
            at = at[part]
        elif not (missing and index == len(place) - 1):
            continue  # names a kind
        written.append(part)
    return tuple(written)


def as_yaml(spec: ModelSpec) -> str:
    """The resolved spec, every default spelt out."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False)
