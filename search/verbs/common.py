"""What the verbs share: the storage and the study they name, types of their options."""

import argparse
from pathlib import Path

import yaml

from bdense.command import Run, Verbs, add_verb
from search.errors import SpecError


def storage_verb(
    verbs: Verbs, name: str, what: str, example: str, run: Run
) -> argparse.ArgumentParser:
    """A verb over a storage."""
    parser = add_verb(verbs, name, what, example, run)
    parser.add_argument(
        "--storage",
        metavar="URL",
        help="study database: sqlite:///FILE or postgresql://USER@HOST/DATABASE "
        "(default: $BDENSE_STORAGE, else SQLite in runs/bdense.db; password: PGPASSWORD or "
        "PGPASSFILE)",
    )
    return parser


def study_verb(
    verbs: Verbs, name: str, what: str, example: str, run: Run, *, json_keys: str = ""
) -> argparse.ArgumentParser:
    """A verb over one study of a storage, with --json if it has ``json_keys`` to print."""
    parser = storage_verb(verbs, name, what, example, run)
    parser.add_argument("study", metavar="STUDY", help="a study's name or its YAML file")
    if json_keys:
        parser.add_argument("--json", action="store_true", help=f"print one object: {json_keys}")
    return parser


def study_name(given: str) -> str:
    """The name of a study given by name or by its YAML file.

    Raises:
        SpecError: A file is named that holds no study.
    """
    path = Path(given)
    if path.suffix not in (".yaml", ".yml"):
        return given
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SpecError(f"the study file {path} cannot be read: {error}") from error
    if not isinstance(tree, dict) or not isinstance(tree.get("name"), str):
        raise SpecError(f"{path} has no name: key, so it is no study file")
    return str(tree["name"])


def positive(text: str) -> int:
    """An option's whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


def port(text: str) -> int:
    """An option's TCP port; 0 leaves the choice to the system."""
    value = int(text)
    if not 0 <= value < 65536:
        raise argparse.ArgumentTypeError(f"must lie in 0..65535, got {value}")
    return value
