"""A trial's time inside bdense and in the service around it."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import yaml
from optuna.trial import FrozenTrial, TrialState

from bdense.errors import InputError
from benchmarks.common import DIGITS_STUDY, parser, publish, table
from search.redaction import redact
from search.storage.engine import resolve_storage_url
from search.storage.ledger import Ledger

GOAL, GOAL_SECONDS = 0.05, 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialTimes:
    """One trial, times in seconds since 1970.

    Attributes:
        label: Number, or the baseline's method.
        started: Its row was made or taken, somewhere inside the claim.
        told: It became complete.
        inside: Seconds inside bdense, training and evaluation.
        saved: When its result lay on the disk; None where the runs folder is not here.
        device: What computed.
    """

    label: str
    worker: str
    started: float
    told: float
    inside: float
    saved: float | None
    device: str


def main() -> None:
    """Read a study, or run one, and print."""
    options = parser(__doc__)
    options.add_argument("--study", metavar="NAME", help="a finished, undisturbed study to read")
    options.add_argument("--storage", metavar="URL", help="its storage (default: as the command)")
    options.add_argument(
        "--file",
        type=Path,
        default=DIGITS_STUDY,
        help="without --study: the recipe to run (default: %(default)s)",
    )
    options.add_argument("--trials", type=int, default=6, help="trials of that run (default: 6)")
    options.add_argument(
        "--teacher-kimg", type=float, default=10, help="its teacher's training (default: 10)"
    )
    given = options.parse_args()
    if given.study:
        runs = Path(os.environ.get("BDENSE_RUNS") or "runs")
        rows = _rows(resolve_storage_url(given.storage), given.study, runs)
        body = _body(rows)
    else:
        rows, body = _run(given.file, given.trials, given.teacher_kimg)
    arguments = [redact(argument) for argument in sys.argv[1:]]
    trials_on = f"trials on {', '.join(sorted({row.device for row in rows}))}"
    publish("service_share", body, write=given.write, arguments=arguments, threads=trials_on)


def _run(recipe: Path, trials: int, teacher_kimg: float) -> tuple[list[TrialTimes], str]:
    """Launch the recipe with a smaller teacher in a folder of its own, as a user would."""
    spec = yaml.safe_load(recipe.read_text())
    spec["name"] = "service-share"
    spec["plan"]["trials"] = trials
    spec["teacher"]["train"]["kimg"] = teacher_kimg
    with tempfile.TemporaryDirectory() as folder:
        runs, study = Path(folder) / "runs", Path(folder) / "service-share.yaml"
        study.write_text(yaml.safe_dump(spec))
        environment = os.environ | {"BDENSE_RUNS": str(runs)}
        for name in ("BDENSE_STORAGE", "BDENSE_CACHE"):
            environment.pop(name, None)
        started = time.monotonic()
        command = [sys.executable, "-m", "search", "launch", str(study)]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        launch = time.monotonic() - started
        rows = _rows(f"sqlite:///{runs / 'bdense.db'}", spec["name"], runs)
    body = _body(rows)
    searching = max(row.told for row in rows) - min(row.started for row in rows)
    return (
        rows,
        f"""{body}

The whole launch took {launch:.1f} s, {searching:.1f} s of them from the first claim to the last
tell; the rest starts Ray and its workers, trains the teacher and records the trajectories, once
a study. The teacher is a small one ({teacher_kimg:g} kimg): what a trial costs does not depend
on how good it is.""",
    )


def _rows(url: str, name: str, runs: Path) -> list[TrialTimes]:
    """Complete trials and baselines."""
    rows = []
    for study_name in (f"{name}.baselines", name):
        try:
            study = Ledger.open(url, study_name, budget=None).study
        except InputError as error:
            raise SystemExit(str(error)) from error
        trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if any(trial.user_attrs["tries"] > 1 for trial in trials):
            raise SystemExit(
                f"study {study_name} lost workers, so their time is unknown; give one that ran "
                "undisturbed"
            )
        rows += [_row(trial, runs) for trial in trials]
    return rows


def _row(trial: FrozenTrial, runs: Path) -> TrialTimes:
    assert trial.datetime_start is not None
    assert trial.datetime_complete is not None
    attrs = trial.user_attrs
    result = (runs / attrs["student"]).with_name("result.json")
    return TrialTimes(
        label=str(trial.params.get("method", trial.number)),
        worker=attrs["worker"],
        started=trial.datetime_start.timestamp(),
        told=trial.datetime_complete.timestamp(),
        inside=sum(attrs["timings"][f"{part}_seconds"] for part in ("student", "evaluation")),
        saved=result.stat().st_mtime if result.exists() else None,
        device=attrs["device"],
    )


def _body(rows: list[TrialTimes]) -> str:
    by_worker = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.started):
        by_worker[row.worker].append(row)
    lines, walls, service = [], 0.0, 0.0
    for index, own in enumerate(by_worker.values()):
        wall = own[-1].told - own[0].started
        outside = wall - sum(row.inside for row in own)
        cells = [f"{wall:.2f}", f"{outside:.2f}", f"{outside / wall:.2%}"]
        lines.append([index, len(own), *cells])
        walls, service = walls + wall, service + outside
    each = service / len(rows)
    long = each / (GOAL_SECONDS + each)
    share, inside = service / walls, statistics.median(row.inside for row in rows)
    workers = table(["worker", "trials", "wall s", "outside bdense s", "share"], lines)
    return f"""\
{workers}

**Service: {share:.2%} of the workers' time**, {1e3 * each:.0f} ms for each of {len(rows)} trials \
of {inside:.1f} s inside bdense (median).
For a trial of {GOAL_SECONDS:g} s inside bdense that is {long:.2%}; the goal is under {GOAL:.0%}.

{_gaps(by_worker.values())}

Wall time is from a worker's first claim to its last tell. Between trials: the end of the last
tell, dropping students that are not among the best, and the claim up to the row's start. Claim
and save: the rest of the claim (the proposal), and writing student and result. Tell: storing the
attributes and the value. The thread that renews the lease runs beside bdense and counts as it."""


def _gaps(workers: Iterable[list[TrialTimes]]) -> str:
    """What the service does around a trial, in milliseconds."""
    between = [b.started - a.told for own in workers for a, b in pairwise(own)]
    rows = [row for own in workers for row in own]
    parts = {
        "between trials": between,
        "claim and save": [r.saved - r.started - r.inside for r in rows if r.saved is not None],
        "tell": [r.told - r.saved for r in rows if r.saved is not None],
        "claim, save and tell": [r.told - r.started - r.inside for r in rows],
    }
    lines = [
        [name, f"{1e3 * statistics.median(seconds):.0f}", f"{1e3 * max(seconds):.0f}"]
        for name, seconds in parts.items()
        if seconds
    ]
    return table(["part of the service, ms a trial", "median", "most"], lines)


if __name__ == "__main__":
    main()
