"""Shared by the benchmarks: options, tables, facts about the machine, dated result files."""

import argparse
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
DIGITS_STUDY = Path("studies/digits-nfe2.yaml")
RESULTS = ROOT / "benchmarks" / "results"


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument(
        "--write", action="store_true", help="also write a dated file under benchmarks/results"
    )
    return options


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown, the first column to the left, all others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def publish(
    benchmark: str,
    body: str,
    *,
    write: bool,
    arguments: Sequence[str] | None = None,
    threads: str | None = None,
) -> None:
    """Print the result with what it ran on, and write it down where asked.

    Args:
        benchmark: The script's name.
        body: Markdown: tables and a short reading.
        write: Whether to write a file.
        arguments: Of the command, where they are not fit to be shown as they were given.
        threads: What computed, where it was not this process.
    """
    given = shlex.join(sys.argv[1:] if arguments is None else arguments)
    now = datetime.now(UTC)
    text = f"""# {benchmark}

- command: `{f"python -m benchmarks.{benchmark} {given}".strip()}`
- commit: {_commit()}
- hardware: {_hardware(threads)}
- software: torch {torch.__version__}, Python {platform.python_version()}
- date: {now:%Y-%m-%d %H:%M} UTC

{body}
"""
    print(text)
    if write:
        machine = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu()
        slug = re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")
        path = RESULTS / f"{now:%Y-%m-%d}-{benchmark.replace('_', '-')}-{slug}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(f"written: benchmarks/results/{path.name}")


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()

    try:
        changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + " with uncommitted changes" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return "unknown: not a git checkout"


def _hardware(threads: str | None) -> str:
    cpu = f"{_cpu()}; {threads or f'{torch.get_num_threads()} torch threads'}"
    return f"{torch.cuda.get_device_name()}; {cpu}" if torch.cuda.is_available() else cpu


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    return f"{os.cpu_count()} cores {models[0] if models else platform.machine()}"
