"""A study on a Ray cluster of two hosts, its PostgreSQL on a third: tokens, passwords, results."""

import contextlib
import dataclasses
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from bdense.errors import BdenseError
from search.storage.ledger import Ledger
from search.study.study import Study
from tests.conftest import Postgres
from tests.e2e.hosts import Host
from tests.e2e.study import Workplace, small_study, wait_until

pytestmark = pytest.mark.slow
STUDY = small_study(method={"kimg": 0.64})
RAY = Path(sys.executable).with_name("ray")
RAY_PORT = 6379
# Ray's least; nothing large goes through it.
OBJECT_STORE = f"--object-store-memory={80 * 2**20}"
PASSWORD = f"not-in-any-log-{secrets.token_hex(8)}"


@dataclasses.dataclass
class Cluster:
    """Ray's head without CPUs on one host, a worker on another, both with their own settings."""

    head: Host
    worker: Host
    shared: Path
    storage: str
    socket: str
    token: str

    def environment(self, host: Host, **changed: str | None) -> dict[str, str]:
        """What is set on a host, its secrets in files of its own; None takes a name away."""
        # NumPy's kernels, which decide the last bits, as in this process.
        kernels = {name: os.environ[name] for name in os.environ if name.startswith("OPENBLAS_")}
        mine = {
            **kernels,
            "PATH": f"{RAY.parent}:{os.environ['PATH']}",
            "HOME": str(host.folder),
            "TMPDIR": str(host.folder),
            "OMP_NUM_THREADS": "1",
            "PGPASSFILE": str(host.folder / "pgpass"),
            "BDENSE_STORAGE": self.storage,
            "BDENSE_RUNS": str(self.shared / "runs"),
            "BDENSE_CACHE": str(self.shared / "cache"),
            # On a loaded machine Ray gives up its own parts too early, and the host's Ray ends.
            "RAY_agent_register_timeout_ms": "300000",
            "RAY_gcs_rpc_server_reconnect_timeout_s": "300",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(host.folder / "token"),
            **changed,
        }
        return {name: value for name, value in mine.items() if value is not None}

    def settle(self) -> None:
        """Each host gets its secrets."""
        for host in (self.head, self.worker):
            pgpass = host.folder / "pgpass"
            pgpass.write_text(f"*:*:*:bdense:{PASSWORD}\n")
            pgpass.chmod(0o600)
            (host.folder / "token").write_text(self.token)

    @property
    def address(self) -> str:
        return f"{self.head.address}:{RAY_PORT}"

    def start_ray(self, host: Host, *options: str) -> subprocess.Popen[str]:
        common = ("--block", f"--node-ip-address={host.address}", "--disable-usage-stats")
        own = (f"--temp-dir={host.folder}/ray", OBJECT_STORE, *options)
        return host.start(
            RAY,
            "start",
            *common,
            *own,
            environment=self.environment(host),
            output=host.folder / "ray-start.log",
        )

    def search(self, *arguments: str | Path, **changed: str | None) -> subprocess.Popen[str]:
        """Our command on the head's host: a driver needs a node of Ray beside it."""
        environment = self.environment(self.head, RAY_ADDRESS=self.address, **changed)
        return self.head.start(sys.executable, "-m", "search", *arguments, environment=environment)

    def has(self, name: str) -> bool:
        """Whether its launch has come so far as to make it."""
        # Only read: tables that the superuser made would not be the launch's own.
        with contextlib.suppress(BdenseError):
            return bool(Study.open(self.socket, name, reading=True))
        return False

    def rows(self, name: str) -> list:
        """A study's trials, read through the server's socket."""
        return Ledger.open(self.socket, name, budget=None).study.get_trials(deepcopy=False)


@pytest.fixture(scope="module")
def cluster(folder: Path, hosts: list[Host], server: Postgres) -> Cluster:
    engine = sa.create_engine(server.url("postgres"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE ROLE bdense LOGIN PASSWORD '{PASSWORD}'")
        connection.exec_driver_sql("CREATE DATABASE studies OWNER bdense")
    engine.dispose()
    head, worker, database = hosts
    shared = folder / "shared"
    shared.mkdir()
    cluster = Cluster(
        head,
        worker,
        shared,
        f"postgresql://bdense@{database.address}/studies",
        server.url("studies"),
        secrets.token_hex(32),
    )
    cluster.settle()
    cluster.start_ray(head, "--head", f"--port={RAY_PORT}", "--num-cpus=0", "--num-gpus=0")
    alive = (RAY, "health-check", f"--address={cluster.address}")
    wait_until(
        lambda: head.run(*alive, environment=cluster.environment(head)).returncode == 0,
        what="the head",
    )
    return cluster


@pytest.fixture(scope="module")
def calm_fids(folder: Path, cluster: Cluster) -> dict[float, float]:
    """What the trials give on this machine alone, with the same teacher."""
    calm = folder / "calm"
    calm.mkdir()
    workplace = Workplace(calm, cluster.shared / "cache")
    workplace.work(STUDY)
    return workplace.fids()


def holders(secret: str, folder: Path) -> set[str]:
    """Files under a folder that hold it, secrets' own files left out."""
    found = set()
    for path in folder.rglob("*"):
        if path.name in ("pgpass", "token") or not path.is_file() or path.is_symlink():
            continue
        try:
            content = path.read_bytes()
        except OSError:
            continue  # gone meanwhile
        if secret.encode() in content:
            found.add(str(path.relative_to(folder)))
    return found


def arguments(host: Host) -> str:
    """The command lines of all that runs on a host."""
    lines = []
    for pid in host.pids():
        try:
            lines.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return "\n".join(lines)


def test_a_study_runs_on_the_other_host_and_tells_nobody_its_password(cluster, calm_fids):
    """Launched before any worker is there: a head without CPUs has room for nothing."""
    head, worker = cluster.head, cluster.worker
    study = Workplace(cluster.shared, cluster.shared / "cache").write(STUDY)
    launch = cluster.search("launch", study)
    wait_until(lambda: cluster.has("small") or launch.poll() is not None, what="the study")
    assert launch.poll() is None
    cluster.start_ray(worker, f"--address={cluster.address}", "--num-cpus=2", "--num-gpus=0")
    told, pickles = set(), set()
    deadline = time.monotonic() + 900
    while launch.poll() is None:
        assert time.monotonic() < deadline, "not done in time"
        told |= {line for host in (head, worker) for line in arguments(host).splitlines()}
        # Tune's, which are gone at the end.
        pickles |= {path.name for path in head.folder.glob("bdense-tune-*/*/*.pkl")}
        assert holders(PASSWORD, head.folder) == set()
        time.sleep(0.5)
    out, err = launch.communicate()
    assert launch.returncode == 0, err
    assert out.startswith("study small: 3 of 3 trials complete, 0 pruned, 0 failed")

    trials = cluster.rows("small")
    assert {trial.params["a"]: trial.value for trial in trials} == calm_fids
    measured_on = [
        trial.user_attrs["worker"].partition(":")[0]
        for name in ("small", "small.baselines")
        for trial in cluster.rows(name)
    ]
    assert measured_on == ["worker"] * 5

    assert any("raylet" in line for line in told)
    assert any("search launch" in line for line in told)
    assert pickles
    assert [line for line in told if PASSWORD in line or cluster.token in line] == []
    for where in (head.folder, worker.folder, cluster.shared):
        assert holders(PASSWORD, where) == set()
        assert holders(cluster.token, where) == set()
    assert PASSWORD not in out + err
    assert list((worker.folder / "ray").glob("session_*/logs/*"))


def test_nobody_gets_in_without_the_token_or_the_password(cluster):
    """A launch without Ray's token, with another, or whose file is missing; a node; a password.

    All at once, as each waits for its refusal.
    """
    tokens = {
        "missing": {"RAY_AUTH_MODE": None, "RAY_AUTH_TOKEN_PATH": None},
        "wrong": {"RAY_AUTH_TOKEN_PATH": None, "RAY_AUTH_TOKEN": "0" * 64},
        "no-file": {"RAY_AUTH_TOKEN_PATH": "no-such-file"},
    }
    place = Workplace(cluster.shared, cluster.shared / "cache")
    launches = {
        name: cluster.search("launch", place.write({**STUDY, "name": name}), **changed)
        for name, changed in tokens.items()
    }
    host = cluster.worker
    node = host.start(
        *(RAY, "start", f"--address={cluster.address}", f"--node-ip-address={host.address}"),
        environment=cluster.environment(host, RAY_AUTH_TOKEN="0" * 64),
    )
    wrong = cluster.head.folder / "wrong"
    wrong.write_text("*:*:*:bdense:guess\n")
    wrong.chmod(0o600)
    status = cluster.search("status", "small", PGPASSFILE=str(wrong))

    for name, launch in launches.items():
        out, err = launch.communicate(timeout=900)
        assert (launch.returncode, out) == (2, ""), name
        line = err.splitlines()[-1]
        assert f"Ray at {cluster.address} asks for a token" in line
        assert "RAY_AUTH_TOKEN_PATH" in line
        assert "Traceback" not in err
        assert cluster.token not in err
        assert cluster.rows(name) == []
    _, err = node.communicate(timeout=900)
    assert node.returncode != 0
    assert "InvalidAuthToken" in err
    # Else the password in the other test would prove nothing.
    out, err = status.communicate(timeout=900)
    assert (status.returncode, out) == (2, "")
    (line,) = err.splitlines()
    assert "password authentication failed" in line
