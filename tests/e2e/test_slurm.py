"""docs/clusters/slurm.sbatch on a real Slurm of two hosts: a job requeued while it trains."""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import sqlalchemy as sa

from search.storage.ledger import Ledger
from tests.conftest import Postgres
from tests.e2e.hosts import Host
from tests.e2e.study import Workplace, small_study, wait_until

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
BATCH = ROOT / "docs" / "clusters" / "slurm.sbatch"
STUDY = small_study(method={"kimg": 1.28})
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scontrol", "munged")
PASSWORD = secrets.token_hex(8)
CONFIGURATION = """ClusterName=bdense
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
SlurmctldHost=head({head})
NodeName=head NodeAddr={head} CPUs=1
NodeName=worker NodeAddr={worker} CPUs=1
PartitionName=all Nodes=ALL Default=YES State=UP
"""


@dataclass
class Slurm:
    """Two nodes, head and worker; commands are given on the head."""

    folder: Path
    head: Host
    environment: dict[str, str]

    def ask(self, *command: str | Path) -> str:
        done = self.head.run(*command, environment=self.environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def state(self, job: str) -> str:
        """As squeue abbreviates it; empty once the job is over."""
        done = self.head.run(
            *("squeue", "--noheader", "--format=%t", f"--jobs={job}"), environment=self.environment
        )
        return done.stdout.strip()


@pytest.fixture(scope="module")
def slurm(folder: Path, hosts: list[Host], server: Postgres) -> Iterator[Slurm]:
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        pytest.skip(f"needs Slurm: {', '.join(missing)} not found")
    head, worker, database = hosts
    engine = sa.create_engine(server.url("postgres"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE ROLE bdense LOGIN PASSWORD '{PASSWORD}'")
        connection.exec_driver_sql("CREATE DATABASE studies OWNER bdense")
    engine.dispose()
    (folder / "pgpass").write_text(f"*:*:*:bdense:{PASSWORD}\n")
    (folder / "pgpass").chmod(0o600)
    for name in ("munge", "shared", "local", "state"):
        (folder / name).mkdir(mode=0o700)
    key = folder / "munge" / "key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o600)
    configuration = CONFIGURATION.format(folder=folder, head=head.address, worker=worker.address)
    (folder / "slurm.conf").write_text(configuration)
    # Nothing here is confined by cgroups, but slurmd looks for them.
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    kernels = {name: os.environ[name] for name in os.environ if name.startswith("OPENBLAS_")}
    environment = {
        **kernels,
        "PATH": os.environ["PATH"],
        "OMP_NUM_THREADS": "1",
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PGPASSFILE": str(folder / "pgpass"),
        "BDENSE_STORAGE": f"postgresql://bdense@{database.address}/studies",
        "BDENSE_VENV": str(Path(sys.executable).parents[1]),
        "RAY_TMPDIR": str(folder / "local"),
    }
    parts = ("socket", "key-file", "pid-file", "log-file", "seed-file")
    munge = [f"--{part}={folder}/munge/{part.removesuffix('-file')}" for part in parts]
    subprocess.run(["munged", "--force", *munge], check=True, capture_output=True)
    try:
        head.start("slurmctld", "-D", environment=environment, output=folder / "slurmctld.log")
        for host in (head, worker):
            # Ray's own files lie where each host has its own.
            own = f"mount -t tmpfs tmpfs {folder}/local; exec slurmd -D"
            log = folder / f"slurmd-{host.name}.log"
            host.start("sh", "-c", own, environment=environment, output=log)
        made = Slurm(folder, head, environment)
        idle = ("sinfo", "--noheader", "--states=idle", "--format=%D")
        wait_until(
            lambda: head.run(*idle, environment=environment).stdout.strip() == "2",
            seconds=60,
            what="the nodes",
        )
        yield made
    finally:
        with contextlib.suppress(OSError):
            os.kill(int((folder / "munge" / "pid").read_text()), signal.SIGTERM)


def test_a_job_that_is_requeued_goes_on_and_gives_what_a_calm_one_gives(slurm, server):
    place = Workplace(slurm.folder / "shared", slurm.folder / "shared" / "runs" / "cache")
    study = place.write(STUDY)
    command = ("sbatch", "--parsable", f"--chdir={place.folder}", "--nodes=2")
    job = slurm.ask(*command, BATCH, study.name).strip()
    output = place.folder / f"slurm-{job}.out"
    # The job's own role: tables of another would not be its own.
    url = sa.make_url(server.url("studies")).set(username="bdense").render_as_string()
    watched = Workplace(place.folder, place.cache, storage=url)
    watched.worker_at("training", "small", "small.baselines")
    (token,) = [path.read_text() for path in place.folder.glob(".ray-token-*")]

    slurm.ask("scancel", "--batch", "--signal=USR1", job)  # as before the time limit
    wait_until(lambda: slurm.state(job) == "PD", what="the requeue")
    assert "nothing is lost" in output.read_text()
    assert not list(place.folder.glob(".ray-token-*"))
    slurm.ask("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm waits for minutes
    wait_until(lambda: slurm.state(job) == "", what="its end")

    told = output.read_text()
    assert "study small: 3 of 3 trials complete, 0 pruned, 0 failed" in told
    assert token not in told
    rows = Ledger.open(url, "small", budget=None).study.get_trials()
    calm = Workplace(slurm.folder / "calm", place.cache)
    calm.folder.mkdir()
    calm.work(STUDY)
    assert {row.params["a"]: row.value for row in rows} == calm.fids()
    names = ("small", "small.baselines")
    studies = [Ledger.open(url, name, budget=None).study for name in names]
    workers = [row.user_attrs["worker"] for study in studies for row in study.get_trials()]
    assert {worker.partition(":")[0] for worker in workers} == {"head", "worker"}


def test_a_job_without_a_study_says_how_to_give_one(slurm):
    shared = slurm.folder / "shared"
    command = ("sbatch", "--wait", f"--chdir={shared}", "--output=refused.out", BATCH)
    assert slurm.head.run(*command, environment=slurm.environment).returncode == 2
    (line,) = (shared / "refused.out").read_text().splitlines()
    assert "sbatch slurm.sbatch studies/" in line
