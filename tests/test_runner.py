"""How trials are spread over a cluster's machines."""

import contextlib
import dataclasses
import os
import pickle
import signal
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from bdense.errors import InputError
from search.run import runner
from search.spec.study import StudySpec
from search.storage.engine import resolve_storage_url
from search.storage.stop_flags import Launch
from search.study.study import Study
from search.worker.ray_tasks import WorkerConfig
from search.worker.trainer import Preparation, Step
from tests.studies import spec

ONE_GPU_EACH = [(8, 1), (8, 1), (8, 1)]
TWO_GPUS_EACH = [(16, 2), (16, 2)]


@pytest.fixture
def cluster(monkeypatch):
    """Sets up a cluster of machines with so many (CPUs, GPUs)."""

    def of(machines: list[tuple[float, float]]) -> None:
        dead = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
        alive = [{"Alive": True, "Resources": {"CPU": c, "GPU": g}} for c, g in machines]
        monkeypatch.setattr(ray, "nodes", lambda: [dead, *alive])
        totals = {"CPU": sum(c for c, _ in machines), "GPU": sum(g for _, g in machines)}
        monkeypatch.setattr(ray, "cluster_resources", lambda: totals)

    return of


@pytest.mark.parametrize(
    ("machines", "resources", "slots"),
    [
        ([(8, 0)], {"cpus": 1}, 8),
        ([(8, 0), (3, 0)], {"cpus": 2}, 4 + 1),
        (ONE_GPU_EACH, {}, 3),
        (ONE_GPU_EACH, {"gpus": 0.25}, 12),
        (ONE_GPU_EACH, {"gpus": 0.25, "cpus": 4}, 6),
        (ONE_GPU_EACH, {"gpus": 0}, 24),
        # A share is of one GPU: what is left of two makes no third trial.
        (TWO_GPUS_EACH, {"gpus": 0.6}, 4),
        (TWO_GPUS_EACH, {"gpus": 0.1}, 32),
        ([(64, 1)], {"gpus": 1 / 49}, 49),
        # Four GPUs in all, two of one machine for each trial.
        (TWO_GPUS_EACH, {"gpus": 2}, 2),
        ([(16, 3), (16, 1)], {"gpus": 2}, 1),
    ],
)
def test_a_trial_has_its_cpus_and_gpus_of_one_machine(cluster, machines, resources, slots):
    cluster(machines)
    assert runner._slots(spec(resources=resources).resources, None) == slots


def test_what_fits_on_no_machine_is_refused(cluster):
    cluster(ONE_GPU_EACH)
    with pytest.raises(InputError, match=r"resources\.cpus=4 and gpus=2 .* 8 CPUs and 1 GPUs or"):
        runner._slots(spec(resources={"gpus": 2, "cpus": 4}).resources, None)


@pytest.mark.parametrize(
    ("machines", "resources", "workers", "says"),
    [
        (TWO_GPUS_EACH, {"gpus": 2}, 3, r"takes 1 CPUs and 2 GPUs, .* room for 2 trials"),
        (TWO_GPUS_EACH, {"gpus": 0.6}, 5, r"room for 4 trials.* resources\.gpus below 1"),
        ([(2, 0)], {}, 3, r"takes 1 CPUs and 0 GPUs, .* room for 2 trials"),
    ],
)
def test_more_workers_than_fit_are_refused(cluster, machines, resources, workers, says):
    cluster(machines)
    asked = spec(resources=resources).resources
    assert runner._slots(asked, 1) == 1
    with pytest.raises(InputError, match=rf"^workers {workers} .*{says}"):
        runner._slots(asked, workers)


@pytest.fixture
def study(tmp_path, monkeypatch) -> Study:
    """Just made: nothing of it has run."""
    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("BDENSE_CACHE", str(tmp_path / "cache"))
    return Study.create(resolve_storage_url(f"sqlite:///{tmp_path}/study.db"), spec())


@pytest.fixture
def without_ray(monkeypatch):
    """Puts stand-ins in the place of a session, the preparations and the slots."""

    def be(session=lambda: None, prepare=lambda: None, slots=lambda: None) -> None:
        @contextlib.contextmanager
        def entered(url: str) -> Iterator[SimpleNamespace]:
            session()
            yield SimpleNamespace(lost=False)

        monkeypatch.setattr(runner, "ray_session", entered)
        monkeypatch.setattr(runner, "_await_machines", lambda: None)
        monkeypatch.setattr(runner, "_slots", lambda *_: 1)
        monkeypatch.setattr(runner, "_prepare", lambda *_: prepare())
        monkeypatch.setattr(runner, "_run_slots", lambda *_: slots() or [])

    return be


def run(study: Study) -> None:
    launch = Launch.begin(study.ledgers)
    runner.run(study, launch, workers=1, on_preparing=lambda _: None, on_running=lambda: None)


def test_ray_s_remarks_do_not_mix_with_the_result(study, without_ray, capsys):
    """It tells of a worker that died on standard output, whatever it is doing."""

    def remark() -> None:
        sys.stdout.write("(raylet) A worker died or was killed\n")

    without_ray(session=remark, prepare=remark)
    run(study)
    sys.stdout.write("the result\n")
    assert capsys.readouterr().out == "the result\n"


def test_a_launch_whose_workers_saved_and_ended_forgives_nobody(study, without_ray, monkeypatch):
    """What still runs is another launch's: its attempts are not this one's to forgive."""
    forgiven: list[str] = []
    monkeypatch.setattr(Study, "forgive_running", lambda self: forgiven.append(self.name))
    without_ray(slots=lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run(study)
    assert forgiven == []
    without_ray(prepare=lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run(study)
    assert forgiven == [study.name]


WORKER = WorkerConfig(study="digits", storage="", runs="", cache="")


@pytest.fixture
def started(monkeypatch) -> list[tuple[Any, ...]]:
    """Tasks that would run on Ray: name, CPUs, GPUs, and what else each was given."""
    tasks: list[tuple[Any, ...]] = []

    class Task:
        def __init__(self, function, cpus: float, gpus: float) -> None:
            self.asked = (function.__name__, cpus, gpus)

        def remote(self, worker: WorkerConfig, *given: int) -> None:
            assert worker == WORKER
            tasks.append((*self.asked, given))

    monkeypatch.setattr(runner, "_task", Task)
    left = Preparation(step=Step.TRAJECTORIES, done=1, total=9)
    monkeypatch.setattr(runner, "_follow", lambda *_: left)
    return tasks


def prepare(study: StudySpec, slots: int) -> None:
    runner._prepare(study, WORKER, slots, lambda _: None)


@pytest.mark.parametrize(
    ("machines", "resources", "slots", "prepared", "recorded"),
    [
        # The preparation is told how many trials share a machine's memory.
        ([(4, 0), (2, 0)], {"threads": 1}, 6, (1, 0, (4,)), (1, 0, 6)),
        ([(4, 0), (2, 0)], {}, 3, (1, 0, (3,)), (1, 0, 3)),
        # A team of two records on each of its GPUs.
        (TWO_GPUS_EACH, {"gpus": 2, "cpus": 4}, 2, (4, 1, (1,)), (2, 1, 4)),
    ],
)
def test_what_is_prepared_and_recorded_where(
    cluster, started, machines, resources, slots, prepared, recorded
):
    cluster(machines)
    prepare(spec(resources=resources), slots)
    first, *others = started
    assert first == ("prepare_task", *prepared)
    cpus, gpus, parts = recorded
    assert others == [("record_task", cpus, gpus, (part, parts)) for part in range(parts)]


@pytest.mark.parametrize(
    ("gpus", "threads", "cpus"),
    # CPUs of a machine that has the GPU too, or the task would wait for ever.
    [("auto", 16, 8), (0.5, 16, 8), ("auto", 4, 4), (0, 16, 16), (0, 99, 64)],
)
def test_a_machine_can_run_the_preparation(cluster, started, gpus, threads, cpus):
    cluster([(64, 0), (8, 1)])
    prepare(spec(resources={"gpus": gpus}, teacher__train__threads=threads), 1)
    share = 1 if gpus == "auto" else gpus
    assert started[0] == ("prepare_task", cpus, share, (1,))


@pytest.mark.parametrize(
    "last",
    [
        None,
        Preparation(step=Step.TEACHER, done=1, total=2),
        Preparation(step=Step.TRAJECTORIES, done=9, total=9),
    ],
)
def test_where_no_trajectories_are_left_there_is_one_task(cluster, started, monkeypatch, last):
    cluster([(4, 0)])
    monkeypatch.setattr(runner, "_follow", lambda *_: last)
    prepare(spec(), 4)
    assert started == [("prepare_task", 1, 0, (4,))]


def test_no_secret_is_in_what_ray_pickles(study, without_ray, monkeypatch):
    url = "postgresql+psycopg2://me:hunter2@db/studies?sslpassword=hunter2"
    told: list[WorkerConfig] = []
    without_ray()
    monkeypatch.setattr(runner, "_prepare", lambda _, worker, *__: told.append(worker))
    run(dataclasses.replace(study, url=url))
    assert told[0].storage.startswith("postgresql+psycopg2://me@db/studies")
    assert b"hunter2" not in pickle.dumps(told)
