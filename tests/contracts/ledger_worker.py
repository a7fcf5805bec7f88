"""A launcher and its workers without torch: what the ledger's contract suite kills and freezes.

``python ledger_worker.py STUDY FOLDER [--budget N --workers N]`` with the storage in
BDENSE_STORAGE. A trial counts to STEPS, keeps its step in a file, appends each step it computes to
a log, and writes its result before it is told.
"""

import argparse
import json
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import optuna
from optuna.distributions import FloatDistribution
from optuna.samplers import RandomSampler

from bdense.files import atomic_write
from search.errors import LeaseLostError
from search.storage.ledger import Claim, Done, LeaseRenewal, Ledger, Wait

SPACE = {"a": FloatDistribution(-1.0, 3.0), "b": FloatDistribution(-6.0, 0.0)}
STEPS = 8
STEP_SECONDS = 0.1
# While this file lies in the folder nobody computes the step in the middle.
GATE = "gate"


def objective(params: dict[str, float]) -> float:
    """A bowl: each pair (a, b) has one value, whoever computes it."""
    return (params["a"] - 1.0) ** 2 + (params["b"] + 4.0) ** 2


def run_trial(claim: Claim, folder: Path, held: LeaseRenewal) -> float:
    """Go on from the step stored in the trial's folder."""
    trial = folder / str(claim.number)
    trial.mkdir(parents=True, exist_ok=True)
    result = trial / "result.json"
    if result.exists():
        return float(json.loads(result.read_text())["value"])
    step_file = trial / "step"
    first = int(step_file.read_text()) if step_file.exists() else 0
    for step in range(first, STEPS):
        time.sleep(STEP_SECONDS)
        while step == STEPS // 2 and (folder / GATE).exists():
            time.sleep(0.02)
        held.check()
        line = {"pid": os.getpid(), "attempt": claim.attempt, "step": step}
        with (trial / "log").open("a") as log:
            log.write(json.dumps(line) + "\n")
        with atomic_write(step_file) as scratch:
            scratch.write_text(str(step + 1))
        held.report(f"step {step + 1} of {STEPS}")
    value = objective(dict(claim.params))
    with atomic_write(result) as scratch:
        scratch.write_text(json.dumps({"value": value}))
    return value


def work(ledger: Ledger, folder: Path) -> None:
    """One worker: trials until there are none."""
    while not isinstance(claim := ledger.claim(SPACE, RandomSampler), Done):
        if isinstance(claim, Wait):
            time.sleep(0.1)
            continue
        try:
            with ledger.holding(claim) as held:
                value = run_trial(claim, folder, held)
            ledger.complete(claim, value, {"attempt": claim.attempt})
        except LeaseLostError as error:
            with (folder / "lost").open("a") as file:
                file.write(f"{error}\n")


def launch(arguments: argparse.Namespace) -> None:
    """The launcher: its workers outlive it unless they are killed too."""
    ledger = Ledger.open(
        os.environ["BDENSE_STORAGE"],
        arguments.study,
        budget=arguments.budget,
        ttl=arguments.ttl,
    )
    ledger.storage.engine.dispose()  # a fork would share its connections
    command = (arguments.study, str(arguments.folder))
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=main, args=(command,)) for _ in range(arguments.workers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    sys.exit(max(abs(worker.exitcode or 0) for worker in workers))


def run_apart(url: str, *command: str) -> None:
    """The program in a process group of its own, of a process that was forked for it."""
    os.setsid()
    os.environ["BDENSE_STORAGE"] = url
    main(command)


def main(command: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("study")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--budget", type=int)
    parser.add_argument("--ttl", type=float)
    parser.add_argument("--workers", type=int, default=0)
    arguments = parser.parse_args(command)
    logging.basicConfig(level=logging.INFO)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if arguments.workers:
        launch(arguments)
    else:
        ledger = Ledger.open(os.environ["BDENSE_STORAGE"], arguments.study, budget=None)
        work(ledger, arguments.folder)


if __name__ == "__main__":
    main()
