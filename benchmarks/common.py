"""What the benchmarks share: interleaved timing, what a run ran on, dated result files."""

import argparse
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from bdense.data import load_dataset
from bdense.denoiser import EDMPrecond
from bdense.sfd import IterationReport, SFDConfig, distill
from bdense.teachers import new_denoiser
from bdense.trajectories import Trajectories
from bdense.weights import uniform_weights
from search.engine import teacher_config
from search.spec import StudySpec

ROOT = Path(__file__).resolve().parents[1]
DIGITS_STUDY = Path("studies/digits-nfe2.yaml")
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True, slots=True)
class Paired:
    """Seconds of two sides measured in turns, so that a drifting machine moves both alike."""

    first: list[float]
    second: list[float]

    @property
    def seconds(self) -> tuple[float, float]:
        """The median of each side."""
        return statistics.median(self.first), statistics.median(self.second)

    @property
    def ratio(self) -> float:
        """The median over pairs of first / second."""
        return statistics.median(self._ratios())

    @property
    def difference(self) -> float:
        """The median over pairs of first - second, in seconds."""
        return statistics.median(a - b for a, b in zip(self.first, self.second, strict=True))

    def spread(self) -> str:
        """The lowest and the highest ratio of a pair."""
        return f"{min(self._ratios()):.3f} to {max(self._ratios()):.3f}"

    def _ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.first, self.second, strict=True)]


def interleave(first: Callable[[], float], second: Callable[[], float], pairs: int) -> Paired:
    """Measure the two in turns; who begins changes from pair to pair, and pair 0 is thrown away.

    Args:
        first, second: Do one block of work and return its seconds.
        pairs: Pairs that count.
    """
    measured = Paired([], [])
    for pair in range(pairs + 1):
        order = ((first, measured.first), (second, measured.second))
        for measure, seconds in order if pair % 2 else order[::-1]:
            seconds.append(measure())
    return Paired(measured.first[1:], measured.second[1:])


def seconds_per_call(call: Callable[[], object], calls: int, device: torch.device) -> float:
    """Mean over a block of calls."""
    synchronise(device)
    started = time.perf_counter()
    for _ in range(calls):
        call()
    synchronise(device)
    return (time.perf_counter() - started) / calls


def seconds_per_iteration(
    teacher: EDMPrecond, trajectories: Trajectories, num_branches: int, iterations: int
) -> float:
    """Mean over a block of training iterations of ``distill``, after one that does not count.

    Args:
        teacher: The student starts from it.
        trajectories: ``iterations`` + 1 of them or more.
        num_branches: K for B-DENSE (uniform weights), 1 for plain SFD.
        iterations: Those that count.
    """
    device = next(teacher.parameters()).device
    stamps: list[float] = []

    def on_iteration(done: IterationReport) -> None:
        synchronise(device)
        stamps.append(time.perf_counter())

    images = (iterations + 1) * trajectories.batch
    config = SFDConfig(num_branches=num_branches, images=images)
    weights = uniform_weights()(num_branches)
    distill(teacher, trajectories, config, weights, on_iteration=on_iteration)
    return (stamps[-1] - stamps[0]) / iterations


def untrained_teacher(spec: StudySpec, device: torch.device) -> EDMPrecond:
    """The study's network with its initial weights, which cost what trained ones do."""
    if spec.teacher.train is None:
        raise SystemExit(f"study {spec.name} has no teacher.train; choose one that trains its own")
    shape = load_dataset(spec.data).images.shape[1:]
    return new_denoiser(teacher_config(spec.teacher.train), shape).to(device).eval()


def pick_device(threads: int) -> torch.device:
    """The GPU if there is one; the CPU is used with that many threads."""
    torch.set_num_threads(threads)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronise(device: torch.device) -> None:
    """Wait for the GPU; a CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
    benchmark: str, body: str, *, write: bool, arguments: Sequence[str] | None = None
) -> None:
    """Print the result with what it ran on, and write it down where asked.

    Args:
        benchmark: The script's name.
        body: Markdown: tables and a short reading.
        write: Whether to write a file.
        arguments: Of the command, where they are not fit to be shown as they were given.
    """
    given = shlex.join(sys.argv[1:] if arguments is None else arguments)
    now = datetime.now(UTC)
    text = f"""# {benchmark}

- command: `{f"python -m benchmarks.{benchmark} {given}".strip()}`
- commit: {_commit()}
- hardware: {_hardware()}
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
        print(f"written: {path.relative_to(ROOT)}")


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return git("rev-parse", "--short", "HEAD") + (" with uncommitted changes" if changed else "")


def _hardware() -> str:
    cpu = f"{_cpu()}, {torch.get_num_threads()} torch threads in use"
    return f"{torch.cuda.get_device_name()}; {cpu}" if torch.cuda.is_available() else cpu


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    model = models[0].strip() if models else platform.processor() or platform.machine()
    return f"{os.cpu_count()} cores {model}"
