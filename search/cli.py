"""``bdense-search``: launch studies and see where they stand."""

import os
import signal
import sys
from collections.abc import Sequence

from bdense import command
from bdense.command import Force, Verb, run_verb
from search.errors import INTERRUPTED
from search.log import say, start_logging
from search.redaction import redact, redact_url
from search.storage.engine import DATABASE_ERRORS, as_storage_error, resolve_storage_url
from search.storage.stop_flags import CONTINUE
from search.verbs import options

VERBS = {
    "launch": Verb(
        help="start a study, or continue it if its name is already in the storage",
        example="bdense-search launch studies/digits-nfe2.yaml --trials 32",
        function="search.verbs.launch:launch_study",
        configs=(options.LaunchOptions, options.Workers),
    ),
    "stop": Verb(
        help="stop a study: its workers save and release their trials, and its launchers exit "
        f"with status 130; {CONTINUE}",
        example="bdense-search stop digits-nfe2 --wait",
        function="search.verbs.steer:stop",
        configs=(options.StopOptions,),
    ),
    "enqueue": Verb(
        help="add a point to a search, to run before any other; it counts in the budget once it "
        "starts",
        example="bdense-search enqueue digits-nfe2 --a 1.386 --b=-4.274",
        function="search.verbs.steer:enqueue",
        configs=lambda _: (options.EnqueueOptions, options.parameter_options()),
    ),
    "logs": Verb(
        help="show what happened to a trial: its attempts, and its loss per interval and branch",
        example="bdense-search logs digits-nfe2 7 --follow",
        function="search.verbs.steer:logs",
        configs=(options.LogsOptions,),
    ),
    "confirm": Verb(
        help="train a search's best points and both baselines again under fresh seeds",
        example="bdense-search confirm digits-nfe2 --seeds 5",
        function="search.verbs.confirm:confirm",
        configs=(options.ConfirmOptions, options.Workers),
    ),
    "promote": Verb(
        help="train a study's confirmed weights again beside its baselines, and export the model",
        example="bdense-search promote digits-nfe2 --to studies/promote-digits.yaml",
        function="search.verbs.promote:promote",
        configs=(options.PromoteOptions, options.Workers),
    ),
    "transfer": Verb(
        help="measure a study's top weights under the conditions of another",
        example="bdense-search transfer digits-nfe2 --to studies/fashion-mnist-nfe2.yaml --top 5",
        function="search.verbs.confirm:transfer",
        configs=(options.TransferOptions, options.Workers),
    ),
    "list": Verb(
        help="list the studies of a storage",
        example="bdense-search list --json",
        function="search.verbs.show:show_list",
        configs=(options.ListOptions,),
    ),
    "status": Verb(
        help="show a study's trials by state, and what runs now",
        example="bdense-search status digits-nfe2",
        function="search.verbs.show:status",
        configs=(options.StatusOptions,),
    ),
    "trials": Verb(
        help="list a study's trials and baselines: state, FID, seconds, seed, weights",
        example="bdense-search trials digits-nfe2 --csv > trials.csv",
        function="search.verbs.show:trials",
        configs=(options.TrialsOptions,),
    ),
    "best": Verb(
        help="show a study's best branch weights beside its baselines",
        example="bdense-search best digits-nfe2 --json",
        function="search.verbs.show:best",
        configs=(options.BestOptions,),
    ),
    "report": Verb(
        help="write a study's report: one self-contained HTML file, Markdown, and their pictures",
        example="bdense-search report digits-nfe2 --out report",
        function="search.verbs.show:report",
        configs=(options.ReportOptions, Force),
    ),
    "export": Verb(
        help="write a kept student as a model folder: weights, config, card, samples",
        example="bdense-search export digits-nfe2 model",
        function="search.verbs.show:export",
        configs=(options.ExportOptions,),
    ),
    "dashboard": Verb(
        help="open optuna-dashboard over the storage, on 127.0.0.1, read-only",
        example="bdense-search dashboard --port 8080",
        function="search.verbs.show:dashboard",
        configs=(options.DashboardOptions,),
    ),
    "clean": Verb(
        help="delete a study's recorded trajectories, which a later launch records again, or what "
        "the options name instead; each trial keeps its result, log and pictures (about "
        "0.3 MB)",
        example="bdense-search clean digits-nfe2 --checkpoints --students",
        function="search.verbs.remove:clean",
        configs=(options.CleanOptions,),
    ),
    "delete": Verb(
        help="delete a study with its baselines, its confirmation, and their folders of students "
        "and pictures",
        example="bdense-search delete digits-nfe2",
        function="search.verbs.remove:delete",
        configs=(options.DeleteOptions,),
    ),
    "doctor": Verb(
        help="check this machine, the storage and its studies for problems",
        example="bdense-search doctor digits-nfe2 --fix",
        function="search.verbs.storage:doctor",
        configs=(options.DoctorOptions,),
    ),
    "fetch": Verb(
        help="download the teacher, data, reference and feature extractor that a study file names",
        example="bdense-search fetch studies/cifar10-nfe2.yaml",
        function="search.verbs.launch:fetch",
        configs=(options.FileOptions,),
    ),
    "storage": Verb(
        help="create a study database's tables and roles, or upgrade it and its studies to this "
        "version",
        example="bdense-search storage init --writer bdense_rw "
        "--writer-password-file secrets/writer",
        function="search.verbs.storage:storage",
        configs=(options.TablesOptions,),
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; 0 done, 1 failed, 2 user's mistake, 75 Ray is gone, 130 stopped."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    def call() -> None:
        given = make_parser(argv).parse_args(argv)
        start_logging()
        if "storage" in given:
            _hide_password(given.storage, argv)
        try:
            given.run(given)
        except DATABASE_ERRORS as error:
            raise as_storage_error(error) from error

    return run_verb(
        "bdense-search",
        call,
        on_interrupt=INTERRUPTED,
        clean=redact,
        tell=say,
    )


def make_parser(arguments: Sequence[str]) -> command.Parser:
    """The command's parser, with the options of the verb that these arguments name."""
    description = "Search branch weights for few-step diffusion students (B-DENSE)."
    return command.make_parser("bdense-search", description, VERBS, arguments)


def _hide_password(url: str, argv: list[str]) -> None:
    """Start over with a password moved to the environment, as ``ps`` shows arguments to all."""
    if redact_url(url) == url:
        return
    kept = [a for a in argv if a not in ("--storage", url) and not a.startswith("--storage=")]
    os.environ["BDENSE_STORAGE"] = resolve_storage_url(url)
    # -P: import nothing from the current folder, like the command itself.
    os.execv(sys.executable, [sys.executable, "-P", "-m", "search", *kept])
