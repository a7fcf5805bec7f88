"""``bdense-search``: launch studies and see where they stand."""

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import yaml

from bdense.errors import BdenseError, InputError
from search.errors import SpecError
from search.storage import redact, resolve_storage_url

USER_ERROR, FAILURE, INTERRUPTED = 2, 1, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; 0 done, 1 failed, 2 a mistake of the user's, 130 interrupted."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(argv)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    logging.getLogger("optuna").setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if getattr(options, "storage", None):
            _hide_password(options.storage, argv)
        status: int = options.run(options)
        sys.stdout.flush()
    except InputError as error:
        return _complain(error, USER_ERROR)
    except BdenseError as error:
        return _complain(error, FAILURE)
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted; nothing is lost: the same command carries on\n")
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bdense-search",
        description="Search branch weights for few-step diffusion students (B-DENSE).",
        epilog="example: bdense-search launch studies/digits-nfe2.yaml",
    )
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    _add_launch(verbs)
    _add_status(verbs)
    _add_best(verbs)
    _add_dashboard(verbs)
    _add_clean(verbs)
    return parser


def _verb(
    verbs: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    what: str,
    example: str,
) -> argparse.ArgumentParser:
    parser = verbs.add_parser(
        name,
        help=what,
        description=what[0].upper() + what[1:] + ".",
        epilog=f"example: {example}",
    )
    parser.add_argument(
        "--storage",
        metavar="URL",
        help="study database: sqlite:///FILE or postgresql://USER@HOST/DATABASE "
        "(default: $BDENSE_STORAGE, else SQLite in runs/bdense.db; password: PGPASSWORD or "
        "PGPASSFILE)",
    )
    return parser


def _add_launch(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = _verb(
        verbs,
        "launch",
        "start a study, or carry on with it if its name is already in the storage",
        "bdense-search launch studies/digits-nfe2.yaml --trials 32",
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
    parser.set_defaults(run=_launch)


def _add_status(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = _verb(
        verbs,
        "status",
        "show a study's trials by state, and what runs now",
        "bdense-search status digits-nfe2",
    )
    parser.add_argument("study", metavar="STUDY", help="a study's name or its YAML file")
    parser.add_argument("--json", action="store_true", help="print one object: study, trials")
    parser.set_defaults(run=_status)


def _add_best(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = _verb(
        verbs,
        "best",
        "show a study's best branch weights beside its baselines",
        "bdense-search best digits-nfe2 --json",
    )
    parser.add_argument("study", metavar="STUDY", help="a study's name or its YAML file")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one object: study, storage, trials, best, baselines",
    )
    parser.set_defaults(run=_best)


def _add_dashboard(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = _verb(
        verbs,
        "dashboard",
        "open optuna-dashboard over the storage, on 127.0.0.1, read-only",
        "bdense-search dashboard --port 8080",
    )
    parser.add_argument(
        "--port", metavar="N", type=_port, default=8080, help="port on 127.0.0.1 (default: 8080)"
    )
    parser.add_argument(
        "--writable",
        action="store_true",
        help="let the browser change studies; renaming one orphans its running trials",
    )
    parser.set_defaults(run=_dashboard)


def _add_clean(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = _verb(
        verbs,
        "clean",
        "delete a study's recorded trajectories; a later launch records them again",
        "bdense-search clean digits-nfe2",
    )
    parser.add_argument("study", metavar="STUDY", help="a study's name or its YAML file")
    parser.set_defaults(run=_clean)


def _launch(options: argparse.Namespace) -> int:
    from search.engine import check
    from search.spec import read_spec

    spec = read_spec(options.study)
    if options.trials is not None:
        budget = spec.budget.model_copy(update={"trials": options.trials})
        spec = spec.model_copy(update={"budget": budget})
    check(spec)
    if options.dry_run:
        return _dry_run(spec)
    from search.launch import launch

    print(launch(spec, resolve_storage_url(options.storage), options.study, options.workers))
    return 0


def _dry_run(spec: "StudySpec") -> int:  # type: ignore[name-defined]  # noqa: F821
    from search.estimate import estimate
    from search.spec import as_yaml

    print(as_yaml(spec), end="")
    print(f"# fingerprint {spec.fingerprint()}")
    for line in estimate(spec).lines():
        print(f"# {line}")
    return 0


def _status(options: argparse.Namespace) -> int:
    from search.ledger import Ledger
    from search.report import duration, failures, headline, standing, status_json

    url = resolve_storage_url(options.storage)
    ledger = Ledger.open(url, study_name(options.study), budget=None)
    now = standing(ledger, url)
    if options.json:
        print(json.dumps(status_json(now)))
        return 0
    print(headline(now))
    for row in ledger.running():
        print(
            f"trial {row.number} on {row.owner} for {duration(row.seconds)}, attempt "
            f"{row.attempt}: {row.progress or 'starting'}"
        )
    for line in failures(ledger.study):
        print(line)
    return 0


def _best(options: argparse.Namespace) -> int:
    from search.ledger import Ledger
    from search.report import best_json, headline, standing, table

    url = resolve_storage_url(options.storage)
    now = standing(Ledger.open(url, study_name(options.study), budget=None), url)
    if options.json:
        print(json.dumps(best_json(now)))
    elif now.best is None:
        print(f"{headline(now)}; no trial is complete yet")
    else:
        print(headline(now))
        print(table(now))
    return 0


def _dashboard(options: argparse.Namespace) -> int:
    from search.dashboard import serve

    serve(resolve_storage_url(options.storage), port=options.port, writable=options.writable)
    return 0


def _clean(options: argparse.Namespace) -> int:
    from search.ledger import Ledger
    from search.slots import TRAJECTORIES_KEY

    url = resolve_storage_url(options.storage)
    study = Ledger.open(url, study_name(options.study), budget=None).study
    folder = Path(study.user_attrs.get(TRAJECTORIES_KEY, ""))
    shards = sorted(folder.glob("shard-*")) if folder.name else []
    freed = sum(path.stat().st_size for path in shards)
    for path in shards:
        path.unlink()
    if shards:
        folder.rmdir()
    print(f"{freed / 2**20:.1f} MiB of trajectories deleted")
    return 0


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


def _complain(error: Exception, status: int) -> int:
    for line in str(error).splitlines():
        sys.stderr.write(f"bdense-search: {redact(line)}\n")
    return status


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
