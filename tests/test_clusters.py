"""docs/clusters/ fits this version; tests/e2e/test_slurm.py runs the part for Slurm."""

import re
import shlex
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from search.cli import make_parser

ROOT = Path(__file__).parents[1]
KUBERNETES = "1.37"


@pytest.fixture(scope="module")
def manifest():
    text = (ROOT / "docs" / "clusters" / "kuberay.yaml").read_text()
    return {each["kind"]: each for each in yaml.safe_load_all(text)}


def pods(job):
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_its_parts_fit_the_schemas_of_kubernetes(manifest):
    """Unknown keys are errors; KubeRay's own part has no schema in a package."""
    kubernetes_validate.validate(manifest["PersistentVolumeClaim"], KUBERNETES, strict=True)
    for spec in pods(manifest["RayJob"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray"}, "spec": spec}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        misspelt = {**pod, "spec": {**spec, "securityContexts": {}}}
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(misspelt, KUBERNETES, strict=True)


def test_the_job_runs_a_study_that_is_mounted(manifest):
    program, *arguments = shlex.split(manifest["RayJob"]["spec"]["entrypoint"])
    assert program == "bdense-search"
    file = Path(make_parser(arguments).parse_args(arguments).study)
    for pod in pods(manifest["RayJob"]):
        volumes = {each["name"] for each in pod["volumes"]}
        (container,) = pod["containers"]
        mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
        assert str(file.parent) in mounts
        assert set(mounts.values()) == volumes
        assert "/srv/bdense/runs" in mounts
        claims = [
            v["persistentVolumeClaim"]["claimName"]
            for v in pod["volumes"]
            if len(v) == 2 and "persistentVolumeClaim" in v
        ]
        assert claims == [manifest["PersistentVolumeClaim"]["metadata"]["name"]]


def test_its_ray_is_ours_and_asks_for_a_token(manifest):
    cluster = manifest["RayJob"]["spec"]["rayClusterSpec"]
    (pinned,) = re.findall(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert cluster["rayVersion"] == pinned
    assert cluster["authOptions"] == {"mode": "token"}


def test_no_password_is_written_into_it(manifest):
    for pod in pods(manifest["RayJob"]):
        for variable in pod["containers"][0]["env"]:
            if variable["name"] != "BDENSE_LOG":
                assert "secretKeyRef" in variable["valueFrom"]
        assert pod["securityContext"]["runAsNonRoot"]
