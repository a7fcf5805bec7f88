"""The ``launch`` verb: open the study, run what is left, say what came out."""

import functools
import multiprocessing
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from search.progress import Display
from search.report import Standing, copy_baselines, failures, headline, standing, table
from search.runner import run_study
from search.spec import StudySpec
from search.storage import runs_folder
from search.study import Study


def launch(spec: StudySpec, url: str, source: Path, workers: int | None) -> tuple[str, bool]:
    """Bring a study to its end; progress goes to stderr.

    Args:
        spec: The study, checked.
        url: Its storage.
        source: The study file, for the commands that are suggested.
        workers: Trials at once; None lets the cluster decide.

    Returns:
        The result for people, and whether any trial is complete.
    """
    study = Study.create(url, spec)
    before = standing(study)
    if not study.left():
        sys.stderr.write(f"study {spec.name} is complete; nothing is left to do\n")
    else:
        if before.counts.complete or before.counts.running:
            sys.stderr.write(f"carrying on with {headline(before)}\n")
        display = Display(study)
        try:
            run_study(
                spec,
                study,
                workers=workers,
                on_preparing=display.preparing,
                on_searching=display.searching,
            )
        finally:
            display.close()
    copy_baselines(study)
    now = standing(study)
    lines = [headline(now), *failures(study), table(now), "", *_next(now, source)]
    return "\n".join(lines), now.best is not None


def check_apart(spec: StudySpec) -> None:
    """``search.engine.check`` in a process of its own.

    It needs torch, which would stay in the launcher's memory (500 MB) for the whole study.

    Raises:
        SpecError: The engine cannot do what the spec asks.
    """
    spawn = multiprocessing.get_context("spawn")
    # Ctrl-C reaches the whole group; only the launcher is to speak of it.
    quiet = functools.partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn, initializer=quiet) as apart:
        apart.submit(_check, spec).result()


def _check(spec: StudySpec) -> None:
    from search.engine import check

    check(spec)


def _next(now: Standing, source: Path) -> list[str]:
    """What one does with a finished study."""
    lines = ["see it in the browser:   bdense-search dashboard"]
    if now.best is not None:
        student = runs_folder() / now.best["student"]
        lines.append(f"draw images with it:     bdense sample {student} --out samples.png")
        if "weights_plot" in now.best:
            plot = runs_folder() / now.best["weights_plot"]
            lines.append(f"its weights over time:   {plot}")
    more = 2 * now.counts.planned
    lines.append(f"search on:               bdense-search launch {source} --trials {more}")
    return lines
