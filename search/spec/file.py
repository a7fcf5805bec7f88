"""A study's file: YAML to its spec, its files found, its mistakes named by key."""

import functools
import multiprocessing
import signal
from collections.abc import Callable, Collection
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from bdense.data.names import split_format, split_side
from bdense.errors import InputError
from bdense.models.public import REFERENCES, published_names
from search.errors import SpecError
from search.spec.legacy import translated
from search.spec.study import Strict, StudySpec

T = TypeVar("T")


def read_spec(path: Path, changes: dict[str, Any] | None = None) -> StudySpec:
    """Parse a study file, and let the engine check it and fill in the method's defaults.

    The engine needs torch, which would stay in the launcher's memory (500 MB) for the whole
    study: a child process does this.

    Args:
        path: The file.
        changes: Sections that options replace, such as ``{"plan": {...}}``, merged key by key.

    Raises:
        SpecError: The file cannot be read, is no YAML mapping, or a key or value is wrong; one
            line for each, naming the key.
    """
    return apart(functools.partial(_resolved, Path(path), changes or {}))


def in_variant(spec: StudySpec, changes: dict[str, Any]) -> StudySpec:
    """The study with some of the method's settings replaced, which the engine checks.

    Raises:
        InputError: The method has no such setting, or refuses the value.
    """
    return apart(functools.partial(_varied, spec, changes)) if changes else spec


def apart(call: Callable[[], T]) -> T:
    """Call in a process of its own, which takes torch with it when it ends."""
    spawn = multiprocessing.get_context("spawn")
    # Ctrl-C reaches the whole group; only the launcher is to speak of it.
    quiet = functools.partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn, initializer=quiet) as child:
        return child.submit(call).result()


def _resolved(path: Path, changes: dict[str, Any]) -> StudySpec:
    from search.spec.resolve import resolve

    tree, told = translated(read_tree(path))
    return resolve(parse(_merged(tree, changes), source=str(path)), source=str(path), told=told)


def _varied(spec: StudySpec, changes: dict[str, Any]) -> StudySpec:
    from search.spec.resolve import variant

    return variant(spec, changes)


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
        raise SpecError(f"the study file {path} cannot be read: {error}") from error
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise SpecError(f"{path} is not valid YAML: {reason}") from error
    if not isinstance(tree, dict):
        raise SpecError(f"{path} must be a mapping of keys such as name, data, teacher, method")
    return tree


def parse(tree: dict[str, Any], source: str) -> StudySpec:
    """A study from a mapping, its files with paths that hold in any folder.

    Raises:
        SpecError: One line for each mistake, naming ``source`` and the key.
    """
    try:
        spec = StudySpec.model_validate(tree)
        _ = spec.space  # its own mistakes are InputErrors
    except ValidationError as error:
        raise SpecError("\n".join(f"{source}: {line}" for line in _lines(error, tree))) from error
    except InputError as error:
        raise SpecError(f"{source}: {error}") from error
    if "." in spec.name:
        raise SpecError(
            f"{source}: name: {spec.name!r} has a dot, which names of derived studies have "
            f"(NAME.confirm); choose another, such as {spec.name.replace('.', '-')}"
        )
    return _with_absolute_files(spec, source)


def read_stored(name: str, text: str) -> StudySpec:
    """The spec of the study of that name, from the JSON that its last launch stored.

    Raises:
        InputError: It is one of another version of bdense.
    """
    try:
        return StudySpec.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        count = error.error_count()
        more = f" and {count - 1} more" if count > 1 else ""
        raise InputError(
            f"this bdense cannot read the study's spec ({name}: {place}: {first['msg']}{more}); "
            "use the version that launched it"
        ) from error


def as_yaml(spec: StudySpec) -> str:
    """The resolved spec, every default spelt out."""
    return yaml.safe_dump(spec.model_dump(mode="json", exclude={"facts"}), sort_keys=False)


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


def _lines(error: ValidationError, tree: dict[str, Any]) -> list[str]:
    """One line for each key that is wrong."""
    told: dict[str, list[str]] = {}
    values: dict[str, Any] = {}
    for problem in error.errors():
        place = _as_written(problem["loc"], tree, missing=problem["type"] == "missing")
        key = ".".join(str(part) for part in place) or "study"
        message = problem["msg"].removeprefix("Value error, ")
        given = problem["input"]
        if problem["type"] == "extra_forbidden":
            message = "unknown key; check the spelling"
        elif problem["type"] == "missing":
            message = "this key is missing"
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
    found = sections.get(class_name)
    return ", ".join(found.model_fields) if found else "name and its settings"


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
