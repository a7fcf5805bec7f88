"""A row's folder: whose it is, what the row came to, and what that was made by."""

import functools
import importlib.metadata
import json
import logging
import platform
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bdense.files import atomic_write
from search.study.results import TrialResult
from search.study.retention import IDENTITY, RESULT, drop_checkpoints
from search.study.trial_log import LOG_FILE, worker_name

_log = logging.getLogger(__name__)

PACKAGES = ("bdense", "torch", "numpy", "optuna", "ray", "sqlalchemy", "torch-fidelity")


def take_folder(folder: Path, identity: Mapping[str, Any]) -> None:
    """Make sure that what lies in a row's folder is this row's.

    A study that was deleted from its database, or lives in another one under the same name,
    leaves folders behind; theirs is moved aside, never taken for ours.
    """
    ours = json.dumps(identity, sort_keys=True)
    mark = folder / IDENTITY
    if _holds_more_than_a_log(folder) and (not mark.exists() or mark.read_text() != ours):
        aside = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}")
        _log.warning("%s holds another study's trial; moved to %s", folder, aside.name)
        folder.rename(aside)
    if not mark.exists():
        with atomic_write(mark) as scratch:
            scratch.write_text(ours)


def _holds_more_than_a_log(folder: Path) -> bool:
    return folder.exists() and any(path.name != LOG_FILE for path in folder.iterdir())


def read_result(folder: Path, identity: Mapping[str, Any]) -> TrialResult | None:
    """What a worker before computed for this very row, if it got that far."""
    path = folder / RESULT
    if not path.exists():
        return None
    stored: dict[str, Any] = json.loads(path.read_text())
    if stored["identity"] != identity:
        return None
    return TrialResult.of(stored["value"], stored["attrs"])


def write_result(folder: Path, identity: Mapping[str, Any], result: TrialResult) -> TrialResult:
    """Keep what a row came to in its folder; its checkpoint is of no use any more.

    Args:
        folder: The row's.
        identity: The row's, as ``take_folder`` was given it.
        result: What it came to.

    Returns:
        The same.
    """
    stored = {"value": result.value, "attrs": result.attrs(), "identity": identity}
    with atomic_write(folder / RESULT) as scratch:
        scratch.write_text(json.dumps(stored))
    drop_checkpoints(folder)
    return result


def provenance(fingerprint: str, seeds: Mapping[str, int], device: torch.device) -> dict[str, Any]:
    """What every row stores of how and where it was made: conditions, software, machine."""
    return {
        "fingerprint": fingerprint,
        "seeds": dict(seeds),
        "versions": package_versions(),
        "device": _device_name(device),
        "worker": worker_name(),
    }


@functools.cache
def package_versions() -> dict[str, str]:
    """Versions a result depends on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES} | {
        "python": platform.python_version()
    }


def _device_name(device: torch.device) -> str:
    """The GPU's name, or what kind of CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def below_runs(path: Path) -> str:
    """A row's file as the study's rows name it: study/number/file."""
    return str(Path(*path.parts[-3:]))
