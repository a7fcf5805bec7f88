"""Workers and clusters of other versions."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from search.errors import SpecChangedError
from search.storage.engine import resolve_storage_url
from search.study.arms import ROW_SPACE
from search.study.study import Study
from search.worker import result
from search.worker.worker import Worker
from tests.e2e.chaos import end_all
from tests.e2e.stack import free_port
from tests.e2e.study import Workplace, small_study
from tests.rows import SFD
from tests.studies import spec


@pytest.fixture
def study(tmp_path, monkeypatch, shared_cache) -> Study:
    """Two short trials and the baselines."""
    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("BDENSE_CACHE", str(shared_cache))
    return Study.create(resolve_storage_url(None), spec(SFD, plan={"trials": 2, "replicates": 1}))


def work_on_one(study: Study) -> None:
    worker = Worker(study)
    claimed = worker.claim()
    assert claimed is not None
    worker.work(claimed)


def test_a_worker_of_other_numerics_measures_nothing(study, monkeypatch):
    work_on_one(study)
    monkeypatch.setattr("search.spec.distillation.NUMERICS", -1)
    with pytest.raises(SpecChangedError, match="the worker runs another version of bdense"):
        work_on_one(study)
    counts = study.given.counts()
    assert (counts.complete, counts.failed, counts.running) == (1, 0, 1)
    monkeypatch.undo()
    again = study.given.claim(ROW_SPACE, None)
    assert (again.number, again.attempt, again.tries, again.adopted) == (1, 2, 1, True)


def test_a_worker_of_another_release_joins_and_it_is_told(study, monkeypatch, tmp_path):
    """The same numerics: harmless, and every trial says by what it was measured."""
    for _ in range(3):
        work_on_one(study)
    other = tmp_path / "site" / "bdense-9.9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: bdense\nVersion: 9.9.9\n")
    monkeypatch.syspath_prepend(str(other.parent))
    result.package_versions.cache_clear()
    try:
        work_on_one(study)
    finally:
        result.package_versions.cache_clear()
    first, second = study.search.study.trials
    own, theirs = (trial.user_attrs["versions"] for trial in (first, second))
    assert theirs["bdense"].partition("+")[0] == "9.9.9"  # and the commit
    assert theirs == own | {"bdense": theirs["bdense"]}
    assert study.search.differing_versions() == [
        f"bdense differs between trials: {own['bdense']} in 1, {theirs['bdense']} in 1"
    ]
    assert study.given.differing_versions() == []


@pytest.fixture
def cluster(tmp_path) -> Iterator[dict[str, str]]:
    """A real Ray head that asks for a token, as the environment of whoever uses it."""
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 4)
    shared = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    port, mark = free_port(), {"BDENSE_TEST_HEAD": str(tmp_path)}
    program = Path(sys.executable).with_name("ray")
    try:
        subprocess.run(
            [
                *(program, "start", "--head", f"--port={port}", "--num-cpus=1"),
                *("--include-dashboard=false", "--disable-usage-stats"),
                *("--node-ip-address=127.0.0.1", "--object-store-memory=80000000"),
            ],
            check=True,
            capture_output=True,
            timeout=300,
            env=os.environ | shared | mark,
        )
        yield shared | {"RAY_ADDRESS": f"127.0.0.1:{port}"}
    finally:
        end_all(f"BDENSE_TEST_HEAD={tmp_path}")


OTHER_VERSION = """
import json, sys
from ray._private import ray_constants
from ray._common.usage import usage_constants
from ray._raylet import GcsClient

client = GcsClient(address=sys.argv[1])
where = dict(namespace=ray_constants.KV_NAMESPACE_CLUSTER)
key = usage_constants.CLUSTER_METADATA_KEY
stored = json.loads(client.internal_kv_get(key, **where))
client.internal_kv_put(key, json.dumps(stored | {"ray_version": "0.0.1"}).encode(), True, **where)
"""


@pytest.mark.slow
def test_a_cluster_of_another_ray_is_refused_in_words(cluster, tmp_path):
    """The head is a real one that is made to say that it is older."""
    head = cluster["RAY_ADDRESS"]
    place = Workplace(tmp_path, tmp_path / "cache", extra=cluster)
    assert ray_finding(place) == {
        "level": "ok",
        "text": f"the cluster at {head} has 1 machines, 1 CPUs and 0 GPUs",
    }
    program = [sys.executable, "-c", OTHER_VERSION, head]
    subprocess.run(program, check=True, timeout=60, env=os.environ | cluster)
    found = ray_finding(place)
    assert found["level"] == "problem"
    assert "The cluster was started with: Ray: 0.0.1" in found["text"]
    done = place.run("launch", place.write(small_study()))
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"bdense-search: Ray cannot be used at {head}: Version mismatch: ")
    assert "The cluster was started with: Ray: 0.0.1" in line
    assert line.endswith("versions of Ray and Python here")
    assert "Traceback" not in done.stderr


def ray_finding(place: Workplace) -> dict[str, str]:
    """What the doctor says of the cluster."""
    findings = json.loads(place.run("doctor", "--json").stdout)["findings"]
    (found,) = [each for each in findings if each["check"] == "Ray"]
    return {"level": found["level"], "text": found["text"]}
