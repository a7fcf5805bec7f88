"""Trials that count steps, run by Optuna, by Ray Tune, or as a program: see faults_vs_peers.

The part that runs as a trial's program imports the standard library alone, so that a process is
back soon after it was killed.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

STUDY, WORKERS, STEPS = "faults", 2, 20
STEP = "BENCH_STEP_SECONDS"  # in the environment
LEASE_SECONDS = 10


def work(
    folder: Path,
    key: str,
    log: Path,
    after: Callable[[int], None],
    processes: Sequence[int] = (),
) -> float:
    """The trial: steps from where its folder says that an earlier process ended.

    Args:
        folder: Keeps the number of steps.
        key: Names the trial in the log, whichever process works on it.
        log: Gets a line a step.
        after: Called with each step.
        processes: That the trial needs, first the one that a fault is to meet; by default this
            one alone.
    """
    needed = list(processes) or [os.getpid()]
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "step"
    for step in range(int(kept.read_text()) if kept.exists() else 0, STEPS):
        time.sleep(float(os.environ[STEP]))
        with log.open("a") as file:
            file.write(f"{json.dumps([key, step, needed])}\n")
        scratch = kept.with_suffix(".partial")
        scratch.write_text(str(step + 1))
        scratch.replace(kept)
        after(step)
    return 0.0


def run_optuna(url: str, folder: Path, trials: int) -> None:
    """One of the processes."""
    import optuna
    from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
    from optuna.trial import TrialState

    storage = RDBStorage(
        url,
        heartbeat_interval=2,
        grace_period=LEASE_SECONDS,
        heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
    )
    study = optuna.load_study(study_name=STUDY, storage=storage)

    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_int("x", 0, trials - 1)
        stored = study.get_trials(deepcopy=False)[trial.number]
        first = RetryHeartbeatStaleTrialCallback.retried_trial_number(stored)
        own = folder / "trials" / str(trial.number if first is None else first)
        return work(own, str(x), folder / "log", lambda _: None)

    enough = optuna.study.MaxTrialsCallback(trials, states=(TrialState.COMPLETE,))
    if sum(t.state == TrialState.COMPLETE for t in study.get_trials(deepcopy=False)) < trials:
        study.optimize(objective, callbacks=[enough])


def run_tune(url: str, folder: Path, trials: int) -> None:
    """The driver."""
    import optuna
    import ray
    from optuna.storages import RDBStorage
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    def trainable(config: dict[str, Any]) -> None:
        found = tune.get_checkpoint()
        own = Path(tempfile.mkdtemp(dir=folder))
        if found is not None:
            with found.as_directory() as saved:
                (own / "step").write_text((Path(saved) / "step").read_text())

        def after(step: int) -> None:
            tune.report({"loss": 0.0}, checkpoint=tune.Checkpoint.from_directory(own))

        work(own, str(config["x"]), folder / "log", after)

    ray.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False)
    runs = str(folder / "tune")
    if tune.Tuner.can_restore(f"{runs}/{STUDY}"):
        tuner = tune.Tuner.restore(f"{runs}/{STUDY}", trainable, resume_errored=True)
    else:
        x = optuna.distributions.IntDistribution(0, trials - 1)
        space: dict[str, optuna.distributions.BaseDistribution] = {"x": x}
        points = [{"x": x} for x in range(trials)]
        search = OptunaSearch(
            space, "loss", "min", points, storage=RDBStorage(url), study_name=STUDY
        )
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=search,
                metric="loss",
                mode="min",
                num_samples=trials,
                max_concurrent_trials=WORKERS,
            ),
            run_config=tune.RunConfig(
                name=STUDY,
                storage_path=runs,
                failure_config=tune.FailureConfig(max_failures=-1),
                verbose=0,
            ),
        )
    tuner.fit()


def program_processes() -> list[int]:
    """The worker, its guard, which is this process's parent, and this process."""
    guard = os.getppid()
    status = Path(f"/proc/{guard}/stat").read_text()
    return [int(status.rpartition(")")[2].split()[1]), guard, os.getpid()]


def run_program(folder: Path) -> None:
    """The program of a study of method ``command``."""
    own = Path(os.environ["BDENSE_FOLDER"])
    value = work(own, str(own), folder / "log", lambda _: None, program_processes())
    Path(os.environ["BDENSE_RESULT"]).write_text(json.dumps({"loss": value}))


def main(system: str, folder: Path, *rest: str) -> None:
    """``python -m benchmarks.counting SYSTEM FOLDER [URL TRIALS]``."""
    if system == "program":
        run_program(folder)
    else:
        url, trials = rest
        {"optuna": run_optuna, "tune": run_tune}[system](url, folder, int(trials))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
