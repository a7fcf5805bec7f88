"""What a launch says of a Ray cluster that it cannot use, or that nobody has joined yet."""

import pytest
import ray
from ray.exceptions import AuthenticationError

from bdense.errors import InputError
from search.run import runner
from search.run.machine import ray_folder_problems, require_ray_folders
from search.run.runner import cannot_use

HEAD = {"Alive": True, "Resources": {"memory": 1e9}}


@pytest.fixture
def address(monkeypatch) -> str:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.5:6379")
    return "10.0.0.5:6379"


def buried() -> Exception:
    """As ``ray.init`` raises it: the reason stands in a text that is the cause of another one."""
    try:
        try:
            raise RuntimeError("Failed to connect to GCS. Last connection error: InvalidAuthToken")
        except RuntimeError as error:
            raise ConnectionError("Failed to connect to Ray cluster at 10.0.0.5:6379") from error
    except ConnectionError as error:
        return error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (AuthenticationError("no token"), "RAY_AUTH_TOKEN_PATH"),
        (buried(), "RAY_AUTH_TOKEN_PATH"),
        (ConnectionError("no\n route"), "no route; check RAY_ADDRESS"),
        (
            RuntimeError("Version mismatch: started with:\n Ray: 2.59"),
            "versions of Ray and Python",
        ),
    ],
)
def test_a_cluster_that_cannot_be_used_is_named_on_one_line(address, error, told):
    said = str(cannot_use(error))
    assert address in said
    assert told in said
    assert "\n" not in said


def test_without_an_address_this_machine_is_meant(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert "this machine: no room" in str(cannot_use(ValueError("no room")))


def test_a_cluster_that_nobody_joins_is_named(monkeypatch):
    monkeypatch.setattr(ray, "nodes", lambda: [HEAD])
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(runner, "JOIN_SECONDS", 0.05)
    with pytest.raises(InputError, match=r"no worker joined .* within 0\.05 seconds"):
        runner._await_machines()


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"HOME": "/proc"}, "HOME=/proc"),
        ({"RAY_TMPDIR": "/proc"}, "RAY_TMPDIR"),
        ({"RAY_TMPDIR": "/proc" + "/x" * 2500}, "RAY_TMPDIR"),  # cannot even be looked for
        ({"HOME": "/proc", "RAY_AUTH_TOKEN": "a" * 64}, None),
        ({"HOME": "/proc", "RAY_ADDRESS": "10.0.0.5:6379"}, None),
    ],
)
def test_a_folder_that_ray_cannot_write_is_named_before_a_launch(monkeypatch, variables, named):
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    problems = [*ray_folder_problems()]
    assert len(problems) == (named is not None)
    assert named is None or named in problems[0]
    if named is not None:
        with pytest.raises(InputError, match=named):
            require_ray_folders()
