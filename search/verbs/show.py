"""Read studies: ``list``, ``status``, ``best``, ``report``, ``export``, ``dashboard``."""

import argparse
import json
import tempfile
from pathlib import Path

from bdense.command import Verbs
from search.storage.engine import redact, resolve_storage_url
from search.verbs.common import open_study, port, positive, storage_verb, study_verb


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
        "the best; of given arms the searched weights with the first seed)",
    )
    parser.add_argument(
        "--baseline",
        choices=("plain", "uniform"),
        help="write this baseline of a search instead of a trial",
    )
    parser.add_argument(
        "--nfe",
        metavar="N",
        type=positive,
        help="evaluations of the student, in a method of several stages (default: the last's)",
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
    from search.study.summary import counts_json, failures, headline
    from search.study.wording import duration

    study = open_study(options, reading=True)
    if options.json:
        print(json.dumps({"study": study.name, "trials": counts_json(study.counts())}))
        return
    print(headline(study))
    row = "trial" if study.is_search else "row"
    for running in study.main.running():
        print(
            f"{row} {running.number} on {running.owner} for {duration(running.seconds)}, attempt "
            f"{running.attempt}: {running.progress or 'starting'}"
        )
    if when := asked_at(study.ledgers):
        print(f"asked to stop at {when}; {CONTINUE}")
    for line in failures(study):
        print(line)


def _best(options: argparse.Namespace) -> None:
    from search.analysis.confirmation import verdict
    from search.study.summary import best_json, headline, summary_of, table

    study = open_study(options, reading=True)
    now, found = summary_of(study), verdict(study)
    if options.json:
        confirmed = None if found is None else found.as_dict()
        print(json.dumps(best_json(now) | {"confirmed": confirmed}))
    elif now.best is None:
        print(f"{headline(study)}; no trial is complete yet")
    else:
        print(headline(study))
        print(table(now))
        if found is None:
            print(f"No winner is confirmed: bdense-search confirm {study.name}")
        else:
            print("", *found.lines(), sep="\n")


def _report(options: argparse.Namespace) -> None:
    from search.report.report_files import HTML_PAGE, write_report

    page = write_report(open_study(options, reading=True), options.out)
    print(page.with_name(HTML_PAGE), page, sep="\n")


def _export(options: argparse.Namespace) -> None:
    from bdense.files import require_new
    from search.export import export_trial
    from search.uploading import Place, is_url

    wanted = {"number": options.trial, "nfe": options.nfe, "baseline": options.baseline}
    study = open_study(options, reading=True)
    if is_url(options.folder):
        place = Place(options.folder)
        place.require_new()
        with tempfile.TemporaryDirectory(prefix="bdense-export-") as scratch:
            folder = Path(scratch) / "model"
            export_trial(study, folder, **wanted)
            place.take(folder)
        print(place.url)
        return
    require_new(Path(options.folder))
    for path in export_trial(study, Path(options.folder), **wanted):
        print(path)


def _dashboard(options: argparse.Namespace) -> None:
    from search.report.dashboard import serve

    serve(resolve_storage_url(options.storage), port=options.port, writable=options.writable)
