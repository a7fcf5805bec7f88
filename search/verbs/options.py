"""The options of the verbs, each declared once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bdense.knobs import Knobs, knob, knob_of, knobs_of
from bdense.weights.parameters import SET_HELP, parameter_knobs
from search.spec.plan import SearchPlan
from search.spec.sections import (
    FRESH_SEEDS,
    MOST_ROWS,
    MOST_SEEDS,
    TRANSFERRED,
    ConfirmSpec,
)


def flag(help: str, short: str = "") -> Any:  # noqa: ANN401  as ``knob``
    """A knob that is off, with an option that turns it on."""
    return knob(False, help, form="flag", short=short)


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageOptions(Knobs):
    """A verb over a storage."""

    storage: str | None = knob(
        None,
        "study database: sqlite:///FILE or postgresql://USER@HOST/DATABASE",
        metavar="URL",
        none="$BDENSE_STORAGE, else SQLite in runs/bdense.db; password: PGPASSWORD or PGPASSFILE",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyOptions(StorageOptions):
    """A verb over one study of a storage."""

    study: str = knob(help="a study's name or its YAML file", metavar="STUDY", form="positional")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileOptions(Knobs):
    """A verb over a study's file."""

    study: Path = knob(help="the study file", metavar="STUDY.yaml", form="positional")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers(Knobs):
    """A verb that runs rows, or says what it would run."""

    gpus: tuple[int, ...] | None = knob(
        None,
        "GPUs of this machine to use, by nvidia-smi's numbers, as in 0,2",
        low=0,
        metavar="N",
        none="all",
        form="commas",
    )
    workers: int | None = knob(
        None,
        "trials to run at once",
        low=1,
        none="one for each GPU, else one for each resources.cpus CPUs",
    )
    dry_run: bool = flag(
        "print its cost, its fingerprint and the resolved study; start nothing", short="-n"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchOptions(StudyOptions):
    """``launch``."""

    trials: int | None = knob_of(SearchPlan, "trials", None, none="plan.trials of the file")


@dataclass(frozen=True, slots=True, kw_only=True)
class StopOptions(StudyOptions):
    """``stop``."""

    wait: bool = flag(
        "wait until no trial is worked on; fail after twice the lease time and a minute"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EnqueueOptions(StudyOptions):
    """``enqueue``."""

    set: tuple[str, ...] | None = knob(
        None, SET_HELP, metavar="NAME=VALUE", none=None, form="repeated"
    )


def parameter_options() -> type[Knobs]:
    """The parameters of the weight spaces as options of ``enqueue``."""
    return parameter_knobs("branch weights", taken=knobs_of(EnqueueOptions))


@dataclass(frozen=True, slots=True, kw_only=True)
class LogsOptions(StudyOptions):
    """``logs``."""

    trial: int | None = knob(
        None, "number of the trial or row", metavar="TRIAL", none=None, form="positional"
    )
    baseline: Literal["plain", "uniform", "defaults"] | None = knob(
        None, "show this baseline of a search instead of a trial", none=None
    )
    follow: bool = flag("keep showing until the trial has ended")
    json: bool = flag("print the events as lines of JSON")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfirmOptions(StudyOptions):
    """``confirm``."""

    json: bool = flag("print one object: winner, kimg, ended, arms")
    kimg: float | None = knob(
        None,
        "training length of each student in thousands of images; choose the one that the winner "
        "will be used at, as the best weights depend on it",
        low=0.001,
        high=10**9,
        none="confirm.method of the study, else the search's own",
    )
    seeds: int | None = knob_of(ConfirmSpec, "seeds", None, none="confirm.seeds")
    candidates: int | None = knob_of(ConfirmSpec, "candidates", None, none="confirm.candidates")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromoteOptions(StudyOptions):
    """``promote``."""

    to: Path | None = knob(
        None,
        "file of a study of given arms, of any method; the weights are trained under its "
        "conditions, seeds and name",
        metavar="STUDY2.yaml",
        none="the search's own method, under fresh seeds",
    )
    weights: str | None = knob(
        None,
        "weights to promote, log w_k = a k + b; where A is negative, --weights=A,B",
        metavar="A,B",
        none="the study's confirmed winner",
    )
    seeds: tuple[int, ...] | None = knob(
        None,
        "number of seeds; with --to two or more are the seeds themselves, as in 0,1,2",
        metavar="N",
        none=f"the file's; {FRESH_SEEDS} fresh ones without --to",
        form="commas",
    )
    nfe: tuple[int, ...] | None = knob(
        None,
        "network evaluations an image, as in 2,3: a model for each",
        low=1,
        metavar="N",
        none="the method's",
        form="commas",
    )
    kimg: float | None = knob_of(
        ConfirmOptions,
        "kimg",
        None,
        help="training length of each student in thousands of images",
        none="the variants of --to or confirm.method of the study, else the method's own",
    )
    arm: Literal["plain", "uniform", "weights"] | None = knob(
        None,
        "arm whose student is exported: plain distillation, uniform weights, or the promoted "
        "weights",
        none="the recommended one, the simplest within a tie",
    )
    out: Path | None = knob(
        None, "model folder to write", metavar="DIR", none="one in the run's folder"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferOptions(StudyOptions):
    """``transfer``."""

    to: Path = knob(help="the other study's file", metavar="STUDY2.yaml")
    top: int = knob(TRANSFERRED, "weights to measure, the best first", low=1, high=MOST_ROWS)
    seeds: int = knob(FRESH_SEEDS, "number of fresh seeds", low=1, high=MOST_SEEDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class ListOptions(StorageOptions):
    """``list``."""

    json: bool = flag(
        "print one array of objects: study, kind, method, trials, best_fid, started, changed"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusOptions(StudyOptions):
    """``status``."""

    json: bool = flag("print one object: study, trials, and one_shot if the plan has it")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialsOptions(StudyOptions):
    """``trials``."""

    csv: bool = flag("print CSV, with a column for each parameter and weight")
    json: bool = flag("print one array of objects")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteOptions(StudyOptions):
    """``delete``."""

    yes: bool = flag("do not ask")


@dataclass(frozen=True, slots=True, kw_only=True)
class BestOptions(StudyOptions):
    """``best``."""

    json: bool = flag(
        "print one object: study, storage, trials, best, baselines, confirmed, noise, "
        "recommended, and one_shot if the plan has it"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportOptions(StudyOptions):
    """``report``."""

    out: Path = knob(Path("report"), "folder to write to", metavar="DIR")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions(StudyOptions):
    """``export``."""

    folder: str = knob(
        help="new folder to write; or a URL that fsspec knows, as in s3://bucket/model",
        metavar="DIR",
        form="positional",
    )
    push: str | None = knob(
        None,
        "upload the folder to the Hugging Face Hub too, as a new model of this name; needs "
        "HF_TOKEN",
        metavar="OWNER/NAME",
        none=None,
    )
    trial: int | None = knob(
        None,
        "number of the trial whose student is written",
        none="the recommended arm of the confirmation, else the best trial; for given arms the "
        "recommended one, under the first seed",
    )
    baseline: Literal["plain", "uniform"] | None = knob(
        None, "write this baseline of a search instead of a trial", none=None
    )
    nfe: int | None = knob(
        None,
        "network evaluations of the student, for a method of several stages",
        low=1,
        none="the last stage's",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DashboardOptions(StorageOptions):
    """``dashboard``."""

    port: int = knob(8080, "port on 127.0.0.1", low=0, high=65535)
    writable: bool = flag(
        "let the browser change studies; renaming one orphans its running trials"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanOptions(StudyOptions):
    """``clean``."""

    checkpoints: bool = flag(
        "delete instead: checkpoints of ended trials, unfinished files of dead workers, and "
        "folders of other studies that were moved aside (00003.1f2e3d4c)"
    )
    students: bool = flag(
        "delete instead: students of a search, except its best (keep_students in the study's "
        "file), its confirmation's candidates and those that --keep named"
    )
    keep: tuple[int, ...] | None = knob(
        None,
        "from now on keep the students of these trials, by number, as in 3,7; deletes nothing "
        "itself",
        metavar="N",
        none=None,
        form="commas",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorOptions(StorageOptions):
    """``doctor``."""

    study: str | None = knob(
        None,
        "check the rows and files of this study only: its name or YAML file",
        metavar="STUDY",
        none="all",
        form="positional",
    )
    fix: bool = flag(
        "repair what is safe: release rows of dead workers, delete leftovers; never a trial, a "
        "result or a student"
    )
    json: bool = flag("print one object: storage, ok, findings")


@dataclass(frozen=True, slots=True, kw_only=True)
class TablesOptions(StorageOptions):
    """``storage``."""

    action: Literal["init", "upgrade"] = knob(
        help="init: create the tables and roles that are missing, as the database's owner; "
        "upgrade: bring tables, studies and their row folders to this version",
        form="positional",
    )
    writer: str | None = knob(
        None, "init: role that may launch and work, created if missing (PostgreSQL)", none=None
    )
    writer_password_file: Path | None = knob(
        None,
        "init: file with the writer's password",
        metavar="FILE",
        none="the password stays as it is",
    )
    reader: str | None = knob(
        None,
        "init: role that may only read, for the dashboard, created if missing (PostgreSQL)",
        none=None,
    )
    reader_password_file: Path | None = knob(
        None,
        "init: file with the reader's password",
        metavar="FILE",
        none="the password stays as it is",
    )
