"""See where studies stand, and take from them: ``list``, ``status``, ``best``, ``report`` .."""

import argparse
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from bdense.command import Verbs
from search.storage.engine import redact, resolve_storage_url
from search.verbs.common import port, positive, storage_verb, study_name, study_verb

if TYPE_CHECKING:
    from search.study.arms import Planned
    from search.study.study import Study


def add_list(verbs: Verbs) -> None:
    """``list`` and its options."""
    parser = storage_verb(
        verbs, "list", "list the studies of a storage", "bdense-search list --json", _list
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one array; each study has study, kind, method, trials, best_fid, started, "
        "changed",
    )


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
        "write a study's report: one HTML file that needs no other, Markdown, and their pictures",
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
    parser.add_argument(
        "folder",
        metavar="DIR",
        help="new folder to write; or a URL that fsspec knows, as in s3://bucket/model",
    )
    parser.add_argument(
        "--trial",
        metavar="N",
        type=int,
        help="number of the trial whose student is written (default: the confirmed winner, else "
        "the best; in a promotion that of the promoted weights with the first seed)",
    )
    parser.add_argument(
        "--baseline",
        choices=("sfd", "uniform"),
        help="write this baseline of a search instead of a trial",
    )
    parser.add_argument(
        "--steps",
        metavar="N",
        type=positive,
        help="steps of the student in a promotion's chain (default: the last's)",
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


def _open(options: argparse.Namespace) -> "Study | Planned":
    """The study that is named, to look at."""
    from search.study.opening import open_record

    url = resolve_storage_url(options.storage)
    return open_record(url, study_name(options.study), reading=True)


def _list(options: argparse.Namespace) -> None:
    from search.study.catalogue import list_studies, studies_json, studies_table

    url = resolve_storage_url(options.storage)
    found = list_studies(url)
    if options.json:
        print(json.dumps(studies_json(found)))
    elif found:
        print(*studies_table(found), sep="\n")
    else:
        print(f"no studies in {redact(url)}")


def _status(options: argparse.Namespace) -> None:
    from search.storage.stop_flags import CONTINUE, asked_at
    from search.study.arms import Planned
    from search.study.summary import (
        failed_rows,
        failures,
        headline,
        standing,
        status_json,
        trials_json,
    )
    from search.study.wording import duration

    record = _open(options)
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
    if when := asked_at(record.ledgers):
        print(f"asked to stop at {when}; {CONTINUE}")
    for line in lines[1:]:
        print(line)


def _best(options: argparse.Namespace) -> None:
    from search.analysis.confirmation import verdict
    from search.study.opening import open_search_named
    from search.study.summary import best_json, headline, standing, table

    url = resolve_storage_url(options.storage)
    study = open_search_named(url, study_name(options.study), reading=True)
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
    from search.report.report_files import HTML_PAGE, write_planned_report, write_report
    from search.study.arms import Planned

    record = _open(options)
    if isinstance(record, Planned):
        page = write_planned_report(record, options.out)
    else:
        page = write_report(record, options.out)
    print(page.with_name(HTML_PAGE), page, sep="\n")


def _export(options: argparse.Namespace) -> None:
    from bdense.files import require_new
    from search.export import export_trial
    from search.uploading import Place, is_url

    wanted = {"number": options.trial, "steps": options.steps, "baseline": options.baseline}
    if is_url(options.folder):
        place = Place(options.folder)
        place.require_new()
        with tempfile.TemporaryDirectory(prefix="bdense-export-") as scratch:
            folder = Path(scratch) / "model"
            export_trial(_open(options), folder, **wanted)
            place.take(folder)
        print(place.url)
        return
    require_new(Path(options.folder))
    for path in export_trial(_open(options), Path(options.folder), **wanted):
        print(path)


def _dashboard(options: argparse.Namespace) -> None:
    from search.report.dashboard import serve

    serve(resolve_storage_url(options.storage), port=options.port, writable=options.writable)
