"""A study small enough for tests: real digits, real Ray, real torch, seconds a trial."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

SMALL: dict[str, Any] = {
    "name": "small",
    "data": "digits",
    "teacher": {
        "train": {
            "network": {
                "model_channels": 8,
                "channel_mult": [1, 2],
                "num_blocks": 1,
                "attn_resolutions": [],
                "dropout": 0.0,
            },
            "kimg": 10,
            "ema_halflife_kimg": 1,
        }
    },
    "method": {"name": "sfd", "nfe": 2, "substeps": 4, "kimg": 2.56, "batch": 64, "lr": 5e-4},
    "weights": {"name": "normalised", "a": {"low": -0.5, "high": 3.0}},
    "plan": {"trials": 3},
    "evaluation": {"images": 256, "extractor": "digits-classifier"},
    "resources": {"checkpoint_seconds": 0.2, "lease_seconds": 10},
}


def small_study(**sections: Any) -> dict[str, Any]:
    """``SMALL`` with some sections updated."""
    study = json.loads(json.dumps(SMALL))
    for name, value in sections.items():
        if isinstance(value, dict):
            study[name] |= value
        else:
            study[name] = value
    return study


@dataclass
class Workplace:
    """A folder to run the command in, as a user would; teacher and features are shared."""

    folder: Path
    cache: Path
    storage: str | None = None
    extra: dict[str, str] = field(default_factory=dict)

    def write(self, study: dict[str, Any]) -> Path:
        path = self.folder / f"{study['name']}.yaml"
        path.write_text(yaml.safe_dump(study))
        return path

    @property
    def environment(self) -> dict[str, str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("BDENSE_", "RAY_"))}
        mine = {"BDENSE_CACHE": str(self.cache), **self.extra}
        if self.storage is not None:
            mine["BDENSE_STORAGE"] = self.storage
        return clean | mine

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "search.cli", *map(str, arguments)],
            cwd=self.folder,
            env=self.environment,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, *arguments: str | Path, timeout: float = 600) -> subprocess.CompletedProcess:
        with self.start(*arguments) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def json(self, *arguments: str | Path) -> dict[str, Any]:
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


def wait_until(condition, *, seconds: float = 300, what: str = "") -> Any:
    """The first true answer."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s in vain: {what}"
        time.sleep(0.1)
    return answer


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
