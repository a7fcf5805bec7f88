"""``bdense-search``: launch studies and see where they stand."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from bdense.command import new_parser, run_verb
from search.log import say, start_logging
from search.storage.engine import DATABASE_ERRORS, as_storage_error, redact, resolve_storage_url
from search.verbs.clean import add_clean
from search.verbs.confirm import add_confirm, add_transfer
from search.verbs.doctor import add_doctor
from search.verbs.fetch import add_fetch
from search.verbs.launch import add_launch
from search.verbs.promote import add_promote
from search.verbs.show import (
    add_best,
    add_dashboard,
    add_export,
    add_list,
    add_report,
    add_status,
)
from search.verbs.steer import add_enqueue, add_logs, add_stop
from search.verbs.storage import add_storage


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; 0 done, 1 failed, 2 user's mistake, 75 Ray is gone, 130 stopped."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)

    def call() -> None:
        start_logging()
        if options.storage:
            _hide_password(options.storage, argv)
        try:
            options.run(options)
        except DATABASE_ERRORS as error:
            raise as_storage_error(error) from error

    return run_verb(
        "bdense-search",
        call,
        on_interrupt="interrupted; nothing is lost: run the same command again to continue",
        clean=redact,
        tell=say,
    )


def _parser() -> argparse.ArgumentParser:
    parser, verbs = new_parser(
        "bdense-search",
        "Search branch weights for few-step diffusion students (B-DENSE).",
        "bdense-search launch studies/digits-nfe2.yaml",
    )
    running = (add_launch, add_stop, add_enqueue, add_logs, add_confirm, add_promote, add_transfer)
    looking = (add_list, add_status, add_best, add_report, add_export, add_dashboard)
    tending = (add_clean, add_doctor)
    preparing = (add_fetch, add_storage)
    for add in (*running, *looking, *tending, *preparing):
        add(verbs)
    return parser


def _hide_password(url: str, argv: list[str]) -> None:
    """Start over with a password moved to the environment, as ``ps`` shows arguments to all."""
    if redact(url) == url:
        return
    kept = [a for a in argv if a not in ("--storage", url) and not a.startswith("--storage=")]
    os.environ["BDENSE_STORAGE"] = resolve_storage_url(url)
    # -P: import nothing from the current folder, like the command itself.
    os.execv(sys.executable, [sys.executable, "-P", "-m", "search.cli", *kept])


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
