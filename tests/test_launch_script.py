"""docker/launch.sh with stand-ins for Ray and the command: what reaches it, how it ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from search.errors import ClusterLostError
from tests.contracts.scene import wait_until

SCRIPT = Path(__file__).parents[1] / "docker" / "launch.sh"
COMMAND = f"""#!{sys.executable}
import os, signal, sys, time
def save(*_):
    os.write(1, b"saved\\n")  # print may be at work just now
    sys.exit(130)
signal.signal(signal.SIGTERM, save)
print("began", *sys.argv[1:], flush=True)
time.sleep(float(os.environ["SECONDS_LONG"]))
sys.exit(int(os.environ["STATUS"]))
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Runs the script; joining lasts while the gate is there, the command so many seconds."""
    joining = (
        '#!/bin/sh\necho joining >> "$JOINS_FILE"\n'
        'while [ -e "$GATE" ]; do sleep 0.05; done\nexit "$REFUSED"\n'
    )
    answering = '#!/bin/sh\nexit "$HEAD_IS_GONE"\n'
    programs = {"ray": "#!/bin/sh\n", "ray-node.sh": joining, "python": answering}
    for name, text in (programs | {"bdense-search": COMMAND}).items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("STUDY", "studies/one.yaml")
    monkeypatch.setenv("LAUNCH_OPTIONS", "--trials 4")

    def start(*arguments: str, seconds: float = 0, status: int = 0, **more: int):
        settings = {"SECONDS_LONG": seconds, "STATUS": status, "REFUSED": 0, "HEAD_IS_GONE": 0}
        settings |= {"JOINS_FILE": tmp_path / "joins", "GATE": tmp_path / "gate", **more}
        own = {name: str(value) for name, value in settings.items()}
        return subprocess.Popen(
            ["sh", SCRIPT, *arguments],
            env={**os.environ, **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


# 1: no trial is complete, workers die, a problem the doctor found. Again it would end the same.
@pytest.mark.parametrize(("status", "ends_with"), [(0, 0), (1, 1), (2, 2), (130, 0)])
def test_how_the_command_ends_is_how_it_ends_but_for_a_stop(start, status, ends_with):
    process = start(status=status)
    assert process.communicate(timeout=20)[0] == "began launch studies/one.yaml --trials 4\n"
    assert process.returncode == ends_with


def test_another_verb_is_run_in_place_of_the_study(start):
    process = start("confirm", "one")
    assert process.communicate(timeout=20)[0] == "began confirm one\n"


def test_a_signal_reaches_the_command_which_ends_in_its_own_time(start):
    process = start(seconds=60)
    assert process.stdout.readline().startswith("began")
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "saved\n"
    assert process.returncode == 130


def test_a_signal_while_it_joins_begins_nothing(start, tmp_path):
    gate = tmp_path / "gate"
    gate.touch()
    process = start(seconds=60)
    wait_until((tmp_path / "joins").exists)
    process.send_signal(signal.SIGTERM)
    gate.unlink()
    assert process.communicate(timeout=20)[0] == ""
    assert process.returncode == 130


@pytest.mark.parametrize(("status", "gone"), [(ClusterLostError.exit_status, 0), (1, 1)])
def test_where_the_head_died_it_joins_again(start, status, gone):
    process = start(status=status, HEAD_IS_GONE=gone, PAUSE=0)
    for _ in range(3):
        assert process.stdout.readline().startswith("began")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert err.count("joining the cluster again in 0 s") >= 2


def test_where_no_cluster_can_be_joined_it_gives_up(start, tmp_path):
    process = start(REFUSED=1, PAUSE=0, PATIENCE=1)
    assert process.communicate(timeout=60)[0] == ""
    assert process.returncode == 1
    assert (tmp_path / "joins").read_text().count("joining") > 1
