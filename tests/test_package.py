"""What importing costs, and that the public names are there."""

import subprocess
import sys

import pytest

import bdense


def modules_after(statement: str) -> set[str]:
    """Modules that a fresh interpreter has loaded after ``statement``."""
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_engine_knows_no_service():
    """So that it runs on a machine that has none of them."""
    loaded = modules_after("from bdense import *; import bdense.cli")
    assert "torch" in loaded
    service = {"ray", "optuna", "pydantic", "sqlalchemy", "yaml", "search", "sklearn"}
    assert not loaded & (service | {"torch_fidelity", "torchvision"})


def test_looking_at_a_study_needs_no_torch():
    looking = ("search.cli", "search.study.summary", "search.storage.ledger")
    loaded = modules_after(f"import {', '.join(looking)}")
    assert not loaded & {"torch", "ray"}


@pytest.mark.parametrize("name", bdense.__all__)
def test_public_names(name):
    thing = getattr(bdense, name)
    assert name == "NUMERICS" or thing.__name__ == name


def test_no_other_names():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = bdense.nothing
