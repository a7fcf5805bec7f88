"""The ledger under load: claims per second, a study of 10,000 trials, and the first limit.

Workers are threads of this process, each with its own ledger, engine and connections; their trials
take no time. So they show the ledger's limit on this machine, database included. A study needs far
less: 256 GPUs on trials of 20 minutes make 0.2 claims a second.
"""

import argparse
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import optuna
import sqlalchemy as sa
from optuna.samplers import BaseSampler
from sqlalchemy.exc import OperationalError

from benchmarks.common import DIGITS_STUDY, parser, publish, table
from benchmarks.large_study import fill
from benchmarks.servers import Server, postgres
from search.errors import StorageError
from search.spec.file import read_spec
from search.spec.sections import Member
from search.spec.space import make_sampler, search_space
from search.spec.study import StudySpec
from search.storage.engine import open_storage
from search.storage.ledger import Claim, Ledger
from search.study.study import Study

NAME = "ledger_scale"
MANY = 10**6  # trials planned: more than are ever run
DEFAULT_CONNECTIONS = 100  # PostgreSQL's default


@dataclass
class Times:
    """Seconds that calls took, in all threads together."""

    claims: list[float] = field(default_factory=list)
    tells: list[float] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def main() -> None:
    """Measure what is asked for and print."""
    options = parser(__doc__)
    options.add_argument("--workers", type=int, nargs="*", default=[1, 8, 64, 256], metavar="N")
    options.add_argument("--samplers", nargs="+", default=["RandomSampler", "TPESampler"])
    options.add_argument(
        "--seconds",
        type=float,
        default=10,
        help="length of each row of load (default: %(default)g)",
    )
    options.add_argument(
        "--trials", type=int, default=10_000, help="trials of the large study, or 0"
    )
    options.add_argument("--gp", type=int, nargs="*", default=[100, 300, 1000], metavar="TRIALS")
    options.add_argument("--max-connections", type=int, default=600, help="the server's limit")
    options.add_argument(
        "--no-limit", action="store_true", help="leave out the search for what breaks first"
    )
    given = options.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    parts = []
    with postgres(given.max_connections) as server:
        if given.workers:
            parts.append(_load(server, given))
        if given.trials:
            parts.append(_large(server, given.trials))
        if given.gp:
            parts.append(_gp(server, given.gp))
        about = server.version()
    if not given.no_limit:
        parts.append(_limit())
    body = f"{about}, its data on this machine's disk, fsync on.\n\n" + "\n\n".join(parts)
    publish(NAME, body, write=given.write, threads="no torch")


def _spec(sampler: str) -> StudySpec:
    """The digits study with that sampler and an inexhaustible budget."""
    spec = read_spec(DIGITS_STUDY)
    plan = replace(spec.search, sampler=Member(sampler), trials=MANY)
    return replace(spec, plan=plan)


def _load(server: Server, given: argparse.Namespace) -> str:
    """Claims per second and latencies by sampler and number of workers."""
    rows = []
    for sampler in given.samplers:
        for workers in given.workers:
            spec = _spec(sampler)
            url = server.new_database()
            study = Study.create(url, spec)
            gc.collect()  # the connections of the row before
            _say(f"{workers} workers, {sampler}")
            times, seconds, most = _run(server, url, spec, workers, given.seconds)
            counts = study.search.counts()
            assert (counts.complete, counts.running) == (len(times.tells), 0), counts
            rows.append(
                [
                    sampler,
                    workers,
                    most,
                    len(times.claims),
                    f"{len(times.claims) / seconds:.1f}",
                    *_milliseconds(times.claims),
                    *_milliseconds(times.tells),
                ]
            )
    header = ["sampler", "workers", "connections", "trials", "trials/s"]
    header += [f"{call} {part} ms" for call in ("claim", "tell") for part in ("p50", "p95")]
    body = table(header, rows)
    return f"""## Load

max_connections = {given.max_connections}. Each row is a study of its own that starts empty, for
{given.seconds:g} s. A trial is a claim and a tell of its value with 12 attributes, and no work
between.

{body}

Claims of one study go one at a time, under its lock. All workers share one Python interpreter and
these cores with the database: more workers wait longer, and none is refused."""


def _run(
    server: Server, url: str, spec: StudySpec, workers: int, seconds: float
) -> tuple[Times, float, int]:
    """All workers claim and tell for so long; also how many connections the server had at most."""
    times = Times()
    ready = threading.Barrier(workers + 1)
    until = [0.0]

    def work() -> None:
        try:
            ledger = Study.open(url, spec.name).search
        except StorageError as error:
            times.refused.append(str(error))
            ready.abort()
            return
        sampler, space = _sampler(spec), search_space(spec)
        ready.wait()
        while time.perf_counter() < until[0]:
            asked = time.perf_counter()
            claim = ledger.claim(space, sampler)
            claimed = time.perf_counter()
            assert isinstance(claim, Claim)
            _tell(ledger, claim)
            times.claims.append(claimed - asked)
            times.tells.append(time.perf_counter() - claimed)

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    until[0] = float("inf")
    try:
        ready.wait()
    except threading.BrokenBarrierError:
        raise SystemExit(f"{workers} workers do not fit: {times.refused[0]}") from None
    started = time.perf_counter()
    until[0] = started + seconds
    time.sleep(seconds / 2)
    connections = server.connections(url)
    for thread in threads:
        thread.join()
    return times, time.perf_counter() - started, connections


_ATTRIBUTES = {f"attribute_{i}": [0.1, 0.2, 0.3, 0.4] for i in range(12)}


def _value(claim: Claim) -> float:
    return 12.4 + (float(claim.params["a"]) - 1.0) ** 2


def _sampler(spec: StudySpec) -> Callable[[int], BaseSampler]:
    return lambda offset: make_sampler(spec, offset)


def _milliseconds(seconds: Sequence[float]) -> tuple[str, str]:
    """Median and 95th percentile."""
    if len(seconds) < 2:
        return ("-", "-") if not seconds else (f"{1e3 * seconds[0]:.0f}",) * 2
    cuts = statistics.quantiles(seconds, n=20, method="inclusive")
    return f"{1e3 * statistics.median(seconds):.0f}", f"{1e3 * cuts[18]:.0f}"


def _large(server: Server, trials: int) -> str:
    """A study of that many trials, on both databases."""
    with tempfile.TemporaryDirectory() as folder:
        columns = [
            _figures(url, trials)
            for url in (server.new_database(), f"sqlite:///{folder}/study.db")
        ]
    rows = [[name, *(f"{1e3 * column[name]:.0f}" for column in columns)] for name in columns[0]]
    body = table(["median ms", "PostgreSQL", "SQLite"], rows)
    return f"""## A study of {trials} trials

Each trial has a value, a parameter and 13 attributes.

{body}

The first claim of a ledger reads the study before it takes the study's lock, so others do not wait
for it. Later claims read only what is new."""


def _figures(url: str, trials: int) -> dict[str, float]:
    """What calls take there, in seconds, the median of some."""
    _say(f"{trials} trials in {url.partition(':')[0]}")
    spec, random = _spec("TPESampler"), _spec("RandomSampler")
    study, storage = Study.create(url, spec), open_storage(url)
    found = {"filling it by bulk SQL": _median(lambda: fill(study, storage, spec, trials))}
    for verb in ("status", "best"):
        found[f"`{verb}`, a new process"] = _median(lambda v=verb: _command(url, v), 3)
    ledger, claims = study.search, []
    for name, of, times in (
        ("first claim of a ledger", spec, 1),
        ("claim by TPE, warm", spec, 10),
        ("claim at random, warm", random, 10),
    ):
        found[name] = _median(lambda of=of: claims.append(_claim(ledger, of)), times)
    for name, call in (
        ("report of a value", lambda claim: ledger.report(claim, 1, 13.0)),
        ("tell", lambda claim: _tell(ledger, claim)),
    ):
        each = iter(claims)
        found[name] = _median(lambda call=call, each=each: call(next(each)), len(claims))
    found["counts"] = _median(ledger.counts, 5)
    return found


def _gp(server: Server, sizes: Sequence[int]) -> str:
    """The Gaussian process, whose cost grows with the cube of the trials."""
    spec, rows = _spec("GPSampler"), []
    for trials in sizes:
        _say(f"GP at {trials} trials")
        url = server.new_database()
        study = Study.create(url, spec)
        fill(study, open_storage(url), spec, trials)
        first, warm = (_median(lambda s=study: _one(s, spec), times) for times in (1, 3))
        rows.append([trials, f"{1e3 * first:.0f}", f"{1e3 * warm:.0f}"])
    body = table(["trials", "first claim and tell, ms", "warm, median ms"], rows)
    return f"""## Claims by GP

{body}

The very first one imports torch. The study's lock is held meanwhile: other workers wait."""


def _one(study: Study, spec: StudySpec) -> None:
    _tell(study.search, _claim(study.search, spec))


def _limit() -> str:
    """How many workers a server takes that has its default number of connections."""
    _say(f"the limit of {DEFAULT_CONNECTIONS} connections")
    spec = _spec("RandomSampler")
    held: list[Study] = []
    with postgres(DEFAULT_CONNECTIONS) as server:
        url = server.new_database()
        Study.create(url, spec)
        while (refusal := _joins(url, spec, held)) is None:
            pass
        connections = server.connections(url)
        answered = _ride(url, spec, held)
    each = connections / len(held)
    return f"""## What breaks first

Connections. With PostgreSQL's default max_connections = {DEFAULT_CONNECTIONS} worker
{len(held) + 1} is refused, at {connections} connections: {each:.1f} a worker, one for the study's
lock and one for Optuna, kept for the next claim; PostgreSQL reserves 3 for superusers. The
server's words:

> {refusal}

Nothing is lost: what a worker asks is asked again for 5 minutes, and a slot that cannot open the
study tries as long. A claim that was asked of the full server was answered after {answered:.1f} s:
other clients ended 3.0 s after it was asked. A server for N workers needs max_connections of
about {each:.0f} N + 20."""


def _joins(url: str, spec: StudySpec, held: list[Study]) -> str | None:
    """One more worker opens the study and claims a trial; or what it is told."""
    try:
        study = Study.open(url, spec.name)
    except StorageError as error:
        return str(error).partition("failed: ")[2].partition(";")[0]
    if _asked_within(lambda: _claim(study.search, spec), 5.0) is None:
        return "(no answer to its claim within 5 s: the claim's second connection is refused)"
    held.append(study)
    return None


def _asked_within(call: Callable[[], object], seconds: float) -> object:
    """What it answers, or None if it takes longer; it goes on in its thread."""
    answers: list[object] = []
    thread = threading.Thread(target=lambda: answers.append(call()), daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def _ride(url: str, spec: StudySpec, held: list[Study]) -> float:
    """Seconds that a claim takes of a full server, some of whose clients end after 3 s."""
    late = held[-1].search
    late.storage.engine.dispose()
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    others = []
    with suppress(OperationalError):
        while True:
            others.append(engine.connect())
    ending = threading.Timer(3.0, lambda: [each.close() for each in others])
    started = time.perf_counter()
    ending.start()
    _claim(late, spec)
    return time.perf_counter() - started


def _claim(ledger: Ledger, spec: StudySpec) -> Claim:
    claim = ledger.claim(search_space(spec), _sampler(spec))
    assert isinstance(claim, Claim)
    return claim


def _tell(ledger: Ledger, claim: Claim) -> None:
    ledger.complete(claim, _value(claim), _ATTRIBUTES)


def _command(url: str, verb: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "search", verb, _spec("TPESampler").name],
        env={**os.environ, "BDENSE_STORAGE": url},
        cwd=Path(__file__).parents[1],
        check=True,
        stdout=subprocess.DEVNULL,
    )


def _median(call: Callable[[], object], times: int = 1) -> float:
    """Seconds that a call takes, the median of some."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def _say(what: str) -> None:
    sys.stderr.write(f"{what}\n")


if __name__ == "__main__":
    main()
