"""What importing costs, and that the public names are there."""

import importlib
import importlib.metadata
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
    service = {"ray", "optuna", "sqlalchemy", "yaml", "search", "sklearn"}
    assert not loaded & (service | {"torch_fidelity", "torchvision"})


def test_looking_at_a_study_needs_no_torch():
    looking = ("search.cli", "search.study.summary", "search.storage.ledger")
    loaded = modules_after(f"import {', '.join(looking)}")
    assert not loaded & {"torch", "ray"}


@pytest.mark.parametrize("command", ["bdense", "search"])
def test_version_of_both_commands(command, capsys):
    """It is asked in scripts, so it must not import torch."""
    main = importlib.import_module(f"{command}.cli").main
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    prog = {"bdense": "bdense", "search": "bdense-search"}[command]
    version = importlib.metadata.version("bdense")
    assert capsys.readouterr().out == f"{prog} {version}\n"
    loaded = modules_after(
        f"import atexit; atexit.register(lambda: print(*sys.modules)); "
        f"from {command}.cli import main; main(['--version'])"
    )
    assert f"{command}.cli" in loaded
    assert "torch" not in loaded


@pytest.mark.parametrize("name", bdense.__all__)
def test_public_names(name):
    thing = getattr(bdense, name)
    assert name == "NUMERICS" or thing.__name__ == name


def test_no_other_names():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = bdense.nothing
