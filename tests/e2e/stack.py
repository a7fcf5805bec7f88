"""docker-compose.yml brought up for real, under a project name of its own.

``python3 -m tests.e2e.stack up DIR`` builds the images beforehand, in an engine that it starts in
DIR where none answers; tests find it by BDENSE_ENGINE_FOLDER, and ``down DIR`` ends it.
"""

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# A script that starts a Docker engine where none runs: `up DIR` leaves DIR/env.sh, `down DIR`
# ends it; $BDENSE_ENGINE, or one that lies beside the project.
_FOUND = sorted((ROOT.parent / "shared" / "tools").glob("*/engine.sh"))
STARTED = "BDENSE_ENGINE_FOLDER"
ENGINE = Path(os.environ.get("BDENSE_ENGINE") or (_FOUND[0] if _FOUND else ""))
IMAGES_BYTES = 35 * 2**30
SECRETS = ROOT / "docker" / "secrets"
APP_USER = "10001"


@dataclass
class Engine:
    """A Docker engine: the machine's own, or one that was started for a while."""

    environment: dict[str, str]
    folder: Path | None = None

    @classmethod
    def find(cls, folder: Path | None = None) -> "Engine | str":
        """One that answers, or why there is none.

        Args:
            folder: Where one is started that outlives this process; None ends it by ``end``.
        """
        for environment in (dict(os.environ), _set_in(os.environ.get(STARTED, ""))):
            if _answers(environment):
                return cls(environment)
        if not (ENGINE.is_file() and os.geteuid() == 0):
            return "no Docker engine answers here, and none can be started"
        if (free := shutil.disk_usage(tempfile.gettempdir()).free) < IMAGES_BYTES:
            return f"the images need {IMAGES_BYTES >> 30} GiB of disk, {free >> 30} are free"
        own = folder or Path(tempfile.mkdtemp(prefix="bdense-engine-"))
        # For the whole of it, children included.
        command = ["timeout", "600", "bash", str(ENGINE), "up", str(own)]
        started = subprocess.run(command, capture_output=True, text=True, check=False)
        engine = cls(_set_in(str(own)), own)
        if started.returncode or not _answers(engine.environment):
            engine.end()
            return f"no Docker engine could be started: {started.stderr[-300:]}"
        return engine

    def end(self) -> None:
        """Stop it, if it was started here."""
        if self.folder is not None:
            command = ["bash", ENGINE, "down", self.folder]
            subprocess.run(command, check=False, capture_output=True, timeout=120)
            # Takes minutes where unlinking is slow, as images are many files: nobody waits for it.
            remove = ["rm", "-rf", "--", self.folder]
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            subprocess.Popen(remove, stdin=subprocess.DEVNULL, start_new_session=True, **quiet)


def _set_in(folder: str) -> dict[str, str]:
    """The environment of an engine that was started in a folder."""
    told = Path(folder) / "env.sh"
    if not (folder and told.exists()):
        return dict(os.environ)
    pairs = told.read_text().removeprefix("export ").split()
    return {**os.environ, **dict(pair.split("=", 1) for pair in pairs)}


def _answers(environment: dict[str, str]) -> bool:
    if shutil.which("docker") is None:
        return False
    commands = (["docker", "info"], ["docker", "compose", "version"])
    return all(
        subprocess.run(each, env=environment, capture_output=True, check=False).returncode == 0
        for each in commands
    )


def free_port() -> int:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return chosen.getsockname()[1]


@dataclass
class Stack:
    """The service of one project.

    Attributes:
        engine: Where it runs.
        study, options: What its launcher runs.
        files: Compose files, the first beside the repository's root.
        project: Its name; containers, networks and volumes carry it.
        workers: How many of ray-worker.
    """

    engine: Engine
    study: str
    options: str = ""
    files: tuple[Path, ...] = (ROOT / "docker-compose.yml",)
    project: str = "bdense-test"
    workers: int = 2
    bind: str = "127.0.0.1"
    port: int = field(default_factory=free_port)

    def compose(
        self, *arguments: str, check: bool = True, timeout: float = 1800
    ) -> subprocess.CompletedProcess[str]:
        done = self.docker(*self._compose, *arguments, timeout=timeout)
        assert not check or done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done

    def docker(self, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return self._docker(*arguments, timeout=timeout, text=True, stdin=subprocess.DEVNULL)

    def _docker(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[Any]:
        own = {"STUDY": self.study, "LAUNCH_OPTIONS": self.options, "PORT": str(self.port)}
        # Images of its own: those of a service that runs on this machine stay as they are.
        own |= {"IMAGES": self.project, "BIND": self.bind, "DASHBOARD_USER": "bdense"}
        own |= {"WORKERS": str(self.workers), "WORKER_CPUS": "1", "WORKER_MEMORY": "8g"}
        return subprocess.run(
            ["docker", *arguments],
            cwd=ROOT,
            env={**self.engine.environment, **own},
            capture_output=True,
            check=False,
            **options,
        )

    @property
    def _compose(self) -> list[str]:
        files = [part for file in self.files for part in ("-f", str(file))]
        return ["compose", "--project-directory", str(ROOT), *files, "-p", self.project]

    def pipe(self, *arguments: str, given: bytes = b"") -> bytes:
        """A compose command that reads or writes bytes."""
        done = self._docker(*self._compose, *arguments, input=given, timeout=300)
        assert done.returncode == 0, f"{arguments}: {done.stderr!r}"
        return done.stdout

    def build(self) -> None:
        subprocess.run(["sh", ROOT / "docker" / "secrets.sh"], check=True, capture_output=True)
        self.compose("build")

    def up(self) -> None:
        self.compose("up", "--detach")

    def put_anew(self, service: str) -> None:
        """Containers of a service in place of its old ones, in whatever state those are.

        Compose stops a container before it removes it, which fails where it just ended by itself.
        """
        self.docker("rm", "--force", *self.containers(service))
        self.compose("up", "--detach", "--no-deps", service)

    def down(self, *options: str) -> None:
        self.compose("down", *options)

    def containers(self, *services: str) -> list[str]:
        return self.compose("ps", "--all", "--quiet", *services).stdout.split()

    def inspect(self, *containers: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.docker("inspect", *containers).stdout)
        return found

    def search(self, *arguments: str) -> dict[str, Any]:
        """What a looking verb of bdense-search answers, given as a user would."""
        name = Path(self.study).stem
        command = ("bdense-search", arguments[0], name, *arguments[1:], "--json")
        done = self.compose("run", "--rm", "--no-deps", "launcher", *command)
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer

    def launcher_status(self) -> tuple[str, int]:
        """State and exit status of the launcher's container."""
        state = self.inspect(*self.containers("launcher"))[0]["State"]
        return state["Status"], state["ExitCode"]

    def crash(self, container: str) -> None:
        """Kill a container's first process, as a dying machine would: Docker itself did not."""
        os.kill(self.inspect(container)[0]["State"]["Pid"], 9)

    def ask(
        self, path: str, *, method: str = "GET", password: str | None = None, user: str = "bdense"
    ) -> tuple[int, bytes]:
        """What the published port answers."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", method=method)
        if password is not None:
            token = base64.b64encode(f"{user}:{password}".encode()).decode()
            request.add_header("Authorization", f"Basic {token}")
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def secrets(self) -> dict[str, str]:
        return {path.name: path.read_text() for path in SECRETS.iterdir()}

    def logs(self, *services: str, options: Sequence[str] = ("--no-color",)) -> str:
        done = self.compose("logs", *options, *services)
        return done.stdout + done.stderr


def _main(verb: str, folder: Path) -> None:
    if verb == "down":
        Engine({}, folder).end()
        return
    engine = Engine.find(folder)
    if isinstance(engine, str):
        sys.exit(engine)
    Stack(engine, "studies/digits-nfe2.yaml").build()


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]))
