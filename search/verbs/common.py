"""Shared parts of the verbs: opening their storage and study, types of their options."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from bdense.command import Run, Verbs, add_verb
from search.errors import SpecError
from search.storage.engine import resolve_storage_url

if TYPE_CHECKING:
    from search.study.study import Study

LEAST_SEEDS = 3  # search.spec.study.ConfirmSpec's, spelt out


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
        raise SpecError(f"{path} has no name: key, so it is not a study file")
    return str(tree["name"])


def open_study(options: argparse.Namespace, *, reading: bool = False) -> "Study":
    """The study that STUDY names.

    Raises:
        UnknownStudyError: There is none.
    """
    from search.study.study import Study

    url = resolve_storage_url(options.storage)
    return Study.open(url, study_name(options.study), reading=reading)


def open_search(options: argparse.Namespace) -> "Study":
    """The search that STUDY names, if its conditions are still those that it ran under.

    Raises:
        UnknownStudyError: There is no such search.
        InputError: Another version of bdense launched it.
        SpecChangedError: The conditions of its file, or of its stored spec, have changed.
    """
    from search.spec.file import read_spec

    study = open_study(options)
    _ = study.search  # refuses given arms
    path = Path(options.study)
    # Also by name: a teacher's file, the data or the engine's numerics may have changed since.
    spec = read_spec(path) if path.suffix in (".yaml", ".yml") else study.spec
    study.refuse_other_conditions(spec)
    return study


def add_workers(parser: argparse.ArgumentParser) -> None:
    """--workers and --gpus, of verbs that run rows."""
    parser.add_argument(
        "--gpus",
        metavar="N",
        type=numbers,
        help="GPUs of this machine to use, by nvidia-smi's numbers, as in 0,2 (default: all)",
    )
    parser.add_argument(
        "--workers",
        metavar="N",
        type=positive,
        help="trials to run at once (default: one for each GPU, else one for each resources.cpus "
        "CPUs)",
    )


def numbers(text: str) -> list[int]:
    """Whole numbers, separated by commas."""
    return [int(part) for part in text.split(",")]


def positives(text: str) -> list[int]:
    """Whole numbers from 1 on, separated by commas."""
    return [positive(part) for part in text.split(",")]


def positive(text: str) -> int:
    """A whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


def seeds_to_pair(text: str) -> int:
    """A number of seeds, as many as a confirmation needs."""
    value = int(text)
    if value < LEAST_SEEDS:
        raise argparse.ArgumentTypeError(f"must be {LEAST_SEEDS} or more, got {value}")
    return value


def thousands(text: str) -> float:
    """Thousands of images of a training."""
    value = float(text)
    if not 0.001 <= value <= 1e9:
        raise argparse.ArgumentTypeError(f"must lie in 0.001..1e9, got {text}")
    return value


def port(text: str) -> int:
    """A TCP port; 0 leaves the choice to the system."""
    value = int(text)
    if not 0 <= value < 65536:
        raise argparse.ArgumentTypeError(f"must lie in 0..65535, got {value}")
    return value


def show_rows(study: "Study") -> None:
    """Print the number of rows in each state, and why some failed."""
    from search.study.summary import failures, headline

    print(headline(study))
    for line in failures(study):
        print(line)
