"""Run what is left of a study; the ``launch`` verb with its result."""

import contextlib

from search.analysis.pilot import images_of, plan_pilot
from search.analysis.priors import plan_first_points
from search.analysis.stop_rule import stop_or_plan
from search.errors import StorageError
from search.log import log_context, say
from search.report.live import NoteWriter
from search.report.overview import Overview, overview_of
from search.run.progress import Display, snapshot_of
from search.run.runner import run
from search.storage.stop_flags import Launch, held, is_asked, stopped_error
from search.study.folders import named_file
from search.study.preparing import PreparationNote
from search.study.results import sample_command
from search.study.study import Study
from search.study.summary import copy_baselines, failures, headline
from search.study.wording import align
from search.worker.trainer import Preparation


def launch(study: Study, source: str, workers: int | None) -> tuple[str, bool]:
    """Run a study to its end; progress goes to stderr.

    Args:
        study: The study, planned.
        source: Its file or name, for the commands that are suggested.
        workers: Trials at once; None lets the cluster decide.

    Returns:
        The result for people, and whether any row is complete.
    """
    study = run_planned(study, workers)
    overview = overview_of(study)
    result = [*align(overview.table()), *overview.remarks()] if not overview.is_empty else []
    lines = [headline(study), *failures(study), *result, "", *_next(overview, source)]
    return "\n".join(lines), not overview.is_empty


def run_planned(study: Study, workers: int | None) -> Study:
    """Run a study's rows; a search's after its pilot and its first points.

    Returns:
        The study as it ran, with the number of images that its pilot has settled.

    Raises:
        InputError: The pilot has too few complete rows.
        SpecChangedError: The stored pilot is of other conditions.
    """
    launch = Launch.begin(study.ledgers)  # a stop that comes during the pilot is this launch's
    if study.spec.evaluation.images == "auto":
        study = _settled(study, workers, launch)
    plan_first_points(study)
    stop_or_plan(study)
    run_rows(study, workers, launch)
    return study


def _settled(study: Study, workers: int | None, launch: Launch) -> Study:
    """Run the pilot, and return the study with the number of images that it decides."""
    spec = study.spec
    pilot = plan_pilot(study.url, spec)
    run_rows(pilot, workers)
    if is_asked(study.ledgers, launch):
        raise stopped_error(study.name)
    images, noise = images_of(pilot)
    say(
        f"evaluation.images auto: {images}; of {noise.images} images the latents' noise of a "
        f"difference is {noise.latents:.2g}, and the training seeds' {noise.seeds:.2g}"
    )
    return Study.create(study.url, spec.with_images(images))


def run_rows(study: Study, workers: int | None, launch: Launch | None = None) -> None:
    """Run a study's rows to their end, if any are left, and show the progress.

    Args:
        study: The study, planned.
        workers: Rows at once; None lets the cluster decide.
        launch: The launch that they belong to; None begins one.
    """
    note, preparing = NoteWriter(study), PreparationNote(study.main)
    if not study.left():
        say(f"{study.title} is complete; nothing is left to do")
        preparing.clear()  # a killed launch may have left its own
    else:
        counts = study.counts()
        if counts.complete or counts.running:
            say(f"carrying on with {headline(study)}")
        if working := held(study.ledgers):
            say(
                f"{working} row{'s' * (working > 1)} of {study.name} held by another launch, "
                "which goes on beside this one, or by workers that died in the last "
                f"{study.main.ttl:g} s"
            )
        note.refresh()  # the preparations may take minutes
        display = Display(lambda: snapshot_of(study))

        def on_preparing(message: Preparation) -> None:
            display.preparing(message)
            with contextlib.suppress(StorageError):  # a line of status must not end a launch
                preparing.tell(message.step, message.text)

        def on_running() -> None:
            preparing.clear()
            display.running()
            note.refresh()

        try:
            with log_context(study=study.name):
                run(
                    study,
                    launch or Launch.begin(study.ledgers),
                    workers=workers,
                    on_preparing=on_preparing,
                    on_running=on_running,
                )
        finally:
            display.close()
            with contextlib.suppress(StorageError):  # the first error counts
                preparing.clear()
    copy_baselines(study)
    for line in study.main.differing_versions():
        say(
            f"{line}; small differences may come from that alone (bdense-search doctor "
            f"{study.name})"
        )
    note.finish()


def _next(overview: Overview, source: str) -> list[str]:
    """Lines that suggest commands for a finished study."""
    study, now = overview.study, overview.now
    lines = ["see it in the browser:   bdense-search dashboard"]
    if now is None:
        if not study.spec.workload.has_students:
            return lines
        return [*lines, f"write a model folder:    bdense-search export {study.name} DIR"]
    if now.best is not None:
        result = now.best.result
        if command := sample_command(result):
            lines.append(f"draw images with it:     {command}")
        else:
            lines.append(f"confirm it:              bdense-search confirm {study.name}")
        if result.weights_plot is not None:
            lines.append(f"its weights over time:   {named_file(result.weights_plot)}")
    more = 2 * study.counts().planned
    lines.append(f"search on:               bdense-search launch {source} --trials {more}")
    return lines
