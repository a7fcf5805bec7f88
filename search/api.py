"""The search from Python: what the command does, as one object for each study.

In a script, a notebook, or on a cluster::

    import search

    study = search.open_study("studies/digits-nfe2.yaml")
    study.run(workers=2)      # Ctrl-C stops it; the same call goes on
    study.best.value, study.frame()
    study.confirm().sentence()
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bdense.arguments import checked
from bdense.errors import InputError
from bdense.knobs import KnobError
from bdense.weights.space import require_point
from search.analysis.assessment import assess
from search.analysis.comparison import Comparison, compare
from search.analysis.confirmation import Verdict, judged_summary
from search.analysis.confirmation import verdict as verdict_of
from search.analysis.pilot import ledgers_with_pilot, with_known_images
from search.analysis.plans import (
    differing,
    given_arm,
    plan_confirmation,
    plan_given,
    transfer_arms,
)
from search.analysis.priors import require_priors
from search.analysis.recommendation import Recommendation
from search.log import say
from search.redaction import redact
from search.removal import clean, delete, to_delete
from search.report.document import as_markdown
from search.report.log_lines import logged_row
from search.report.overview import overview_of
from search.report.pages import study_page
from search.report.plots import study_plots
from search.report.report_files import write_report
from search.spec.file import read_here, read_spec, require_variants
from search.spec.sections import FRESH_SEEDS, TRANSFERRED
from search.spec.study import StudySpec
from search.storage.engine import resolve_storage_url
from search.storage.ledger import MENDABLE
from search.storage.queries import Counts
from search.storage.stop_flags import ask_all
from search.study.folders import row_folder
from search.study.study import Study
from search.study.summary import Measured
from search.study.trial_list import ListedRow, keys_of, list_rows
from search.study.trial_log import LOG_FILE, read_log

if TYPE_CHECKING:
    import optuna
    import pandas as pd
    from matplotlib.figure import Figure

    from search.export import Exported
    from search.promotion import Promoted


@checked
def open_study(
    study: str | Path | Mapping[str, Any] | StudySpec,
    *,
    storage: str | None = None,
    trials: int | None = None,
) -> "OpenStudy":
    """A study, planned in the storage if it is not there yet; nothing runs.

    Args:
        study: A YAML file, what such a file holds or a ``StudySpec`` (paths relative to the
            current folder), or the name of a study of the storage.
        storage: URL of the study database; None is ``$BDENSE_STORAGE``, else SQLite in
            ``runs/bdense.db``.
        trials: In place of ``plan.trials``.

    Raises:
        SpecError: The file is wrong; a line for each mistake.
        SpecChangedError: The stored study has other conditions.
        UnknownStudyError: There is no study of that name.
        StorageError: The database cannot be opened.
    """
    url = resolve_storage_url(storage)
    if isinstance(study, str) and not is_file(study):
        if trials is None:
            return OpenStudy(Study.open(url, study))
        return OpenStudy(planned(url, stored_spec(url, study, trials)))
    return OpenStudy(planned(url, read_here(study, changes_of(trials))))


@dataclass(frozen=True, slots=True)
class OpenStudy:
    """A study of a storage, see ``open_study``. Everything is read anew at each call."""

    _opened: Study

    def __repr__(self) -> str:
        return f"<study {self.name!r} of {redact(self._opened.url)}>"

    @property
    def record(self) -> Study:
        """The study in the database, also where it was planned anew since it was opened.

        Raises:
            UnknownStudyError: It was deleted.
        """
        return self._opened.reread()

    @property
    def name(self) -> str:
        """The study's name."""
        return self._opened.name

    @property
    def spec(self) -> StudySpec:
        """The spec as it was opened last; not to be changed."""
        return self.record.spec

    @property
    def counts(self) -> Counts:
        """Trials by state."""
        return self.record.counts()

    @checked
    def run(self, workers: int | None = None) -> None:
        """Run what is left, on this machine or on the Ray cluster of ``$RAY_ADDRESS``.

        With ``evaluation.images: auto`` the pilot comes first. The progress goes to
        stderr. What was interrupted goes on at the next call.

        Args:
            workers: Trials at once; None for as many as fit.

        Raises:
            InputError: Workers cannot use something that the study names, or this is not the
                main thread, which Ctrl-C interrupts.
            KeyboardInterrupt: Ctrl-C, or the stop button of a notebook: workers have saved their
                trials and given them back.
            StoppedError: ``stop`` was called elsewhere.
        """
        from search.run.launch import run_planned  # Ray

        _require_counts(workers=workers)
        run_planned(self.record, workers)

    def stop(self) -> None:
        """Ask all workers of the study, wherever they are, to save and end."""
        ask_all(ledgers_with_pilot(self.record))

    def enqueue(self, **params: float | str) -> bool:
        """Plan a point before those that the sampler proposes.

        Returns:
            Whether it was planned; False where it is a trial already.

        Raises:
            InputError: A parameter is missing, unknown or out of bounds.
            NoSearchError: It is a study of given arms.
        """
        study = self.record
        search, spec = study.search, study.spec
        point = require_point(spec.space, params, spec.resolved.num_branches)
        return search.enqueue(point, again=MENDABLE)

    @property
    def trials(self) -> list[ListedRow]:
        """Each row that was started, baselines first."""
        return list_rows(self.record)

    def frame(self) -> "pd.DataFrame":
        """``trials`` as a frame of pandas: a column for each field, and for each parameter.

        Raises:
            InputError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise InputError(
                "frame needs pandas: pip install pandas, or read trials, which are records"
            ) from error
        rows = [{**row.as_dict(), **row.params} for row in self.trials]
        found = pd.DataFrame(rows, columns=None if rows else list(keys_of(self.spec.metric)))
        return found.drop(columns="params", errors="ignore")

    @property
    def best(self) -> Measured | None:
        """The best trial of a search, by the mean over seeds once points are replicated.

        Raises:
            NoSearchError: It is a study of given arms.
        """
        return judged_summary(self.record)[0].best

    @property
    def baselines(self) -> dict[str, Measured]:
        """The complete baselines of a search by name, under the seed of its trials.

        Raises:
            NoSearchError: It is a study of given arms.
        """
        return judged_summary(self.record)[0].baselines

    @property
    def confirmed(self) -> Verdict | None:
        """The result of the confirmation so far; None without one."""
        return verdict_of(self.record)

    @property
    def recommended(self) -> Recommendation | None:
        """The arm to use: the simplest within a tie; None before a baseline is complete."""
        return assess(self.record, self.confirmed).recommended

    @checked
    def confirm(
        self,
        *,
        candidates: int | None = None,
        seeds: int | None = None,
        method: Mapping[str, Any] | None = None,
        workers: int | None = None,
    ) -> Verdict:
        """Train the best points and the baselines under fresh seeds.

        Args:
            candidates: Number of points; None is ``confirm.candidates``.
            seeds: Number of fresh seeds; None is ``confirm.seeds``.
            method: Settings of the method that differ; None is ``confirm.method``.
            workers: Trials at once; None for as many as fit.

        Raises:
            InputError: No trial is complete, or no candidate is under every seed.
            NoSearchError: It is a study of given arms.
            SpecChangedError: Its files are others than when it ran.
            KeyboardInterrupt: As of ``run``.
        """
        _require_counts(candidates=candidates, seeds=seeds, workers=workers)
        study = unchanged_search(self.record)
        usual = study.spec.confirm
        settings = dict(usual.method if method is None else method)
        require_variants(study.spec, [differing(study.spec, settings)])
        planned, found = run_confirmation(
            study,
            settings,
            seeds=usual.seeds if seeds is None else seeds,
            count=usual.candidates if candidates is None else candidates,
            workers=workers,
        )
        if found is None:
            raise InputError(f"{planned.name}: no candidate is complete under every seed")
        return found

    @checked
    def promote(
        self,
        *,
        to: str | Path | Mapping[str, Any] | StudySpec | None = None,
        weights: Mapping[str, Any] | None = None,
        seeds: int | Sequence[int] | None = None,
        nfe: int | Sequence[int] | None = None,
        kimg: float | None = None,
        arm: Literal["plain", "uniform", "weights"] | None = None,
        out: str | Path | None = None,
        workers: int | None = None,
    ) -> "list[Promoted]":
        """Train a search's weights beside the baselines, and write the better student as a model.

        Args:
            to: A study of given arms, of any method, under whose conditions, seeds and name they
                are trained; None is the search's own method, under fresh seeds.
            weights: Parameters of those to train, such as ``{"a": 1.4, "b": -4.3}``; None is the
                confirmed winner.
            seeds: Number of seeds; with ``to`` a sequence of the seeds themselves, too.
            nfe: Network evaluations an image, one number or several; a model for each.
            kimg: Training length in thousands of images.
            arm: Whose student is written; None is the recommended one, the simplest within a tie.
            out: Model folder; None is one in the promotion's folder.
            workers: Trials at once; None for as many as fit.

        Returns:
            Each model, one for each setting of ``nfe``.

        Raises:
            InputError: There is no confirmed winner, weights or settings do not fit, or ``out``
                is taken.
            NoSearchError: It is a study of given arms.
            SpecChangedError: Its files are others than when it ran.
            KeyboardInterrupt: As of ``run``.
        """
        from search.promotion import Asked, Promotion  # torch

        _require_counts(workers=workers)
        study, other = unchanged_search(self.record), None if to is None else read_here(to, {})
        asked = Asked(
            to=other,
            weights=None if weights is None else given_arm(other or study.spec, weights),
            seeds=seeds,
            nfe=(nfe,) if isinstance(nfe, int) else nfe,
            kimg=kimg,
            arm=arm,
            out=None if out is None else Path(out),
        )
        promotion = Promotion(study, asked)
        return list(promotion.models(*promotion.run(workers)))

    @checked
    def transfer(
        self,
        to: str | Path | Mapping[str, Any] | StudySpec,
        *,
        top: int = TRANSFERRED,
        seeds: int = FRESH_SEEDS,
        workers: int | None = None,
    ) -> Comparison:
        """Train a search's top weights and the baselines under another study's conditions.

        Args:
            to: The other study: a file, what one holds, or a spec.
            top: Number of weights, the best first.
            seeds: Number of fresh seeds.
            workers: Trials at once; None for as many as fit.

        Raises:
            InputError: No trial is complete, weights do not fit, or no row is complete.
            NoSearchError: It is a study of given arms.
            SpecChangedError: Its files are others than when it ran.
            KeyboardInterrupt: As of ``run``.
        """
        from search.run.launch import run_rows  # Ray

        _require_counts(top=top, seeds=seeds, workers=workers)
        study = unchanged_search(self.record)
        other = with_known_images(study.url, read_here(to, {}))
        planned = transfer_arms(study, other, top=top, seeds=seeds).store(study.url)
        run_rows(planned, workers)
        found = compare(planned)
        if not found.results:
            raise InputError(f"{planned.name}: no row is complete")
        return found

    @checked
    def logs(
        self,
        trial: int | None = None,
        *,
        baseline: Literal["plain", "uniform", "defaults"] | None = None,
    ) -> list[dict[str, Any]]:
        """What happened to a trial, or to a baseline of a search: an event each.

        Args:
            trial: Number of the trial, of given arms of the row.
            baseline: A baseline instead.

        Returns:
            Events with ``time``, ``attempt``, ``worker``, ``event`` and what it says; none before
            a worker has taken it, or where it works on another runs folder.

        Raises:
            InputError: There is no such row.
        """
        ledger, number = logged_row(self.record, trial, baseline)
        return read_log(row_folder(ledger.name, number) / LOG_FILE)[0]

    @checked
    def clean(
        self,
        *,
        checkpoints: bool = False,
        students: bool = False,
        keep: Sequence[int] = (),
    ) -> dict[str, int]:
        """Delete files that the study need not keep; its trajectories if nothing else is asked.

        Args:
            checkpoints: Those of ended trials, and what dead workers left.
            students: Those of a search, except its best (``keep_students``), its confirmation's
                candidates and those that ``keep`` named.
            keep: Trials whose students stay from now on.

        Returns:
            Bytes freed by kind.

        Raises:
            InputError: A trial to keep has no student, the study has given arms, or its
                trajectories are being read.
        """
        return clean(self.record, checkpoints=checkpoints, students=students, keep=keep)

    def delete(self) -> None:
        """Delete the study, its confirmation and its pilot, with all their files. It asks nothing.

        Trajectories stay, as other studies may use them.

        Raises:
            InputError: Trials are worked on.
        """
        delete(to_delete(self.record))

    def plots(self) -> "list[Figure]":
        """Figures of matplotlib: the metric over each coordinate, or of each given arm."""
        return [plot.figure() for plot in study_plots(overview_of(self.record))]

    @checked
    def report(self, out: str | Path, *, force: bool = False) -> Path:
        """Write report.html and report.md with their pictures to a folder; the Markdown's path.

        Raises:
            InputError: Nothing is complete, or the folder has other files of those names.
        """
        return write_report(self.record, Path(out), force=force)

    @checked
    def export(
        self,
        folder: str | Path,
        trial: int | None = None,
        *,
        baseline: Literal["plain", "uniform"] | None = None,
        nfe: int | None = None,
    ) -> "Exported":
        """Write a kept student as a model folder.

        Args:
            folder: New folder to write.
            trial: Number of the trial; None is the recommended arm of the confirmation, else the
                best trial; of given arms the recommended one, under the first seed.
            baseline: A search's baseline to export instead of a trial.
            nfe: Network evaluations of the student, for a method of several stages; None is the
                last stage's.

        Returns:
            The folder, and whose student it holds.

        Raises:
            InputError: There is no such student, or the folder exists.
        """
        from search.export import export_trial  # torch

        return export_trial(self.record, Path(folder), number=trial, baseline=baseline, nfe=nfe)

    @property
    def optuna(self) -> "optuna.Study":
        """Optuna's study of the trials, to read: Optuna's own plots take it.

        ``optuna.load_study(study_name=name, storage=url)`` opens the same one. What another
        program adds to it counts in no result.
        """
        return self.record.main.study

    def _repr_markdown_(self) -> str:
        """The study's page for notebooks, as the dashboard's note has it."""
        return as_markdown(self.name, study_page(overview_of(self.record), ()))


def _require_counts(**given: int | None) -> None:
    """Refuse numbers below 1, as the command's options do."""
    for name, number in given.items():
        if number is not None and number < 1:
            raise InputError(f"{name} must be at least 1, or None, got {number}")


# What the verbs do, too.


def unchanged_search(study: Study, file: Path | None = None) -> Study:
    """The study, if it is a search whose conditions are still those that it ran under.

    Args:
        study: The study.
        file: The study file to compare with; None is the stored spec, as a teacher's file, the
            data or the engine's numerics may have changed since.

    Raises:
        NoSearchError: It is a study of given arms.
        InputError: Another version of bdense launched it.
        SpecChangedError: The conditions of its file, or of its stored spec, have changed.
    """
    _ = study.search  # refuses given arms
    study.refuse_other_conditions(study.spec if file is None else read_spec(file))
    return study


def is_file(given: str) -> bool:
    """Whether a study is given by its file rather than by its name.

    Raises:
        InputError: It is a file of another kind.
    """
    if Path(given).suffix in (".yaml", ".yml"):
        return True
    if Path(given).is_file():
        raise InputError(f"{given}: the name of a study file ends in .yaml or .yml")
    return False


def changes_of(trials: int | None) -> dict[str, Any]:
    """Changes of a study file that a number of trials stands for."""
    return {} if trials is None else {"plan": {"trials": trials}}


def stored_spec(url: str, name: str, trials: int | None) -> StudySpec:
    """A stored study's spec, of a search with that number of trials.

    Raises:
        UnknownStudyError: There is no such study.
        InputError: It has given arms, and ``trials`` are asked for.
    """
    spec = Study.open(url, name).spec
    if trials is None:
        return spec
    if not spec.is_search:
        raise KnobError(
            "trials", f"{trials} is for a search, and {spec.name} has given arms; leave it out"
        )
    return replace(spec, plan=replace(spec.search, trials=trials))


def planned(url: str, spec: StudySpec, *, by_name: bool = False) -> Study:
    """Create or join the study of a resolved spec; failed arms given by name are planned again.

    Raises:
        InputError: A prior or an arm cannot be used.
        SpecChangedError: The stored study has other conditions.
    """
    if spec.is_search:
        for line in require_priors(url, spec):
            say(line)
        return Study.create(url, with_known_images(url, spec))
    if not by_name:
        return plan_given(url, spec)
    study = Study.open(url, spec.name)
    study.plan_failed_again()
    return study


def run_confirmation(
    study: Study, method: Mapping[str, Any], *, seeds: int, count: int, workers: int | None
) -> tuple[Study, Verdict | None]:
    """Plan and run a search's confirmation, by settings of the method that were checked.

    Returns:
        The confirmation, and its verdict, if a candidate is complete under every seed.
    """
    from search.run.launch import run_rows  # Ray

    confirmation = plan_confirmation(study, method=method, seeds=seeds, count=count)
    run_rows(confirmation, workers)
    return confirmation, verdict_of(study)
