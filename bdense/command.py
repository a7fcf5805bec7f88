"""Shared by both commands: verbs with help and an example, exit statuses."""

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Callable
from typing import NoReturn, TypeAlias

from bdense.errors import BdenseError, InputError, StoppedError, is_out_of_memory

DONE, FAILURE = 0, BdenseError.exit_status
USER_ERROR, INTERRUPTED = InputError.exit_status, StoppedError.exit_status

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Run: TypeAlias = Callable[[argparse.Namespace], None]


def new_parser(prog: str, description: str, example: str) -> tuple[argparse.ArgumentParser, Verbs]:
    """A command that takes verbs, and ``--version``."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, epilog=f"example: {example}", allow_abbrev=False
    )
    parser.add_argument(
        "--version", action=_ShowVersion, nargs=0, help="show the version and exit"
    )
    return parser, parser.add_subparsers(title="verbs", required=True, metavar="VERB")


def add_verb(
    verbs: Verbs, name: str, what: str, example: str, run: Run
) -> argparse.ArgumentParser:
    """A verb with its one line of help, an example, and what it runs."""
    parser = verbs.add_parser(
        name,
        help=what,
        description=what[0].upper() + what[1:] + ".",
        epilog=f"example: {example}",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


def run_verb(
    prog: str,
    call: Callable[[], None],
    *,
    on_interrupt: str,
    clean: Callable[[str], str] = str,
    tell: Callable[[str], None] | None = None,
) -> int:
    """Call, and turn an error into one line on stderr and an exit status.

    Args:
        prog: Name of the command, at the start of each line.
        call: Runs the verb.
        on_interrupt: The message on Ctrl-C.
        clean: Removes secrets from a line.
        tell: Receives each line, without its newline; None writes to stderr.

    Returns:
        0 if it succeeded, 130 if interrupted, else the error's exit status: 1 failed, 2 a mistake
        of the user's, others by their class.
    """
    tell = tell or _to_stderr
    try:
        call()
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has gone (``| head``); the interpreter must not fail again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except BdenseError as error:
        for line in str(error).splitlines():
            tell(f"{prog}: {clean(line)}")
        return error.exit_status
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        tell(f"{prog}: out of memory; choose a smaller --batch")
        return FAILURE
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        tell(f"{prog}: {clean(what)}")
        return USER_ERROR
    except KeyboardInterrupt:
        tell(f"\n{on_interrupt}")
        return INTERRUPTED
    return DONE


class _ShowVersion(argparse.Action):
    """Print the installed version; argparse's own action would look it up at every start."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> NoReturn:
        sys.stdout.write(f"{parser.prog} {importlib.metadata.version('bdense')}\n")
        parser.exit()


def _to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")
