"""docker/launch.sh with stand-ins for Ray and the command: what reaches it, how it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "docker" / "launch.sh"
COMMAND = f"""#!{sys.executable}
import os, signal, sys, time
def save(*_):
    print("saved", flush=True)
    sys.exit(130)
signal.signal(signal.SIGTERM, save)
print("began", *sys.argv[1:], flush=True)
time.sleep(float(os.environ["SECONDS_LONG"]))
sys.exit(int(os.environ["STATUS"]))
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Runs the script with a joining and a command that take so many seconds."""
    programs = {"ray": "#!/bin/sh\n", "ray-node.sh": '#!/bin/sh\nsleep "$JOINING"\n'}
    for name, text in (programs | {"bdense-search": COMMAND}).items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("STUDY", "studies/one.yaml")
    monkeypatch.setenv("LAUNCH_OPTIONS", "--trials 4")

    def start(*arguments: str, joining: float = 0, seconds: float = 0, status: int = 0):
        settings = {"JOINING": joining, "SECONDS_LONG": seconds, "STATUS": status}
        own = {name: str(value) for name, value in settings.items()}
        return subprocess.Popen(
            ["sh", SCRIPT, *arguments],
            env={**os.environ, **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.mark.parametrize(("status", "ends_with"), [(0, 0), (2, 2), (130, 0)])
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


def test_a_signal_while_it_joins_begins_nothing(start):
    process = start(joining=1, seconds=60)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == ""
    assert process.returncode == 130


def test_after_a_failure_it_joins_again(start):
    process = start(status=1)
    assert process.stdout.readline().startswith("began")
    assert "joining the cluster again" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 130
