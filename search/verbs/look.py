"""See where a study stands, and take from it: ``status``, ``best``, ``report``, ``export`` .."""

import argparse
import json
import shutil
from pathlib import Path

from bdense.command import Verbs
from search.storage import resolve_storage_url
from search.verbs.common import port, positive, storage_verb, study_name, study_verb


def add_status(verbs: Verbs) -> None:
    """``status`` and its options."""
    study_verb(
        verbs,
        "status",
        "show a study's trials by state, and what runs now",
        "bdense-search status digits-nfe2",
        _status,
        json_keys="study, trials",
    )


def add_best(verbs: Verbs) -> None:
    """``best`` and its options."""
    study_verb(
        verbs,
        "best",
        "show a study's best branch weights beside its baselines",
        "bdense-search best digits-nfe2 --json",
        _best,
        json_keys="study, storage, trials, best, baselines, confirmed",
    )


def add_report(verbs: Verbs) -> None:
    """``report`` and its options."""
    parser = study_verb(
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


def add_export(verbs: Verbs) -> None:
    """``export`` and its options."""
    parser = study_verb(
        verbs,
        "export",
        "write a kept student as a model folder: weights, config, card, samples",
        "bdense-search export digits-nfe2 model",
        _export,
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder to write, a new one")
    parser.add_argument(
        "--trial",
        metavar="N",
        type=int,
        help="whose student (default: the confirmed winner's, else the best; of a promotion the "
        "promoted weights' with the first seed)",
    )
    parser.add_argument(
        "--baseline", choices=("sfd", "uniform"), help="of a search: this baseline's instead"
    )
    parser.add_argument(
        "--steps", metavar="N", type=positive, help="of a promotion's chain (default: the last)"
    )


def add_dashboard(verbs: Verbs) -> None:
    """``dashboard`` and its options."""
    parser = storage_verb(
        verbs,
        "dashboard",
        "open optuna-dashboard over the storage, on 127.0.0.1, read-only",
        "bdense-search dashboard --port 8080",
        _dashboard,
    )
    parser.add_argument(
        "--port", metavar="N", type=port, default=8080, help="port on 127.0.0.1 (default: 8080)"
    )
    parser.add_argument(
        "--writable",
        action="store_true",
        help="let the browser change studies; renaming one orphans its running trials",
    )


def add_clean(verbs: Verbs) -> None:
    """``clean`` and its options."""
    study_verb(
        verbs,
        "clean",
        "delete a study's recorded trajectories; a later launch records them again",
        "bdense-search clean digits-nfe2",
        _clean,
    )


def _status(options: argparse.Namespace) -> None:
    from search.planned import Planned
    from search.records import open_record
    from search.report import (
        duration,
        failed_rows,
        failures,
        headline,
        standing,
        status_json,
        trials_json,
    )

    record = open_record(resolve_storage_url(options.storage), study_name(options.study))
    if isinstance(record, Planned):
        ledger, row = record.ledger, "row"
        shown = {"study": record.name, "trials": trials_json(ledger.counts())}
        lines = [record.headline(), *failed_rows(ledger, row)]
    else:
        ledger, row, now = record.trials, "trial", standing(record)
        shown, lines = status_json(now), [headline(now), *failures(record)]
    if options.json:
        print(json.dumps(shown))
        return
    print(lines[0])
    for running in ledger.running():
        print(
            f"{row} {running.number} on {running.owner} for {duration(running.seconds)}, attempt "
            f"{running.attempt}: {running.progress or 'starting'}"
        )
    for line in lines[1:]:
        print(line)


def _best(options: argparse.Namespace) -> None:
    from search.confirmation import verdict
    from search.records import open_search_named
    from search.report import best_json, headline, standing, table

    url = resolve_storage_url(options.storage)
    study = open_search_named(url, study_name(options.study))
    now, found = standing(study), verdict(study)
    if options.json:
        confirmed = None if found is None else found.as_dict()
        print(json.dumps(best_json(now) | {"confirmed": confirmed}))
    elif now.best is None:
        print(f"{headline(now)}; no trial is complete yet")
    else:
        print(headline(now))
        print(table(now))
        if found is None:
            print(f"No winner is confirmed: bdense-search confirm {study.name}")
        else:
            print("", *found.lines(), sep="\n")


def _report(options: argparse.Namespace) -> None:
    from search.planned import Planned
    from search.records import open_record
    from search.report_files import write_planned_report, write_report

    record = open_record(resolve_storage_url(options.storage), study_name(options.study))
    if isinstance(record, Planned):
        print(write_planned_report(record, options.out))
    else:
        print(write_report(record, options.out))


def _export(options: argparse.Namespace) -> None:
    from bdense.files import require_new
    from search.export import export_trial
    from search.records import open_record

    require_new(options.folder)
    record = open_record(resolve_storage_url(options.storage), study_name(options.study))
    for path in export_trial(
        record,
        options.folder,
        number=options.trial,
        steps=options.steps,
        baseline=options.baseline,
    ):
        print(path)


def _dashboard(options: argparse.Namespace) -> None:
    from search.dashboard import serve

    serve(resolve_storage_url(options.storage), port=options.port, writable=options.writable)


def _clean(options: argparse.Namespace) -> None:
    from search.ledger import Ledger
    from search.study import TRAJECTORIES

    url = resolve_storage_url(options.storage)
    study = Ledger.open(url, study_name(options.study), budget=None).study
    stored = study.user_attrs.get(TRAJECTORIES, [])
    freed = 0
    # A search has one folder, planned rows one for each seed.
    for folder in map(Path, [stored] if isinstance(stored, str) else stored):
        if folder.name and folder.is_dir():
            freed += sum(path.stat().st_size for path in folder.iterdir())
            shutil.rmtree(folder)
    print(f"{freed / 2**20:.1f} MiB of trajectories deleted")
