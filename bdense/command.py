"""Shared by both commands: verbs with help and an example, exit statuses."""

import argparse
import contextlib
import functools
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeAlias, TypeVar

from bdense.errors import BdenseError, InputError, StoppedError, did_you_mean, is_out_of_memory
from bdense.knob_options import add_options, from_options, options_of
from bdense.knobs import KnobError, Knobs, knob

DONE, FAILURE = 0, BdenseError.exit_status
USER_ERROR, INTERRUPTED = InputError.exit_status, StoppedError.exit_status

T = TypeVar("T")
_LONGEST = 4000  # letters of a line: a message may quote a damaged file


@dataclass(frozen=True, slots=True)
class ReadLater:
    """Options that a verb reads by itself, as it knows other defaults for some.

    The verb gets a function in place of the class: it takes the defaults and returns the options.
    """

    config: type[Knobs]


Configs: TypeAlias = tuple[type[Knobs] | ReadLater, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Force(Knobs):
    """Option of verbs with --out."""

    force: bool = knob(
        False,
        "replace what --out names, also where that is read by this command, of another kind, or "
        "made with other settings",
        form="flag",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Verb:
    """A verb of a command; what runs it is imported when it runs.

    Attributes:
        function: What runs it, as module:name; it gets an object of each of ``configs``.
        configs: The classes whose knobs are its options, or a function that gives them for the
            arguments that follow the verb.
        elsewhere: Called with the verb's arguments and an option that they do not allow; returns a
            message that names arguments that would allow it, or "".
    """

    help: str
    example: str
    function: str
    configs: Configs | Callable[[Sequence[str]], Configs]
    elsewhere: Callable[[Sequence[str], str], str] = lambda arguments, option: ""

    def configs_for(self, arguments: Sequence[str]) -> Configs:
        """The classes of its options for the arguments that follow the verb."""
        return self.configs(arguments) if callable(self.configs) else self.configs

    def run(self, configs: Configs, options: argparse.Namespace) -> None:
        """Import what runs the verb, and call it; errors of knobs name its options."""
        module, _, name = self.function.partition(":")
        try:
            given = [_read(each, options) for each in configs]
            getattr(importlib.import_module(module), name)(*given)
        except KnobError as error:
            raise error.spelt(options_of(options.parser)) from error


def _read(
    config: type[Knobs] | ReadLater, options: argparse.Namespace
) -> Knobs | Callable[..., Knobs]:
    if isinstance(config, ReadLater):
        return functools.partial(from_options, config.config, options)
    return from_options(config, options)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without its usage."""

    elsewhere: Callable[[str], str] = staticmethod(lambda option: "")

    def parse_args(self, args: Sequence[str], namespace: None = None) -> argparse.Namespace:  # type: ignore[override]
        """The options; ends the process with status 2 where one is unknown."""
        options, unknown = self.parse_known_args(args)
        if unknown:
            options.parser.refuse(unknown)
        return options

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """End the process because of arguments that this verb does not know."""
        flag = unknown[0].partition("=")[0]
        if not flag.startswith("-"):
            self.error(f"unexpected argument{'s' * (len(unknown) > 1)}: {' '.join(unknown)}")
        known = [name for action in self._actions for name in action.option_strings]
        if flag in known:
            self.error(
                f"{flag} was given after --, behind which nothing is an option; drop the --"
            )
        words = [name[2:] for name in known if name.startswith("--")]
        hint = did_you_mean(flag.lstrip("-"), words).replace("mean ", "mean --")
        self.error(self.elsewhere(flag) or f"there is no option {flag}{hint}")

    def error(self, message: str) -> NoReturn:
        """End the process with status 2."""
        if message.endswith("expected one argument"):
            message += " (with =, as in --name=-1, where it begins with a dash)"
        end = "" if message.endswith("?") else f"; see {self.prog} --help"
        sys.stderr.write(f"{self.prog}: {message}{end}\n")
        self.exit(USER_ERROR)


def make_parser(
    prog: str, description: str, verbs: Mapping[str, Verb], arguments: Sequence[str]
) -> "Parser":
    """A command's parser, with the options of the verb that these arguments name."""
    parser = Parser(
        prog=prog,
        description=description,
        epilog=f"example: {next(iter(verbs.values())).example}",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action=_ShowVersion, nargs=0, help="show the version and exit"
    )
    added = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    for name, verb in verbs.items():
        about = added.add_parser(
            name,
            help=verb.help,
            description=verb.help[0].upper() + verb.help[1:] + ".",
            epilog=f"example: {verb.example}",
            allow_abbrev=False,
        )
        about.set_defaults(parser=about)
        if [name] == list(arguments[:1]):
            configs = verb.configs_for(arguments[1:])
            classes = [each.config if isinstance(each, ReadLater) else each for each in configs]
            add_options(about, *classes)
            about.set_defaults(run=functools.partial(verb.run, configs))
            about.elsewhere = functools.partial(verb.elsewhere, arguments[1:])
    for given in arguments[:1]:
        if given not in verbs and not given.startswith("-"):
            parser.error(f"there is no verb {given}{did_you_mean(given, verbs)}")
    return parser


def run_verb(
    prog: str,
    call: Callable[[], None],
    *,
    on_interrupt: str,
    clean: Callable[[str], str] = str,
    tell: Callable[[str], object] | None = None,
) -> int:
    """Call, and turn an error into one line on stderr and an exit status.

    Args:
        prog: Name of the command, at the start of each line.
        on_interrupt: The message on Ctrl-C.
        clean: Removes secrets from a line.
        tell: Receives each line, without its newline; None writes to stderr.

    Returns:
        0 if it succeeded, 130 if interrupted, else the error's exit status: 1 failed, 2 a mistake
        of the user's, others by their class.
    """
    tell = tell or (lambda line: sys.stderr.write(f"{line}\n"))
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by >&-
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115  until the end
    try:
        with _naming_output():
            call()
    except BrokenPipeError:  # the reader has gone (``| head``)
        return FAILURE
    except BdenseError as error:
        for line in str(error).splitlines():
            shown = clean(line)
            cut = f"{shown[:_LONGEST]} ..." if len(shown) > _LONGEST else shown
            tell(f"{prog}: {cut}")
        return error.exit_status
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        tell(f"{prog}: out of memory; choose a smaller batch or network")
        return FAILURE
    except TypeError as error:
        if "MPS" not in str(error):
            raise
        tell(f"{prog}: this model needs float64, which --device mps lacks; use --device cpu")
        return USER_ERROR
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        tell(f"{prog}: {clean(what)}")
        return USER_ERROR
    except KeyboardInterrupt:
        tell(f"\n{on_interrupt}")
        return INTERRUPTED
    return DONE


class _Output:
    """Standard output; its errors name it, as Python's do not."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  whatever a stream has
        if name.startswith("__"):  # such as copy and pickle ask for, before there is a stream
            raise AttributeError(name)
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._named(self._stream.write, text)

    def flush(self) -> None:
        self._named(self._stream.flush)

    def _named(self, call: Callable[..., T], *arguments: str) -> T:
        try:
            return call(*arguments)
        except OSError as error:
            # The interpreter must not fail again when it exits.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if isinstance(error, BrokenPipeError):
                raise
            raise OSError(error.errno, error.strerror, "standard output") from error


@contextlib.contextmanager
def _naming_output() -> Iterator[None]:
    """Name standard output in its errors, and write what is left of it at the end."""
    output: Any = _Output(sys.stdout)
    with contextlib.redirect_stdout(output):
        try:
            yield
        except SystemExit:  # help or version
            output.flush()
            raise
        output.flush()


def kept_in(unfinished: Path) -> str:
    """What an interrupted training says that is saved in that file."""
    return f"saved in {unfinished}; run the same command again to continue"


class _ShowVersion(argparse.Action):
    """Print the installed version; argparse's own action would look it up at every start."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> NoReturn:
        sys.stdout.write(f"{parser.prog} {importlib.metadata.version('bdense')}\n")
        parser.exit()
