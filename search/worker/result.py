"""A row's folder: its identity, its result, and the conditions of that result."""

import contextlib
import functools
import importlib.metadata
import json
import logging
import platform
import subprocess
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import bdense
from bdense.files import write_json
from search.study.results import TrialResult
from search.study.retention import IDENTITY, RESULT, drop_checkpoints
from search.study.trial_log import LOG_FILE, worker_name
from search.worker.trainer import Attempt

_log = logging.getLogger(__name__)

PACKAGES = ("bdense", "torch", "numpy", "optuna", "ray", "sqlalchemy", "torch-fidelity")


def take_folder(folder: Path, identity: Mapping[str, Any]) -> None:
    """Move the folder aside if it holds another row, then mark it as this row's.

    A study that was deleted from its database, or has the same name in another one, leaves
    folders behind.
    """
    in_use = folder.exists() and any(path.name != LOG_FILE for path in folder.iterdir())
    if in_use and not is_folder_of(folder, identity):
        aside = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}")
        _log.warning("%s holds another study's trial; moved to %s", folder, aside.name)
        folder.rename(aside)
    mark = folder / IDENTITY
    if not mark.exists():
        write_json(mark, identity, sort_keys=True)


def is_folder_of(folder: Path, identity: Mapping[str, Any]) -> bool:
    """Whether ``take_folder`` marked a folder as this row's."""
    mark = folder / IDENTITY
    ours = json.dumps(identity, sort_keys=True)
    return mark.exists() and mark.read_bytes() == ours.encode()


def read_result(folder: Path, identity: Mapping[str, Any]) -> TrialResult | None:
    """The result that an earlier worker wrote for this very row; None without one."""
    path = folder / RESULT
    if not path.exists():
        return None
    stored: dict[str, Any] = json.loads(path.read_text())
    if stored["identity"] != identity:
        return None
    return TrialResult.of(stored["value"], stored["attrs"])


def stored_or_made(
    attempt: Attempt, fingerprint: str, make: Callable[[], TrialResult]
) -> TrialResult:
    """A row's result: what an earlier attempt wrote for this very row, else what ``make`` returns.

    It is written to the row's folder, and the checkpoint deleted, before it is returned.
    """
    folder, identity = attempt.folder, attempt.task.identity(fingerprint)
    take_folder(folder, identity)
    attempt.log.open()
    if (done := read_result(folder, identity)) is not None:
        return done
    result = make()
    stored = {"value": result.value, "attrs": result.attrs(), "identity": identity}
    write_json(folder / RESULT, stored)
    drop_checkpoints(folder)
    return result


def provenance(fingerprint: str, seeds: Mapping[str, int], device: str) -> dict[str, Any]:
    """Fields of every row's result: conditions, software and machine."""
    return {
        "fingerprint": fingerprint,
        "seeds": dict(seeds),
        "versions": package_versions(),
        "device": device,
        "worker": worker_name(),
    }


@functools.cache
def package_versions() -> dict[str, str]:
    """Versions that a result depends on; bdense's has the commit in a git checkout."""
    found = {}
    for name in PACKAGES:
        # A worker that only runs programs needs no torch.
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    found["bdense"] += _commit()
    return found | {"python": platform.python_version()}


def _commit() -> str:
    """The checkout's commit as a local version, as in +g1f2e3d4; "" where there is none."""
    root = Path(bdense.__file__).parents[1]
    if not (root / ".git").exists():
        return ""
    asked = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"+g{said.stdout.strip()}"


def below_runs(path: Path) -> str:
    """A row's file as the study's rows name it: study/number/file."""
    return str(Path(*path.parts[-3:]))
