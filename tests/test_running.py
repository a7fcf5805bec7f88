"""While a study runs: points planned by hand, stops, GPUs that are chosen, what stays on disk."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from bdense.errors import InputError
from search.run.ending import EarlyEnd
from search.run.launch import run_rows
from search.run.machine import count_gpus, use_gpus
from search.spec.space import search_space
from search.storage.engine import resolve_storage_url
from search.storage.ledger import Claim, Ledger
from search.storage.stop_flags import HALT, Launch, Stops, ask_all
from search.storage.tables import SURPLUS
from search.study import retention
from search.study.arms import ROW_SPACE
from search.study.folders import row_folder
from search.study.retention import CHECKPOINT, STUDENT
from search.study.study import SPEC, TRAJECTORIES, Study
from search.study.summary import failures
from search.worker.trainer import Preparation, Step
from tests.contracts.scene import take, wait_until
from tests.measured import (
    command,
    copy_storage,
    created,
    empty_storage,
    open_once,
    statements,
)
from tests.measured import complete as measured
from tests.plugins import example_package
from tests.studies import PROMOTION, STUDY, changed, resolve_here, spec, write

__all__ = ["example_package"]
BOUNDED = {**STUDY["weights"], "largest": 2.0}


@pytest.fixture(autouse=True)
def runs(tmp_path, tmp_path_factory, monkeypatch) -> Path:
    open_once(monkeypatch)
    folder = tmp_path / "runs"
    folder.mkdir()
    copy_storage(empty_storage(tmp_path_factory.getbasetemp()), folder / "bdense.db")
    monkeypatch.setenv("BDENSE_RUNS", str(folder))
    monkeypatch.delenv("BDENSE_STORAGE", raising=False)
    return folder


def search(**keys) -> Study:
    return Study.create(resolve_storage_url(None), spec(**keys))


def rows() -> Study:
    """Given arms of ``PROMOTION``, planned."""
    return created(resolve_storage_url(None), spec(PROMOTION, name="rows"))


def claim(ledger: Ledger, space=None) -> Claim:
    return take(ledger, space=space or search_space(spec()))


def claim_arm(study: Study) -> Claim:
    found = study.given.claim(ROW_SPACE, None)
    assert isinstance(found, Claim), found
    return found


def complete(study: Study, value: float) -> int:
    """The number of a trial that has that value, and files as a worker leaves them."""
    taken = claim(study.search)
    folder = row_folder(study.name, taken.number)
    folder.mkdir(parents=True)
    for name in (STUDENT, "student.md", "result.json", "samples.png"):
        (folder / name).write_text("x" * 10)
    study.search.complete(taken, value, {"student": f"{study.name}/{taken.number:05d}/{STUDENT}"})
    return taken.number


def with_student(study: Study) -> list[int]:
    return sorted(
        int(path.parent.name) for path in row_folder(study.name, 0).parent.glob(f"*/{STUDENT}")
    )


# Points.


def test_a_planned_point_is_the_next_trial_bit_for_bit():
    study = search()
    point = ("enqueue", "digits", "--a", "1.3862943611198906", "--b=-4.274")
    status, out, _ = command(*point)
    assert (status, out.splitlines()[0].partition(", before")[0]) == (
        0,
        "planned in study digits: a 1.38629, b -4.274",
    )
    status, out, _ = command(*point)
    assert (status, "nothing is planned" in out) == (0, True)
    taken = claim(study.search)
    assert taken.params == {"a": 1.3862943611198906, "b": -4.274}
    assert study.search.counts().waiting == 0


def test_points_beyond_the_budget_say_what_runs_them():
    study = search(plan__trials=2)
    complete(study, 3.0)
    command("enqueue", "digits", "--a", "1", "--b", "-1")
    _, out, _ = command("enqueue", "digits", "--a", "2", "--b", "-1")
    assert "plan.trials, 2," in out
    assert "--trials 3" in out


def test_a_point_that_was_out_of_bounds_is_planned_anew():
    search(weights=BOUNDED)
    point = ("enqueue", "digits", "--a", "1", "--b", "-3.4")  # w_4 is 1.82
    assert command(*point)[1].startswith("planned")
    tighter = {**BOUNDED, "largest": 1.5}
    study, space = search(weights=tighter), spec(weights=tighter).space
    study.search.claim(search_space(study.spec), RandomSampler, lambda p: space.excess(p, 4))
    assert command(*point)[0] == 2  # beyond the bound now
    search(weights=BOUNDED)
    assert command(*point)[1].startswith("planned")
    assert command(*point)[1].endswith("nothing is planned\n")


def test_a_baseline_that_failed_is_tried_again_by_the_next_launch():
    study = search()
    first, second = claim_arm(study), claim_arm(study)
    study.given.fail(first, "out of memory", "no more", {})
    measured(study, study.given, second, 2.0)
    assert failures(study) == ["plain SFD, seed 0 failed, out of memory: no more"]
    study = search()
    again = claim_arm(study)
    assert again.params == first.params
    measured(study, study.given, again, 3.0)
    assert failures(study) == []
    for _ in range(2):
        counts = search().given.counts()
        assert (counts.planned, counts.complete, counts.failed, counts.waiting) == (3, 2, 1, 0)


def test_more_failed_baselines_cost_no_more_statements():
    study = search(plan__replicates=3)
    study.given.fail(claim_arm(study), "diverged", "nan", {})
    once = statements(study, lambda: failures(study))
    study.given.fail(claim_arm(study), "diverged", "nan", {})
    assert statements(study, lambda: failures(study)) == once
    assert len(failures(study)) == 2


@pytest.mark.parametrize(
    ("weights", "point", "said"),
    [
        (BOUNDED, ("--a", 3.5, "--b=-1"), "a 3.5 lies outside weights.a, -0.5 to 3"),
        # exp(4 * 1 - 3) = e.
        (BOUNDED, ("--a", 1, "--b=-3"), "by 0.7183; choose others, or raise weights.largest"),
        ({"name": "end-point"}, ("--set", "end=2", "--set", "wing=1"), "end, got end, wing"),
        ({"name": "end-point"}, ("--set", "end=11"), "end 11 lies outside weights.end, 1 to 10"),
        ({"name": "end-point"}, ("--set", "end=2", "--set", "end=3"), "end is given twice"),
    ],
)
@pytest.mark.usefixtures("example_package")
def test_points_outside_the_search_are_refused(weights, point, said):
    study = search(weights=weights)
    status, _, err = command("enqueue", "digits", *point)
    assert (status, study.search.counts().waiting) == (2, 0)
    assert said in err


@pytest.mark.usefixtures("example_package")
@pytest.mark.parametrize(
    ("weights", "point", "params"),
    [
        ({"name": "end-point"}, ("--set", "end=2.5"), {"end": 2.5}),
        (BOUNDED, ("--a", 1, "--set", "b=-5"), {"a": 1.0, "b": -5.0}),
        (
            {"name": "learned"},
            ("--set", "strength=1", "--set", "rule=uncertainty"),
            {"rule": "uncertainty", "strength": 1.0},
        ),
    ],
)
def test_any_parameter_of_the_studys_space_can_be_set(weights, point, params):
    study = search(weights=weights)
    assert command("enqueue", "digits", *point)[0] == 0
    assert claim(study.search, search_space(study.spec)).params == params


# Stopping, without workers; with them in tests/e2e.


def test_a_study_without_workers_is_stopped_at_once():
    study = search()
    status, out, _ = command("stop", "digits", "--wait")
    assert status == 0
    assert out.splitlines() == [
        "study digits: no trial is worked on; launchers, if there are any, end",
        "study digits is stopped: no trial is worked on",
    ]
    # Its baselines too, which are an Optuna study of their own.
    assert [Stops.of(each.attribute(HALT)).count for each in study.ledgers] == [1, 1]
    _, out, _ = command("status", "digits")
    assert "asked to stop at 20" in out


def test_status_shows_what_a_launch_prepares_until_rows_run(monkeypatch):
    study = search()
    shown: list[str] = []

    def run(study, launch, *, on_preparing, on_running, **_):
        for done in (1, 2):  # the second comes too soon to be kept
            on_preparing(Preparation(Step.TEACHER, done, 9, "loss 1.5"))
            shown.append(command("status", "digits")[1])
        on_preparing(Preparation(Step.TRAJECTORIES, 0, 1))
        shown.append(command("status", "digits")[1])
        on_running()
        shown.append(command("status", "digits")[1])
        on_preparing(Preparation(Step.FEATURES, 0, 1))
        raise KeyboardInterrupt

    monkeypatch.setattr("search.run.launch.run", run)
    with pytest.raises(KeyboardInterrupt):
        run_rows(study, workers=1)
    texts = ["training the teacher 1/9, loss 1.5"] * 2 + ["recording trajectories"]
    for out, text in zip(shown[:3], texts, strict=True):
        assert re.search(rf"^preparing, \d+ s ago: {text}$", out, re.MULTILINE)
    for out in (shown[3], command("status", "digits")[1]):
        assert "preparing" not in out


def test_stop_waits_for_a_worker_to_give_its_trial_back(monkeypatch):
    study = search()
    taken, pauses = claim(study.search), []

    def give_back(seconds: float) -> None:
        pauses.append(seconds)
        study.search.release(taken, interrupted=True)

    clock = SimpleNamespace(sleep=give_back, monotonic=time.monotonic)
    monkeypatch.setattr("search.verbs.steer.time", clock)
    status, out, _ = command("stop", "digits", "--wait")
    assert (status, len(pauses)) == (0, 1)
    assert [line.split(": ")[-1].split(" ")[0] for line in out.splitlines()] == ["asked", "no"]


def test_status_names_no_worker_of_a_trial_that_was_given_back():
    study = search()
    taken = claim(study.search)
    assert f":{os.getpid()} for " in command("status", "digits")[1]
    study.search.release(taken, interrupted=True)
    out = command("status", "digits")[1]
    assert "trial 0 was given back in attempt 1" in out
    assert "trial 0 on " not in out


def test_before_rows_run_a_stop_ends_the_launch_at_once():
    study = search()
    launch = Launch.begin(study.ledgers)

    def preparing() -> None:
        with EarlyEnd(study.ledgers, launch):
            ask_all(study.ledgers)
            threading.Event().wait(120)

    with pytest.raises(KeyboardInterrupt):
        preparing()


def test_a_signal_silences_what_rays_code_writes():
    """It writes to the descriptor, and Python to the same."""
    code = """
import os, sys
from search.run.ending import silencing_descriptor_2
from search.run.progress import Display, Snapshot
progress = Display(lambda: Snapshot(text="ours", ended=0, total=1, running=[]))
with silencing_descriptor_2() as silence:
    os.write(2, b"before, ")
    for _ in range(2):
        silence()
        os.write(2, b"ray, ")
        sys.stderr.write("ours \\udc80, ")
        sys.stderr.flush()
    progress.running()
os.write(2, b"after, ")
sys.stderr.write("ours")
"""
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, capture_output=True, check=True, text=True)
    before, line, after = re.split(r"(\[.*\n)", ended.stderr)
    assert before == r"before, ours \udc80, ours \udc80, "
    assert line.endswith("] ours\n")
    assert after == "after, ours"


def running(study: Study, launch: Launch, signals: int, grace: float = 60.0) -> None:
    """Rows run until so many signals end them; each but the last is waited for."""
    with EarlyEnd(study.ledgers, launch, grace=grace) as ending:
        ending.rows_run()
        os.kill(os.getpid(), signal.SIGTERM)
        assert ending.interrupted
        if signals > 1:
            wait_until(lambda: Stops.of(study.search.attribute(HALT)).launches == (launch.name,))
            os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(120)


def test_the_first_signal_asks_the_workers_and_the_second_ends_the_launch(capsys):
    study = search()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        running(study, Launch.begin(study.ledgers), signals=2)
    assert signal.getsignal(signal.SIGTERM) is before
    assert "Ctrl-C again ends at once" in capsys.readouterr().err


def test_workers_that_do_not_end_are_waited_for_no_longer_than_the_grace():
    study, began = search(), time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        running(study, Launch.begin(study.ledgers), signals=1, grace=0.5)
    assert time.monotonic() - began > 0.5


# GPUs. None is needed: what Ray reads is the environment.


@pytest.fixture
def gpus_seen(monkeypatch) -> Callable[[], dict[str, str]]:
    """What the environment says of GPUs, nothing at first."""
    names = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "RAY_ADDRESS")
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    return lambda: {name: os.environ[name] for name in names if name in os.environ}


def test_chosen_gpus_are_all_that_ray_sees(gpus_seen, monkeypatch):
    monkeypatch.setattr("search.run.machine.count_gpus", lambda: 3)
    use_gpus(None)
    assert gpus_seen() == {}
    use_gpus([2, 0])
    assert gpus_seen() == {"CUDA_VISIBLE_DEVICES": "2,0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


@pytest.mark.parametrize(
    ("chosen", "there", "given", "message"),
    [
        ([0, 2], 1, "", "--gpus 0,2: .* has GPU 0 alone, and 2 cannot"),
        ([0], 0, "", "--gpus 0: .* has no GPU.* leave --gpus out"),
        ([4, 5], 4, "", "has GPUs 0 to 3, and 4, 5 cannot"),
        ([-1], 4, "", "-1 cannot"),
        ([1, 1], 4, "", "--gpus 1,1 names a GPU twice"),
        ([0], 4, "RAY_ADDRESS=head:6379", "cluster at RAY_ADDRESS=head:6379"),
        ([0, 1], 4, "CUDA_VISIBLE_DEVICES=1,3", "CUDA_VISIBLE_DEVICES=1,3 does .* unset it"),
        ([0], 4, "CUDA_VISIBLE_DEVICES=GPU-8932f937,1", "=GPU-8932f937,1 .* unset it"),
        ([0], 4, "CUDA_VISIBLE_DEVICES=", "_DEVICES= does .* unset it"),
    ],
)
def test_gpus_that_cannot_be_chosen_are_refused(
    chosen, there, given, message, gpus_seen, monkeypatch
):
    monkeypatch.setattr("search.run.machine.count_gpus", lambda: there)
    if given:
        monkeypatch.setenv(*given.split("="))
    before = gpus_seen()
    with pytest.raises(InputError, match=message):
        use_gpus(chosen)
    assert gpus_seen() == before


def test_gpus_are_counted_as_nvidia_smi_lists_them(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\n"
        "echo 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)'\n"
        "echo '  MIG 1g.10gb     Device  0: (UUID: MIG-2)'\n"
        "echo 'GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-3)'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert count_gpus() == 2
    program.write_text("#!/bin/sh\necho no driver >&2\nexit 9\n")
    assert count_gpus() == (len(list(Path("/proc/driver/nvidia/gpus").glob("*"))))


@pytest.mark.parametrize("verb", [("launch", "x.yaml"), ("confirm", "x"), ("promote", "x")])
def test_every_verb_that_runs_rows_refuses_gpus_that_are_not_there(verb):
    status, _, err = command(*verb, "--gpus", "0,99")
    assert (status, "--gpus 0,99: this machine has" in err) == (2, True)


# What stays on the disk.


def test_the_best_students_stay_and_those_that_were_named():
    study = search(plan__trials=8, keep_students=2)
    for value in (5.0, 1.0, 4.0):
        number = complete(study, value)
        retention.keep_best_students(study.search, 2, number)
    assert with_student(study) == [1, 2]
    assert command("clean", "digits", "--keep", "2")[:2] == (
        0,
        "students of trials 2 of digits stay\n",
    )
    for value in (0.5, 9.0, 2.0):
        number = complete(study, value)
        retention.keep_best_students(study.search, 2, number)
    assert with_student(study) == [1, 2, 3]
    # Results and pictures stay of all.
    assert len(list(row_folder("digits", 0).parent.glob("*/result.json"))) == 6
    assert not (row_folder("digits", 4) / "student.md").exists()


def test_rows_beyond_the_budget_are_no_failures():
    """A claim that lost its connection left one."""
    study = search(plan__trials=1)
    for _ in range(2):
        study.search.study.ask(fixed_distributions=search_space(spec()))
    taken = claim(study.search)
    assert [row.user_attrs for row in study.search.rows(state=TrialState.FAIL)] == [
        {SURPLUS: True}
    ]
    assert failures(study) == []
    study.search.fail(taken, "diverged", "the loss is not finite", {})
    assert failures(study) == ["trial 1 failed, diverged: the loss is not finite"]


def test_a_pruned_trial_s_value_takes_no_student_s_place():
    """Optuna gives it the last FID on the way, which may be lower than any complete one."""
    study = search(plan__trials=4)
    first, second = complete(study, 5.0), complete(study, 6.0)
    pruned = claim(study.search)
    study.search.report(pruned, 1, 0.1)
    study.search.prune(pruned, {})
    retention.keep_best_students(study.search, 2, second)
    assert with_student(study) == [first, second]


def test_a_file_that_cannot_be_deleted_ends_nothing(caplog):
    study = search(plan__trials=4)
    number = complete(study, 2.0)
    stuck = row_folder("digits", number) / STUDENT
    stuck.unlink()
    stuck.mkdir()  # to unlink it is an error, for root too
    worse, best = complete(study, 3.0), complete(study, 1.0)
    retention.keep_best_students(study.search, 1, best)
    assert f"{stuck} cannot be deleted" in caplog.text
    assert with_student(study) == [number, best]
    assert not (row_folder("digits", worse) / "student.md").exists()


def test_the_student_of_a_trial_far_down_goes_as_it_ends(monkeypatch):
    study = search(plan__trials=9, keep_students=1)
    numbers = [complete(study, value) for value in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)]
    monkeypatch.setattr(retention, "_MARGIN", 2)
    retention.keep_best_students(study.search, 1, numbers[4])
    # Those just beyond the best, and the one that ended.
    assert with_student(study) == [numbers[i] for i in (0, 3, 5)]
    retention.keep_too(study.search, [numbers[3]])
    retention.keep_best_students(study.search, 1, numbers[3])
    assert with_student(study) == [numbers[i] for i in (0, 3, 5)]
    # One that is best stays as it ends, and one that was given back, too.
    retention.keep_best_students(study.search, 1, numbers[0])
    released = claim(study.search)
    folder = row_folder("digits", released.number)
    folder.mkdir(parents=True)
    (folder / STUDENT).write_text("x")
    study.search.release(released)
    retention.keep_best_students(study.search, 1, released.number)
    assert with_student(study) == [*(numbers[i] for i in (0, 3, 5)), released.number]


def test_clean_deletes_students_beyond_the_best():
    study = search(plan__trials=8, keep_students=1)
    numbers = [complete(study, value) for value in (3.0, 1.0, 2.0)]
    status, out, _ = command("clean", "digits", "--students")
    assert (status, out) == (0, "0.0 MiB of students deleted; the best 1 stay\n")
    assert with_student(study) == [numbers[1]]
    # One that is gone cannot be kept.
    status, _, err = command("clean", "digits", "--keep", "3")
    assert (status, "--keep 3: no student" in err, "bdense distill" in err) == (2, True, True)


@pytest.mark.parametrize(("maximise", "best"), [(False, 1), (True, 0)])
def test_the_students_that_stay_are_the_best_in_the_studys_direction(maximise, best):
    ledger = Ledger.open(resolve_storage_url(None), "digits", budget=3, maximise=maximise)
    study = SimpleNamespace(search=ledger, name="digits")
    numbers = [complete(study, value) for value in (3.0, 1.0, 2.0)]
    assert retention.best_numbers(ledger, 1) == {numbers[best]}
    retention.clean_students(ledger, 1)
    assert with_student(study) == [numbers[best]]


def test_the_students_of_every_stage_go_with_their_cards():
    study = search(plan__trials=8, keep_students=1)
    best, worse = complete(study, 1.0), complete(study, 2.0)
    for number in (best, worse):
        folder = row_folder(study.name, number)
        (folder / STUDENT).unlink()
        for name in ("00004.safetensors", "00004.md", "00002.safetensors", "00002.md"):
            (folder / name).write_bytes(b"x")
    assert command("clean", "digits", "--students")[0] == 0
    left = sorted(path.name for path in row_folder(study.name, worse).glob("0000*"))
    assert (left, len(list(row_folder(study.name, best).glob("0000*")))) == ([], 4)
    assert command("clean", "digits", "--keep", str(best))[0] == 0


def test_clean_deletes_what_ended_trials_and_dead_workers_left():
    study = search(plan__trials=8)
    ended, running = complete(study, 1.0), claim(study.search).number
    for number in (ended, running):
        folder = row_folder("digits", number)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CHECKPOINT).write_bytes(bytes(2**20))
    (row_folder("digits", ended) / "00004.training.safetensors").write_bytes(bytes(2**19))
    aside = row_folder("digits", 0).with_name("00000.1f2e3d4c")
    (aside / "deeper").mkdir(parents=True)
    (aside / "deeper" / STUDENT).write_bytes(bytes(2**20))
    fresh, old = (row_folder("digits", running) / f".x.{n}.partial" for n in ("new", "old"))
    fresh.write_text("x")
    old.write_bytes(bytes(2**19))
    os.utime(old, (0, 0))
    status, out, _ = command("clean", "digits", "--checkpoints")
    assert (status, out) == (0, "3.0 MiB of checkpoints and leftovers deleted\n")
    assert not aside.exists()
    assert [
        path.parent.name for path in row_folder("digits", 0).parent.glob(f"*/{CHECKPOINT}")
    ] == [f"{running:05d}"]
    assert (fresh.exists(), old.exists()) == (True, False)
    assert with_student(study) == [ended]


@pytest.fixture
def recorded(runs) -> Path:
    """Trajectories of the study digits."""
    folder = runs / "cache" / "trajectories" / "0123"
    folder.mkdir(parents=True)
    (folder / "shard").write_bytes(bytes(2**20))
    return folder


def test_clean_deletes_trajectories_that_no_trial_reads(recorded):
    study = search()
    study.main.study.set_user_attr(TRAJECTORIES, [str(recorded)])
    taken = claim(study.search)
    status, _, err = command("clean", "digits")
    assert status == 2
    assert "1 trials of digits are worked on and read its trajectories; end them first" in err
    assert recorded.exists()
    study.search.release(taken)
    assert command("clean", "digits")[1] == "1.0 MiB of trajectories deleted\n"
    assert not recorded.exists()


@pytest.mark.parametrize("is_search", [True, False])
def test_clean_deletes_no_trajectories_that_another_study_reads(recorded, is_search):
    """They are named by teacher, grid and seed, which studies may share."""
    for name in ("digits", "idle"):
        search(name=name).main.study.set_user_attr(TRAJECTORIES, [str(recorded)])
    other = search(name="other") if is_search else rows()
    named = [str(recorded.with_name("4567")), str(recorded)]
    other.main.study.set_user_attr(TRAJECTORIES, named)
    taken = claim_arm(other)
    status, _, err = command("clean", "digits")
    assert status == 2
    assert f"1 trials of {other.name} are worked on and read the same trajectories" in err
    assert f"end them first: bdense-search stop {other.name} --wait" in err
    assert (recorded / "shard").exists()
    other.given.release(taken)
    assert command("clean", "digits")[1] == "1.0 MiB of trajectories deleted\n"


@pytest.mark.parametrize("named", ["..", "../..", "0123/deeper", "../../digits"])
def test_clean_deletes_no_folder_but_one_of_trajectories(recorded, named):
    """Anyone with write access to the database may name any."""
    study, other = search(), recorded.parent / named
    other.mkdir(parents=True, exist_ok=True)
    study.main.study.set_user_attr(TRAJECTORIES, [str(other)])
    status, _, err = command("clean", "digits")
    assert status == 2
    assert "which does not lie in" in err
    assert (other.exists(), (recorded / "shard").exists()) == (True, True)


def test_a_spec_of_another_version_is_named(tmp_path, monkeypatch):
    resolve_here(monkeypatch)
    study = search()
    stored = changed(spec().as_dict(), resources__wings=2)
    study.main.study.set_user_attr(SPEC, json.dumps(stored))
    for verb in (
        ("enqueue", "digits", "--a", "1"),
        ("clean", "digits", "--students"),
        ("launch", write(tmp_path), "--trials", "9"),
    ):
        status, out, err = command(*verb)
        assert (status, out) == (2, "")
        assert "cannot read the study's spec (digits: resources.wings " in err
    # What is refused changes nothing.
    assert Ledger.open(study.url, "digits", budget=None).budget == spec().search.trials


def test_clean_of_given_arms_keeps_their_students():
    rows()
    status, _, err = command("clean", "rows", "--students")
    assert (status, "--students applies to a search" in err) == (2, True)
    assert command("clean", "rows", "--checkpoints")[0] == 0
