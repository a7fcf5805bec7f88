"""``bdense-search``: launch studies and see where they stand."""

import argparse
import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import yaml

from bdense.command import Run, Verbs, add_verb, new_parser, run_verb
from bdense.errors import BdenseError
from search.errors import SpecError
from search.storage import redact, resolve_storage_url

if TYPE_CHECKING:
    from search.spec import StudySpec


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; 0 done, 1 failed, 2 a mistake of the user's, 130 interrupted."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(argv)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    logging.getLogger("optuna").setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, _interrupt)

    def call() -> None:
        if options.storage:
            _hide_password(options.storage, argv)
        options.run(options)

    return run_verb(
        "bdense-search",
        call,
        on_interrupt="interrupted; nothing is lost: the same command carries on",
        clean=redact,
    )


def _parser() -> argparse.ArgumentParser:
    parser, verbs = new_parser(
        "bdense-search",
        "Search branch weights for few-step diffusion students (B-DENSE).",
        "bdense-search launch studies/digits-nfe2.yaml",
    )
    _add_launch(verbs)
    _study_verb(
        verbs,
        "status",
        "show a study's trials by state, and what runs now",
        "bdense-search status digits-nfe2",
        _status,
        json_keys="study, trials",
    )
    _study_verb(
        verbs,
        "best",
        "show a study's best branch weights beside its baselines",
        "bdense-search best digits-nfe2 --json",
        _best,
        json_keys="study, storage, trials, best, baselines",
    )
    _add_report(verbs)
    _add_dashboard(verbs)
    _study_verb(
        verbs,
        "clean",
        "delete a study's recorded trajectories; a later launch records them again",
        "bdense-search clean digits-nfe2",
        _clean,
    )
    return parser


def _verb(verbs: Verbs, name: str, what: str, example: str, run: Run) -> argparse.ArgumentParser:
    parser = add_verb(verbs, name, what, example, run)
    parser.add_argument(
        "--storage",
        metavar="URL",
        help="study database: sqlite:///FILE or postgresql://USER@HOST/DATABASE "
        "(default: $BDENSE_STORAGE, else SQLite in runs/bdense.db; password: PGPASSWORD or "
        "PGPASSFILE)",
    )
    return parser


def _study_verb(
    verbs: Verbs, name: str, what: str, example: str, run: Run, *, json_keys: str = ""
) -> argparse.ArgumentParser:
    parser = _verb(verbs, name, what, example, run)
    parser.add_argument("study", metavar="STUDY", help="a study's name or its YAML file")
    if json_keys:
        parser.add_argument("--json", action="store_true", help=f"print one object: {json_keys}")
    return parser


def _add_launch(verbs: Verbs) -> None:
    parser = _verb(
        verbs,
        "launch",
        "start a study, or carry on with it if its name is already in the storage",
        "bdense-search launch studies/digits-nfe2.yaml --trials 32",
        _launch,
    )
    parser.add_argument("study", metavar="STUDY.yaml", type=Path, help="the study file")
    parser.add_argument(
        "--trials",
        metavar="N",
        type=_positive,
        help="trials in all, counting those that are done (default: budget.trials of the file)",
    )
    parser.add_argument(
        "--workers",
        metavar="N",
        type=_positive,
        help="trials at once (default: one for each GPU, else one for each resources.cpus CPUs)",
    )
    parser.add_argument(
        "-n",
        "--dry-run",
        action="store_true",
        help="print the resolved study, its fingerprint and its cost; start nothing",
    )


def _add_report(verbs: Verbs) -> None:
    parser = _study_verb(
        verbs,
        "report",
        "write a study's table, the curve of its FIDs and sample grids as files to show",
        "bdense-search report digits-nfe2 --out report",
        _report,
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path("report"),
        help="folder to write to (default: %(default)s)",
    )


def _add_dashboard(verbs: Verbs) -> None:
    parser = _verb(
        verbs,
        "dashboard",
        "open optuna-dashboard over the storage, on 127.0.0.1, read-only",
        "bdense-search dashboard --port 8080",
        _dashboard,
    )
    parser.add_argument(
        "--port", metavar="N", type=_port, default=8080, help="port on 127.0.0.1 (default: 8080)"
    )
    parser.add_argument(
        "--writable",
        action="store_true",
        help="let the browser change studies; renaming one orphans its running trials",
    )


def _launch(options: argparse.Namespace) -> None:
    from search.launch import check_apart, launch
    from search.study_file import read_spec

    spec = read_spec(options.study)
    if options.trials is not None:
        budget = spec.budget.model_copy(update={"trials": options.trials})
        spec = spec.model_copy(update={"budget": budget})
    check_apart(spec)
    if options.dry_run:
        _dry_run(spec)
        return
    url = resolve_storage_url(options.storage)
    result, succeeded = launch(spec, url, options.study, options.workers)
    print(result)
    if not succeeded:
        raise BdenseError(f"no trial of study {spec.name} is complete; the reasons are above")


def _dry_run(spec: "StudySpec") -> None:
    from search.estimate import estimate
    from search.study_file import as_yaml

    print(as_yaml(spec), end="")
    print(f"# fingerprint {spec.fingerprint()}")
    for line in estimate(spec).lines():
        print(f"# {line}")


def _status(options: argparse.Namespace) -> None:
    from search.report import duration, failures, headline, standing, status_json
    from search.study import Study

    study = Study.open(resolve_storage_url(options.storage), study_name(options.study))
    now = standing(study)
    if options.json:
        print(json.dumps(status_json(now)))
        return
    print(headline(now))
    for row in study.trials.running():
        print(
            f"trial {row.number} on {row.owner} for {duration(row.seconds)}, attempt "
            f"{row.attempt}: {row.progress or 'starting'}"
        )
    for line in failures(study):
        print(line)


def _best(options: argparse.Namespace) -> None:
    from search.report import best_json, headline, standing, table
    from search.study import Study

    now = standing(Study.open(resolve_storage_url(options.storage), study_name(options.study)))
    if options.json:
        print(json.dumps(best_json(now)))
    elif now.best is None:
        print(f"{headline(now)}; no trial is complete yet")
    else:
        print(headline(now))
        print(table(now))


def _report(options: argparse.Namespace) -> None:
    from search.report_files import write_report
    from search.study import Study

    study = Study.open(resolve_storage_url(options.storage), study_name(options.study))
    print(write_report(study, options.out))


def _dashboard(options: argparse.Namespace) -> None:
    from search.dashboard import serve

    serve(resolve_storage_url(options.storage), port=options.port, writable=options.writable)


def _clean(options: argparse.Namespace) -> None:
    from search.ledger import Ledger
    from search.study import TRAJECTORIES

    url = resolve_storage_url(options.storage)
    study = Ledger.open(url, study_name(options.study), budget=None).study
    folder = Path(study.user_attrs.get(TRAJECTORIES, ""))
    freed = 0
    if folder.name and folder.is_dir():
        freed = sum(path.stat().st_size for path in folder.iterdir())
        shutil.rmtree(folder)
    print(f"{freed / 2**20:.1f} MiB of trajectories deleted")


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


def _hide_password(url: str, argv: list[str]) -> None:
    """Start over with a password moved to the environment: ``ps`` shows arguments to everybody."""
    if redact(url) == url:
        return
    kept = [a for a in argv if a not in ("--storage", url) and not a.startswith("--storage=")]
    os.environ["BDENSE_STORAGE"] = resolve_storage_url(url)
    os.execv(sys.executable, [sys.executable, "-m", "search.cli", *kept])


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 65536:
        raise argparse.ArgumentTypeError(f"must lie in 0..65535, got {value}")
    return value


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
