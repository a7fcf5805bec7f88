"""While a study runs: ``stop`` it, ``enqueue`` a point, read the ``logs`` of a trial."""

import json
import sys
import time

from bdense.errors import BdenseError, InputError
from bdense.knobs import Knobs
from bdense.weights.parameters import given_parameters
from bdense.weights.space import require_point
from search.analysis.pilot import ledgers_with_pilot
from search.report.log_lines import HEADER, LOSSES, has_losses, log_line, logged_row
from search.storage.ledger import MENDABLE
from search.storage.stop_flags import ask_all, held
from search.study.folders import row_folder
from search.study.trial_log import LOG_FILE, read_log
from search.verbs.common import open_study
from search.verbs.options import EnqueueOptions, LogsOptions, StopOptions

POLL_SECONDS = 0.5


def stop(asked: StopOptions) -> None:
    """Ask the workers to stop, and with --wait wait until they have."""
    record = open_study(asked)
    ledgers = ledgers_with_pilot(record)
    ask_all(ledgers)
    working = held(ledgers)
    longest = max(ledger.ttl for ledger in ledgers)
    print(
        f"study {record.name}: asked {working} running trials to stop; launchers end with them"
        if working
        else f"study {record.name}: no trial is worked on; launchers, if there are any, end",
        flush=True,
    )
    if not asked.wait:
        return
    # Leases of dead workers have expired by then.
    deadline = time.monotonic() + 2 * longest + 60.0
    while left := held(ledgers):
        if time.monotonic() > deadline:
            raise BdenseError(
                f"{left} trials are still held after {2 * longest + 60:g} s; see who holds them: "
                f"bdense-search status {record.name}"
            )
        time.sleep(POLL_SECONDS)
    print(f"study {record.name} is stopped: no trial is worked on")


def enqueue(asked: EnqueueOptions, parameters: Knobs) -> None:
    """Plan the point, and say when it runs."""
    given = given_parameters(parameters, asked.set or ())
    # Checked against the stored spec, which workers use; the file may have changed since.
    study = open_study(asked)
    spec, trials = study.spec, study.search
    params = require_point(spec.space, given, spec.resolved.num_branches)
    text = ", ".join(f"{k} {v:g}" if isinstance(v, float) else str(v) for k, v in params.items())
    if not trials.enqueue(params, again=MENDABLE):
        print(f"{text} is a trial of study {study.name} already; nothing is planned")
        return
    print(f"planned in study {study.name}: {text}, before any other point")
    counts = trials.counts()
    if (needed := counts.total) > trials.budget:
        print(
            f"plan.trials, {trials.budget}, leaves no room for it; to run it: "
            f"bdense-search launch {study.name} --trials {needed}"
        )
    elif not counts.running:
        print(
            f"it is the next to run; if no launcher is at work: bdense-search launch {study.name}"
        )


def logs(asked: LogsOptions) -> None:
    """Print the events of a row, and with --follow those to come."""
    study = open_study(asked, reading=True)
    ledger, number = logged_row(study, asked.trial, asked.baseline)
    path = row_folder(ledger.name, number) / LOG_FILE
    offset, shown, explained = 0, 0, False
    while True:
        state = ledger.state_of(number)
        events, offset = read_log(path, offset)
        for event in events:
            if asked.json:
                print(json.dumps(event))
            else:
                if not shown:
                    print(HEADER)
                if has_losses(event) and not explained:
                    print(LOSSES)
                    explained = True
                print(log_line(event))
            shown += 1
        sys.stdout.flush()
        if not asked.follow or (state is not None and state.is_finished()):
            break
        time.sleep(POLL_SECONDS)
    if not shown:
        raise InputError(
            f"trial {number} has no log in {path.resolve().parent}: no worker has taken it yet, "
            "or its worker writes to another folder (BDENSE_RUNS)"
        )
