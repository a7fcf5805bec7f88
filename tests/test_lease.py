"""Whether a worker is dead, as seen from the machine that it ran on."""

import os
import signal
import subprocess
import sys

import pytest

from search.storage import leases
from search.storage.leases import Process, _start_time

# As root makes them: a /proc that shows others' processes to root alone, and one who is not root.
HIDING = """
import dataclasses, os, subprocess, sys
from pathlib import Path
from search.storage.leases import Process, _start_time

here = Process.current()
living = dataclasses.replace(here, pid=os.getppid(), started=_start_time(os.getppid()))
child = subprocess.Popen(["sleep", "60"])
ended = dataclasses.replace(here, pid=child.pid, started=_start_time(child.pid))
child.kill()
child.wait()
os.setgroups([])  # those of group 0 may look too
os.setgid(65534)
os.setuid(65534)
assert not Path(f"/proc/{living.pid}/stat").exists()
print(living.is_seen_dead(), ended.is_seen_dead())
"""


def of(pid: int) -> Process:
    here = Process.current()
    return Process(here.host, here.boot, here.pid_namespace, pid, _start_time(pid) or "")


def test_a_process_is_seen_dead_as_soon_as_it_is():
    child = subprocess.Popen(["sleep", "60"])
    process = of(child.pid)
    assert not process.is_seen_dead()
    child.send_signal(signal.SIGSTOP)
    assert not process.is_seen_dead()
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process.is_seen_dead()  # not reaped yet
    child.wait()
    assert process.is_seen_dead()


def test_another_process_of_that_number_is_not_it():
    mine = Process.current()
    later = Process(mine.host, mine.boot, mine.pid_namespace, mine.pid, f"{mine.started}0")
    assert later.is_seen_dead()
    assert not mine.is_seen_dead()


def test_what_cannot_be_read_is_dead_only_where_nothing_has_its_number(monkeypatch):
    child = subprocess.Popen(["sleep", "60"])
    process = of(child.pid)
    monkeypatch.setattr(leases, "_start_time", lambda _: None)
    assert not process.is_seen_dead()
    child.kill()
    child.wait()
    assert process.is_seen_dead()


def test_another_users_worker_is_not_dead_where_proc_hides_it():
    """Mounted with hidepid, as on machines that many share."""
    script = 'mount -t proc -o hidepid=2 proc /proc && exec "$0" "$@"'
    unshare = ["unshare", "--mount", "sh", "-c", script]
    if (
        os.getuid()
        or subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("needs the right to mount a /proc (root)")
    found = subprocess.run(
        [*unshare, sys.executable, "-c", HIDING], capture_output=True, text=True, check=False
    )
    assert (found.stdout, found.returncode) == ("False True\n", 0), found.stderr
