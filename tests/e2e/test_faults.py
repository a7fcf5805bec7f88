"""A study of fixed points under faults, one every few trials, over real processes.

BDENSE_FAULT_SEED gives the draw of an earlier run again, BDENSE_FAULT_TRIALS another size. Faults
are paced by the trials that complete, so that a slow machine meets no more of them a trial.
"""

import contextlib
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.engine import make_url

from search.errors import ClusterLostError
from search.storage.engine import resolve_storage_url
from search.study.study import Study
from search.study.trial_log import LOG_FILE, read_log
from tests.conftest import Postgres
from tests.contracts.scene import lease_rows
from tests.e2e.chaos import (
    LEASE_SECONDS,
    Chaos,
    Network,
    Supervisor,
    can_cut_networks,
    end_all,
    measure_calmly,
    network,
)
from tests.e2e.study import Workplace, small_study
from tests.studies import spec

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.postgres]

NAME = "faults"
TRIALS = int(os.environ.get("BDENSE_FAULT_TRIALS", "200"))
MOST_IDLE_SECONDS = 600.0  # in which no trial completes
CHECKPOINT_SECONDS = 0.1
JITTER_SECONDS = 0.05  # of the log's times
# 7 iterations, about half a second.
STUDY = small_study(
    name=NAME,
    plan={"trials": TRIALS},
    method={"kimg": 0.448, "batch": 64},
    evaluation={"images": 64, "batch": 64},
    resources={
        "checkpoint_seconds": CHECKPOINT_SECONDS,
        "lease_seconds": LEASE_SECONDS,
        # A worker that is killed is not the trial's doing here.
        "max_attempts": 1000,
    },
)
POINTS = [-0.5 + 3.0 * i / TRIALS for i in range(TRIALS)]


@pytest.fixture(scope="module")
def cable() -> Iterator[Network | None]:
    """Between the launch and its database, where one can be laid."""
    if not can_cut_networks():
        sys.stderr.write("the network is not cut: no root, or no `ip netns`\n")
        yield None
        return
    with network(os.getpid() % 250) as laid:
        yield laid


@pytest.fixture
def database(postgres: Postgres, cable: Network | None) -> Iterator[str]:
    """URL of a new database, over the cable if there is one."""
    url = postgres.new_database()
    if cable is None:
        yield url
        return
    settings, rules = postgres.data / "postgresql.conf", postgres.data / "pg_hba.conf"
    before = settings.read_text(), rules.read_text()
    settings.write_text(before[0] + f"listen_addresses = '{cable.here}'\n")
    rules.write_text(before[1] + f"host all all {cable.there}/24 trust\n")
    # A restart would keep what the wheel gave on the command line.
    postgres.control("stop", "-m", "immediate")
    postgres.control("start")
    try:
        socket = make_url(url)
        port = int(socket.query.get("port", 5432))
        yield socket.set(host=cable.here, port=port, query={}).render_as_string()
    finally:
        settings.write_text(before[0])
        rules.write_text(before[1])
        with contextlib.suppress(Exception):
            postgres.control("stop", "-m", "immediate")
        postgres.control("start")


def test_nothing_is_lost_or_counted_twice_whatever_fails(
    tmp_path, tmp_path_factory, postgres, database, cable, capsys, monkeypatch
):
    seed = int(os.environ.get("BDENSE_FAULT_SEED") or random.SystemRandom().randrange(10**6))
    place = Workplace(tmp_path, tmp_path_factory.mktemp("cache"), storage=database)
    file = place.write(STUDY)
    study = Study.create(resolve_storage_url(database), spec(STUDY))
    for a in POINTS:
        study.search.enqueue({"a": a})

    launch = Supervisor(
        [
            *(cable.command() if cable else []),
            *(sys.executable, "-m", "search", "launch", str(file), "--workers", "2"),
        ],
        tmp_path,
        place.environment,
    )
    runs = tmp_path / "runs"
    chaos = Chaos(seed, resolve_storage_url(database), NAME, runs, launch, postgres, cable)
    begun = time.monotonic()
    try:
        complete, since = 0, begun  # the first launch makes teacher and trajectories
        while launch.keep_running():
            counts = study.search.counts()
            if counts.complete > complete:
                complete, since = counts.complete, time.monotonic()
            assert time.monotonic() - since < MOST_IDLE_SECONDS, f"nothing goes on: {counts}"
            chaos.strike_if_due(complete)
            time.sleep(0.2)
    finally:
        chaos.end()
        end_all(str(place.cache))
        told = report(chaos, launch, time.monotonic() - begun)
        with capsys.disabled():
            sys.stdout.write(f"\n{told}\n")

    calm_begun = time.monotonic()
    monkeypatch.setenv("BDENSE_CACHE", str(place.cache))
    monkeypatch.setenv("BDENSE_RUNS", str(runs))
    trials = study.search.study.get_trials(deepcopy=False)
    # Each that was taken over, and of the others every fifth.
    compared = [
        trial.params["a"]
        for trial in trials
        if trial.number % 5 == 0
        or adopted(read_log(runs / NAME / f"{trial.number:05d}" / LOG_FILE)[0])
    ]
    calm = measure_calmly(file, compared, tmp_path / "calm")
    calm_seconds = time.monotonic() - calm_begun

    counts = study.search.counts()
    # 0 lost, 0 stuck.
    assert counts.planned == counts.complete + counts.pruned + counts.failed == TRIALS, told
    assert (counts.failed, counts.running, counts.waiting) == (0, 0, 0), told
    # 0 twice, and every FID that of a calm run, bit for bit.
    assert sorted(t.params["a"] for t in trials) == POINTS, told
    found = {trial.params["a"]: trial.value for trial in trials}
    assert {a: found[a] for a in compared} == calm, told
    baselines = study.given.counts()
    assert (baselines.complete, baselines.planned) == (2, 2)
    assert lease_rows(database) == []
    for trial in trials:
        result = runs / NAME / f"{trial.number:05d}" / "result.json"
        assert json.loads(result.read_text())["value"] == trial.value

    losses = takeovers(runs / NAME)
    again = Counter(len(loss.steps) for loss in losses)
    with capsys.disabled():
        sys.stdout.write(
            f"calm run {calm_seconds:.0f} s; steps that a takeover computed again, and how often: "
            f"{dict(sorted(again.items()))}\n"
        )
    # All but the step under way lie within one interval from what was saved last.
    assert (
        max((loss.seconds for loss in losses), default=0) <= CHECKPOINT_SECONDS + JITTER_SECONDS
    ), told

    if 10 * chaos.round <= TRIALS:
        assert set(chaos.hits) == set(chaos.kinds), told
        assert losses, told
        assert chaos.fenced, told
    for status, err in launch.ended:
        assert "Traceback" not in err, err
        assert status in (0, ClusterLostError.exit_status, 2, -9), err

    doctor = place.run("doctor", NAME, "--fix", "--json")
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr


@dataclass(frozen=True)
class Loss:
    """What a takeover computed again: ``steps``, and how long the worker before it spent on all
    but the last of them since it had saved."""

    steps: list[int]
    seconds: float


def adopted(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of a log that tell of a takeover."""
    return [event for event in events if event["event"] == "adopted"]


def takeovers(folder: Path) -> list[Loss]:
    """Of each attempt that went on with another's training, by the trials' own logs."""
    found = []
    for path in sorted(folder.glob(f"*/{LOG_FILE}")):
        events = [e | {"at": datetime.fromisoformat(e["time"])} for e in read_log(path)[0]]
        for takeover in adopted(events):
            mine = [e for e in events if e["attempt"] == takeover["attempt"]]
            first = next((e["iteration"] for e in mine if e["event"] == "training"), None)
            # A worker that was cut off may have gone on beside this one.
            before = [
                e
                for e in events
                if e["attempt"] < takeover["attempt"] and e["at"] < takeover["at"]
            ]
            trained = [e for e in before if e["event"] == "training"]
            if first is None or not trained:
                continue
            last = trained[-1]["attempt"]
            lost = [e for e in trained if e["attempt"] == last and e["iteration"] >= first]
            saved = [
                e["at"]
                for e in before
                if e["event"] == "checkpoint" and e["attempt"] == last and e["iteration"] < first
            ]
            seconds = 0.0
            if len(lost) > 1:
                since = saved[-1] if saved else lost[0]["at"]
                seconds = (lost[-2]["at"] - since).total_seconds()
            found.append(Loss([e["iteration"] for e in lost], seconds))
    return found


def report(chaos: Chaos, launch: Supervisor, seconds: float) -> str:
    """What was done to the study."""
    hits = ", ".join(f"{kind} {number}" for kind, number in sorted(chaos.hits.items()))
    ends = [f"  status {status}: {(err.splitlines() or [''])[-1]}" for status, err in launch.ended]
    return "\n".join(
        [
            f"BDENSE_FAULT_SEED={chaos.seed}: {sum(chaos.hits.values())} faults in "
            f"{seconds:.0f} s: {hits}",
            *chaos.log,
            f"the command ended {len(ends)} times:",
            *ends,
        ]
    )
