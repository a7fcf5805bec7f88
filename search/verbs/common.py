"""What the verbs share: the storage and the study they name, types of their options."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from bdense.command import Run, Verbs, add_verb
from search.errors import SpecError
from search.storage.engine import resolve_storage_url

if TYPE_CHECKING:
    from search.spec.study_spec import StudySpec
    from search.study.arms import Planned
    from search.study.study import Study

LEAST_SEEDS = 3  # search.spec.study_spec.ConfirmSpec's, spelt out: pydantic is slow to import


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


def open_search(options: argparse.Namespace) -> "tuple[Study, StudySpec]":
    """The search that STUDY names and its spec: by its file, as the file has it now.

    Raises:
        UnknownStudyError: There is no such search.
        InputError: Another version of bdense launched it.
        SpecChangedError: The file's conditions are not those that the study was run under.
    """
    from search.spec.study_file import read_spec
    from search.study.opening import open_search_named, stored_spec
    from search.study.study import refuse_other_conditions

    url = resolve_storage_url(options.storage)
    study = open_search_named(url, study_name(options.study))
    if Path(options.study).suffix in (".yaml", ".yml"):
        spec = read_spec(Path(options.study))
    else:
        spec = stored_spec(study.trials)
    # By its name too: a teacher's file, the data or the engine's numerics may have changed since.
    refuse_other_conditions(url, spec)
    return study, spec


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
    """An option's whole numbers, separated by commas."""
    return [int(part) for part in text.split(",")]


def positives(text: str) -> list[int]:
    """An option's whole numbers from 1 on, separated by commas."""
    return [positive(part) for part in text.split(",")]


def thousands(text: str) -> float:
    """An option's thousands of images, within the bounds of a row's."""
    value = float(text)
    if not 0.001 <= value <= 1e9:
        raise argparse.ArgumentTypeError(f"must lie in 0.001..1e9, got {text}")
    return value


def seeds_to_pair(text: str) -> int:
    """An option's number of seeds, as many as a confirmation needs."""
    value = int(text)
    if value < LEAST_SEEDS:
        raise argparse.ArgumentTypeError(f"must be {LEAST_SEEDS} or more, got {value}")
    return value


def show_rows(planned: "Planned") -> None:
    """Print how many rows are in which state, and why some failed."""
    from search.study.summary import failed_rows

    print(planned.headline())
    for line in failed_rows(planned.ledger, "row"):
        print(line)


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
