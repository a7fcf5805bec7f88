"""Verbs that read studies: ``list``, ``status``, ``trials``, ``best`` and those that follow."""

import contextlib
import json
import tempfile
from pathlib import Path

from bdense.command import Force
from bdense.errors import InputError
from bdense.files import require_new
from search.analysis.assessment import assess
from search.analysis.comparison import compare, replicates_of
from search.analysis.confirmation import judged_summary
from search.analysis.confirmation import verdict as verdict_of
from search.analysis.pilot import pilot_of
from search.analysis.recommendation import noise_of
from search.analysis.stop_rule import LargestGain
from search.log import say
from search.redaction import redact
from search.report.report_files import HTML_PAGE, write_report
from search.storage.engine import resolve_storage_url, sqlite_file
from search.storage.leases import RunningRow
from search.storage.stop_flags import CONTINUE, asked_at
from search.study.catalogue import list_studies, studies_json, studies_table
from search.study.curve import curve_line, curve_of, curve_rows, one_shot_json
from search.study.preparing import preparing_line
from search.study.study import Study
from search.study.summary import best_json, counts_json, failures, foreign_rows, headline, table
from search.study.trial_list import list_rows, rows_csv, rows_table
from search.study.wording import align, counts_line, duration
from search.uploading import is_url, require_new_url, upload
from search.verbs import options
from search.verbs.common import open_study


def show_list(asked: options.ListOptions) -> None:
    """Print a line for each study."""
    url = resolve_storage_url(asked.storage)
    found = list_studies(url)
    if asked.json:
        print(json.dumps(studies_json(found)))
    elif found:
        print(*studies_table(found), sep="\n")
    else:
        path = sqlite_file(url)
        missing = "" if path is None or path.exists() else ", which does not exist yet"
        print(f"no studies in {redact(url)}{missing}")


def status(asked: options.StatusOptions) -> None:
    """Print the numbers of rows, those that run, and why some failed."""
    study = open_study(asked, reading=True)
    if asked.json:
        found = {"study": study.name, "trials": counts_json(study.counts())}
        print(json.dumps(found | one_shot_json(study)))
        return
    print(headline(study))
    if study.baselines is not None:
        print(counts_line(study.baselines.counts(), study.given_noun))
    for row, ledger in zip((study.noun, "baseline"), study.ledgers, strict=False):
        for running in ledger.running():
            print(f"{row} {running.number} {_standing(running)}")
    if (preparing := preparing_line(study.main)) is not None:
        print(preparing)
    if study.is_search and (waiting := study.counts().waiting):
        print(f"planned before any other point: {waiting}")
    if when := asked_at(study.ledgers):
        print(f"asked to stop at {when}; {CONTINUE}")
    for line in failures(study):
        print(line)
    if study.spec.evaluation.images == "auto" and (pilot := pilot_of(study)) is not None:
        print(f"evaluation.images auto: {headline(pilot)}")
    if (curve := curve_of(study)) is not None:
        print(curve_line(curve))
    if study.is_search and (noise := noise_of(compare(study))).least_difference is not None:
        print(noise.text())
    if (ended := LargestGain.of(study)) is not None:
        print(ended.text())


def _standing(row: RunningRow) -> str:
    if not row.worker:
        return f"was given back in attempt {row.attempt}; the next free worker continues it"
    return (
        f"on {row.worker} for {duration(row.seconds)}, attempt {row.attempt}: "
        f"{row.progress or 'starting'}"
    )


def trials(asked: options.TrialsOptions) -> None:
    """Print a line for each row that was started."""
    study = open_study(asked, reading=True)
    rows = list_rows(study)
    if asked.csv and asked.json:
        raise InputError("--csv and --json are two forms; give one of them")
    if asked.json:
        print(json.dumps([row.as_dict() for row in rows]))
    elif asked.csv:
        print(rows_csv(rows), end="")
    elif rows:
        print(*rows_table(study, rows), sep="\n")
    else:
        print(f"{headline(study)}; none has started yet")
    for line in filter(None, map(foreign_rows, study.ledgers)):
        say(line)


def best(asked: options.BestOptions) -> None:
    """Print the best weights, what confirms them, and which arm to use."""
    study = open_study(asked, reading=True)
    now, found = judged_summary(study)
    if asked.json:
        more = {"confirmed": None if found is None else found.as_dict()}
        more |= assess(study, found).as_dict()
        print(json.dumps(best_json(now) | more | one_shot_json(study)))
        return
    print(headline(study) if now.best else f"{headline(study)}; no trial is complete yet")
    if now.best is not None:
        print(table(now))
        if (replicates := replicates_of(study)) is not None:
            print("", *replicates.table(), replicates.conditions_line(), "", sep="\n")
        if found is None:
            print(f"No winner is confirmed: bdense-search confirm {study.name}")
        else:
            print("", *found.lines(), sep="\n")
    if (curve := curve_of(study)) is not None:
        print("", *align(curve_rows(curve)), curve_line(curve), "", sep="\n")
    print(*assess(study, found).lines(), sep="\n")


def report(asked: options.ReportOptions, replacing: Force) -> None:
    """Write the report, and name its pages."""
    study = open_study(asked, reading=True)
    page = write_report(study, asked.out, force=replacing.force)
    print(page.with_name(HTML_PAGE), page, sep="\n")


def export(asked: options.ExportOptions) -> None:
    """Write the model folder, and name it."""
    from bdense.models.hub import HubRepository, pushable_later  # with torch
    from search.export import export_trial

    hub = None if asked.push is None else HubRepository(asked.push)
    if hub is not None:
        hub.require_new()
    study = open_study(asked, reading=True)
    url = asked.folder.rstrip("/") if is_url(asked.folder) else None
    with pushable_later(asked.folder, asked.push):
        require_new(Path(asked.folder)) if url is None else require_new_url(url)
    with contextlib.ExitStack() as until_uploaded:
        folder = Path(asked.folder)
        if url is not None:
            scratch = tempfile.TemporaryDirectory(prefix="bdense-export-")
            folder = Path(until_uploaded.enter_context(scratch)) / "model"
        written = export_trial(
            study, folder, number=asked.trial, nfe=asked.nfe, baseline=asked.baseline
        )
        if url is not None:
            upload(folder, url)
        say(written.text())
        _tell_recommended(study, asked)
        print(*(written.paths if url is None else [url]), sep="\n")
        if hub is not None:
            with pushable_later(asked.folder, asked.push):
                print(hub.push(folder))


def _tell_recommended(study: Study, asked: options.ExportOptions) -> None:
    """Remark that the best trial was written where a baseline is recommended."""
    is_chosen = (asked.trial, asked.baseline) != (None, None)
    if is_chosen or not study.is_search or verdict_of(study) is not None:
        return
    use = assess(study, None).recommended
    if use is not None and use.arm.baseline is not None:
        say(f"{use.text()}; to write that one: --baseline {use.arm.baseline}")


def dashboard(asked: options.DashboardOptions) -> None:
    """Serve the dashboard; Ctrl-C and SIGTERM are its usual end."""
    from search.report.dashboard import serve  # slow to import

    with contextlib.suppress(KeyboardInterrupt):
        serve(resolve_storage_url(asked.storage), port=asked.port, writable=asked.writable)
