"""Running what is left of a study, and the ``launch`` verb, which says what came out."""

import functools
import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from search.log import say, speaking_of
from search.report.live import Showing
from search.run.progress import Display, Snapshot, planned_snapshot, study_snapshot
from search.run.runner import Job, run
from search.spec.model_spec import ModelSpec
from search.spec.promotion_spec import PromotionSpec
from search.spec.study_spec import StudySpec
from search.study.arms import Planned
from search.study.folders import named_file
from search.study.study import Study
from search.study.summary import Standing, copy_baselines, failures, headline, standing, table


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
    before, showing = standing(study), Showing(study)
    if not study.left():
        say(f"study {spec.name} is complete; nothing is left to do")
    else:
        if before.counts.complete or before.counts.running:
            say(f"carrying on with {headline(before)}")
        job = Job(kind="search", record=study, specs=[spec])
        run_shown(job, functools.partial(study_snapshot, study), workers, showing)
    copy_baselines(study)
    for line in study.trials.differing_versions():
        say(f"{line}; what is close may differ by that alone (bdense-search doctor {spec.name})")
    showing.finish()
    now = standing(study)
    lines = [headline(now), *failures(study), table(now), "", *_next(now, source)]
    return "\n".join(lines), now.best is not None


def run_shown(
    job: Job, snapshot: Callable[[], Snapshot], workers: int | None, showing: Showing
) -> None:
    """Bring rows to their end and show how far they are: on stderr, and in the dashboard."""
    display = Display(snapshot)

    def on_running() -> None:
        display.running()
        showing.refresh()

    try:
        with speaking_of(study=job.record.name):
            run(
                job,
                workers=workers,
                on_preparing=display.preparing,
                on_running=on_running,
            )
    finally:
        display.close()


def run_planned(planned: Planned, specs: Sequence[ModelSpec], workers: int | None) -> None:
    """Bring planned rows to their end, if any are left.

    Args:
        planned: The rows.
        specs: What is made for them.
        workers: Rows at once; None lets the cluster decide.
    """
    showing = Showing(planned)
    if not planned.left():
        say(f"{planned.name} is complete; nothing is left to do")
        showing.finish()
        return
    counts = planned.ledger.counts()
    if counts.complete or counts.running:
        say(f"carrying on with {planned.headline()}")
    job = Job(kind=planned.kind, record=planned, specs=specs)
    run_shown(job, functools.partial(planned_snapshot, planned), workers, showing)
    showing.finish()


def check_apart(spec: ModelSpec) -> None:
    """``search.worker.engine.check``, or ``check_promotion``, in a process of its own.

    It needs torch, which would stay in the launcher's memory (500 MB) for the whole study.

    Raises:
        SpecError: The engine cannot do what the spec asks.
    """
    spawn = multiprocessing.get_context("spawn")
    # Ctrl-C reaches the whole group; only the launcher is to speak of it.
    quiet = functools.partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn, initializer=quiet) as apart:
        apart.submit(_check, spec).result()


def _check(spec: ModelSpec) -> None:
    from search.worker.chain_engine import check_promotion
    from search.worker.engine import check

    if isinstance(spec, PromotionSpec):
        check_promotion(spec)
    elif isinstance(spec, StudySpec):
        check(spec)


def _next(now: Standing, source: Path) -> list[str]:
    """What one does with a finished study."""
    lines = ["see it in the browser:   bdense-search dashboard"]
    if now.best is not None:
        student = named_file(now.best["student"])
        lines.append(f"draw images with it:     bdense sample {student} --out samples.png")
        if "weights_plot" in now.best:
            plot = named_file(now.best["weights_plot"])
            lines.append(f"its weights over time:   {plot}")
    more = 2 * now.counts.planned
    lines.append(f"search on:               bdense-search launch {source} --trials {more}")
    return lines
