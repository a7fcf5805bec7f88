"""How trials are spread over a cluster's machines."""

import contextlib
import json
import os
import pickle
import signal
import sys
from collections.abc import Iterator

import pytest
import ray

from bdense.errors import InputError
from search.run import runner
from search.storage.stop_flags import NO_LAUNCH
from search.worker.ray_tasks import Kind, Orders
from tests.studies import promotion, spec

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
    with pytest.raises(InputError) as error:
        runner._slots(spec(resources={"gpus": 2, "cpus": 4}).resources, None)
    assert str(error.value) == (
        "a trial asks for resources.cpus=4 and gpus=2 of one machine, and the cluster's have "
        "8 CPUs and 1 GPUs or 8 CPUs and 1 GPUs or 8 CPUs and 1 GPUs; lower them"
    )


def test_more_workers_than_fit_are_refused(cluster):
    cluster(TWO_GPUS_EACH)
    resources = spec(resources={"gpus": 2}).resources
    assert runner._slots(resources, 1) == 1
    with pytest.raises(InputError) as error:
        runner._slots(resources, 3)
    assert str(error.value) == (
        "--workers 3 are more workers than GPUs: a trial holds 2, and 4 are there, which is room "
        "for 2 trials; lower --workers, or set resources.gpus below 1 so that trials share a GPU"
    )
    with pytest.raises(InputError) as error:
        runner._slots(spec(resources={"gpus": 0.6}).resources, 5)
    assert str(error.value) == (
        "--workers 5 are more workers than GPUs: a trial holds 0.6, and 4 are there, which is "
        "room for 4 trials; lower --workers, or resources.gpus so that trials share a GPU"
    )
    cluster([(2, 0)])
    with pytest.raises(InputError, match=r"--workers 3 do not fit: .* room for 2 trials of 1 CPU"):
        runner._slots(spec().resources, 3)


class EndedRows:
    """A record of which nothing is left."""

    url, name, ledgers = "sqlite:////nowhere.db", "digits", ()

    def left(self) -> int:
        return 0

    def forgive_running(self) -> None:
        raise AssertionError("nothing runs")


def test_ray_s_remarks_do_not_mix_with_the_result(monkeypatch, capsys):
    """It tells of a worker that died on standard output, whatever it is doing."""

    @contextlib.contextmanager
    def session(url: str) -> Iterator[None]:
        sys.stdout.write("(raylet) A worker died or was killed\n")
        yield

    def prepare(*_: object) -> None:
        sys.stdout.write("(raylet) A worker died or was killed\n")

    monkeypatch.setattr(runner, "ray_session", session)
    monkeypatch.setattr(runner, "_await_machines", lambda: None)
    monkeypatch.setattr(runner, "_slots", lambda *_: 1)
    monkeypatch.setattr(runner, "_prepare", prepare)
    monkeypatch.setattr(runner, "_run_slots", lambda *_: [])
    job = runner.Job(kind="retrain", record=EndedRows(), specs=[spec()])
    runner.run(job, workers=1, on_preparing=lambda _: None, on_running=lambda: None)
    sys.stdout.write("the result\n")
    assert capsys.readouterr().out == "the result\n"


def test_a_launch_whose_workers_saved_and_ended_forgives_nobody(monkeypatch):
    """What still runs is another launch's: its attempts are not this one's to forgive."""

    @contextlib.contextmanager
    def session(url: str) -> Iterator[None]:
        yield

    def interrupted(*_: object) -> list:
        os.kill(os.getpid(), signal.SIGINT)
        return []

    monkeypatch.setattr(runner, "ray_session", session)
    monkeypatch.setattr(runner, "_await_machines", lambda: None)
    monkeypatch.setattr(runner, "_slots", lambda *_: 1)
    monkeypatch.setattr(runner, "_prepare", lambda *_: None)
    monkeypatch.setattr(runner, "_run_slots", interrupted)
    job = runner.Job(kind="retrain", record=EndedRows(), specs=[spec()])
    with pytest.raises(KeyboardInterrupt):
        runner.run(job, workers=1, on_preparing=lambda _: None, on_running=lambda: None)


class Started:
    """Stands for Ray's tasks: keeps what each was given."""

    def __init__(self) -> None:
        self.tasks: list[tuple[str, float, float, tuple]] = []
        self.specs: list[str] = []

    def task(self, function, cpus: float, gpus: float) -> "Started":
        self._asked = (function.__name__, cpus, gpus)
        return self

    def remote(self, orders: Orders, spec: str, *given: int) -> None:
        self.tasks.append((*self._asked, given))
        self.specs.append(spec)


def orders(kind: Kind) -> Orders:
    return Orders(kind=kind, study="digits", storage="", runs="", cache="")


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
    cluster, monkeypatch, machines, resources, slots, prepared, recorded
):
    cluster(machines)
    started = Started()
    monkeypatch.setattr(runner, "_task", started.task)
    monkeypatch.setattr(runner, "_follow", lambda *_: None)
    study = spec(resources=resources)
    runner._prepare(study, orders("search"), slots, lambda _: None)
    assert all(orders("search").read(text) == study for text in started.specs)
    first, *others = started.tasks
    assert first == ("prepare_task", *prepared)
    cpus, gpus, parts = recorded
    assert others == [("record_task", cpus, gpus, (part, parts)) for part in range(parts)]


@pytest.mark.parametrize(
    ("gpus", "threads", "cpus"),
    # CPUs of a machine that has the GPU too, or the task would wait for ever.
    [("auto", 16, 8), (0.5, 16, 8), ("auto", 4, 4), (0, 16, 16), (0, 99, 64)],
)
def test_a_machine_can_run_the_preparation(cluster, monkeypatch, gpus, threads, cpus):
    cluster([(64, 0), (8, 1)])
    started = Started()
    monkeypatch.setattr(runner, "_task", started.task)
    monkeypatch.setattr(runner, "_follow", lambda *_: None)
    study = spec(resources={"gpus": gpus}, teacher__train__threads=threads)
    runner._prepare(study, orders("search"), 1, lambda _: None)
    share = 1 if gpus == "auto" else gpus
    assert started.tasks[0] == ("prepare_task", cpus, share, (1,))


@pytest.mark.parametrize(
    ("kind", "given"),
    [("progressive", promotion()), ("retrain", spec(trajectories__mode="live"))],
)
def test_without_recorded_trajectories_there_is_one_task(cluster, monkeypatch, kind, given):
    cluster([(4, 0)])
    started = Started()
    monkeypatch.setattr(runner, "_task", started.task)
    monkeypatch.setattr(runner, "_follow", lambda *_: None)
    runner._prepare(given, orders(kind), 4, lambda _: None)
    assert started.tasks == [("prepare_task", 1, 0, (4,))]
    assert [orders(kind).read(text) for text in started.specs] == [given]


def test_a_launcher_of_another_version_is_told_to_a_worker():
    text = json.dumps(spec().model_dump(mode="json") | {"wings": 2})
    with pytest.raises(InputError, match=r"cannot read the study's spec \(digits: wings: Extra"):
        orders("search").read(text)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg2://me:hunter2@db/studies",
        "postgresql+psycopg2://me@db/studies?password=hunter2",
        "postgresql+psycopg2://me@db/studies?sslmode=require&sslpassword=hunter2",
    ],
)
def test_no_secret_is_in_what_ray_pickles(url):
    record = EndedRows()
    record.url = url
    told = runner.Job(kind="retrain", record=record, specs=[spec()]).orders(NO_LAUNCH)
    assert told.storage.startswith("postgresql+psycopg2://me@db/studies")
    assert b"hunter2" not in pickle.dumps(told)
