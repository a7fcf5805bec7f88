"""Hosts of a cluster on one machine: a network, a name and private files of their own each.

Linux's namespaces make them: what one host keeps for itself (temporary files, its token, its
database password) no other one sees, and they reach each other through a bridge alone.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

# Never routed: reserved for tests of networks (RFC 2544).
NETWORK = "198.18.77"
# Hides the other hosts' folder under an empty file system, with this one's own put back, then
# runs what follows.
_ENTER = """
set -e
hostname "$1"
mount --make-rprivate /
mount --bind "$3" /mnt
mount -t tmpfs tmpfs "$2"
mkdir -p "$3"
mount --bind /mnt "$3"
umount /mnt
shift 3
exec "$@"
"""


def why_not() -> str | None:
    """What keeps this machine from having hosts, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs Linux and root, for namespaces"
    for program in ("ip", "unshare", "mount", "hostname"):
        if shutil.which(program) is None:
            return f"needs the program {program}"
    probe = f"bd{os.getpid()}-probe"
    made = subprocess.run(
        ["ip", "netns", "add", probe], capture_output=True, text=True, check=False
    )
    if made.returncode:
        return f"ip netns add: {made.stderr.strip()}"
    _ip("netns", "delete", probe)
    return None


@dataclass(frozen=True)
class Host:
    """One of them.

    Attributes:
        name: Its host name.
        address: Its IP address.
        folder: Its own files, which no other host sees.
        private: Where each host has its folder.
    """

    name: str
    address: str
    folder: Path
    private: Path
    namespace: str

    def start(
        self, *command: str | Path, environment: Mapping[str, str], output: Path | None = None
    ) -> subprocess.Popen[str]:
        """Run a program on it, in its folder; without ``output`` its texts can be read."""
        entering = ["ip", "netns", "exec", self.namespace, "unshare", "--mount", "--uts"]
        entering += ["sh", "-c", _ENTER, "host", self.name, str(self.private), str(self.folder)]
        to = subprocess.PIPE if output is None else output.open("w")
        process = subprocess.Popen(
            [*entering, *map(str, command)],
            env=dict(environment),
            cwd=self.folder,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=to,
            stderr=subprocess.PIPE if output is None else subprocess.STDOUT,
            start_new_session=True,
        )
        if output is not None:
            to.close()
        return process

    def run(
        self, *command: str | Path, environment: Mapping[str, str], timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """Run a program on it to its end."""
        with self.start(*command, environment=environment) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def pids(self) -> list[int]:
        """Processes that run on it."""
        listed = subprocess.run(
            ["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=True
        )
        return [int(pid) for pid in listed.stdout.split()]


@contextmanager
def network(folder: Path, *names: str) -> Iterator[list[Host]]:
    """Hosts on one bridge, until the block is left; then their processes are killed.

    Args:
        folder: Where each host's own files are; short, for the sake of sockets' paths.
        names: Of the hosts.
    """
    mark = f"bd{os.getpid()}"
    # In a namespace of its own: this machine's firewall, as Docker sets it up, would cut it off.
    switch = f"{mark}-switch"
    private = folder / "h"
    private.mkdir()
    hosts = [
        Host(name, f"{NETWORK}.{i + 1}", private / name, private, f"{mark}-{name}")
        for i, name in enumerate(names)
    ]
    made = []
    try:
        for namespace in (switch, *(host.namespace for host in hosts)):
            _ip("netns", "add", namespace)
            made.append(namespace)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for i, host in enumerate(hosts):
            host.folder.mkdir()
            cable = ("type", "veth", "peer", "name", f"port{i}", "netns", switch)
            _ip("link", "add", "eth0", "netns", host.namespace, *cable)
            _ip("-n", switch, "link", "set", f"port{i}", "master", "bridge", "up")
            _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", host.namespace, "link", "set", device, "up")
        yield hosts
    finally:
        for host in hosts:
            if host.namespace in made:
                for pid in host.pids():
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
        for namespace in made:
            _ip("netns", "delete", namespace)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
