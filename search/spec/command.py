"""Method ``command``: a study whose trials are runs of a program of the user's.

What the program is given and what it must write: docs/any-trainer.md.
"""

import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from bdense.errors import InputError
from bdense.knobs import KnobError, Knobs, is_number, knob, knobs_of
from bdense.weights.space import BASELINE, Choice, Range, SearchSpace, Uniform
from search.errors import under

COMMAND = "command"
# The one baseline of such a study: the weights that are used today.
DEFAULTS = "defaults"

# What a word of ``run`` may name in braces, beside the weights.
SEED, FOLDER, RESULT = "seed", "folder", "result"
_OWN = (SEED, FOLDER, RESULT)
_BRACED = re.compile(r"\{\{|\}\}|\{(\w+)\}")
_NAME = re.compile(r"[A-Za-z_]\w*")
# A space is chosen by its ``name``; the others are fields beside the weights, or columns, of what
# ``best``, ``trials`` and the database hold.
_FIELDS = """arm clip_score confirmed kid memory metric name number one_shot others params prc
reason seconds seeds state student study tries value variant weights weights_plot worker"""
_RESERVED = {*_FIELDS.split(), BASELINE, *_OWN}


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandConfig(Knobs):
    """A program that trains, and measures what it trained."""

    heading: ClassVar[str] = "method command"

    run: tuple[str, ...] = knob(
        help="the program and its arguments, a list of words; {NAME} in a word becomes a weight, "
        "{seed}, {folder} or {result}, {{ and }} become single braces; no shell reads them"
    )
    folder: str | None = knob(
        None, "folder in which the program is started", none="that of the study's file"
    )
    files: tuple[str, ...] = knob(
        (),
        "files that decide the metric beside those among the words of run; all of them are part "
        "of the study's fingerprint",
    )
    metric: str = knob("loss", "name of the metric in what the program writes, and in all outputs")
    direction: Literal["minimise", "maximise"] = knob("minimise", "what a search does with it")
    checkpoint_on: Literal["TERM", "INT", "HUP", "USR1", "USR2"] = knob(
        "TERM", "signal that asks the program to save and end"
    )
    grace_seconds: float = knob(
        30.0,
        "seconds that it has to save and end, before it and its children are killed; a launch "
        "itself waits 60 for its workers",
        above=0,
        high=55,
    )
    log_mib: float = knob(
        8.0, "most MiB that are kept of each of its outputs, the last ones", low=0.1
    )

    def __post_init__(self) -> None:
        Knobs.__post_init__(self)
        if not self.run or not self.run[0]:
            raise KnobError("run", "is empty; give the program and its arguments: [python, x.py]")
        if any("\0" in word for word in self.run):
            raise KnobError("run", "has a NUL character, which no program can be given; drop it")
        if not _NAME.fullmatch(self.metric):
            raise KnobError(
                "metric",
                f"must be letters, digits and underscores, got {self.metric!r}; choose such a "
                "name for it in what the program writes",
            )

    @property
    def cwd(self) -> Path:
        """Where the program is started."""
        return Path(self.folder or ".")

    def words(self, values: Mapping[str, object]) -> list[str]:
        """The words of ``run`` with values in place of what is in braces."""

        def stands_for(found: re.Match[str]) -> str:
            if not found[1]:
                return found[0][0]
            value = values[found[1]]
            return repr(value) if isinstance(value, float) else str(value)

        return [_BRACED.sub(stands_for, word) for word in self.run]

    def named(self) -> set[str]:
        """What the words name in braces."""
        return {name for word in self.run for name in _BRACED.findall(word) if name}

    def used_files(self) -> Iterator[tuple[str, Path]]:
        """Files that decide the metric: each by its key in the fingerprint."""
        for index, word in enumerate(self.run):
            # The first is looked for in PATH where it is a name alone.
            if (index or os.sep in word) and _is_file(path := self.cwd / word):
                yield f"run.{index}", path
        for word in self.files:
            yield f"files.{word}", self.cwd / word

    def program(self) -> str:
        """The program's path.

        Raises:
            InputError: There is none, or this user may not run it.
        """
        given = self.run[0]
        if os.sep not in given:
            if (found := shutil.which(given)) is None:
                raise KnobError("run", f"there is no program {given} in PATH; {_WAY_OUT}")
            return found
        path = self.cwd / given
        if not _is_file(path):
            raise KnobError("run", f"there is no program {path}; {_WAY_OUT}")
        if not os.access(path, os.X_OK):
            raise KnobError(
                "run",
                f"{path} is not executable; chmod +x it, or put what runs it first, as in "
                f"[python, {given}]",
            )
        return str(path)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a script in a word may be too long for a name
        return False


_WAY_OUT = "correct its name; paths are relative to method.folder"


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedWeight(Range):
    """A weight of the user's, by its name."""

    log: bool = knob(False, "draw its logarithm uniformly; needs low above 0")
    default: float = knob(
        help="the value that is used today; the defaults of all are the study's baseline"
    )

    def __post_init__(self) -> None:
        Range.__post_init__(self)
        if self.log and self.low <= 0:
            raise KnobError("low", f"must be above 0 where log is true, got {self.low:g}")
        if not self.low <= self.default <= self.high:
            raise KnobError(
                "default",
                f"{self.default:g} lies outside {self.low:g} to {self.high:g}; widen the range",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedSpace(SearchSpace):
    """Weights by the names that the user gives them, one or more."""

    name: ClassVar[str] = "named"

    weights: Mapping[str, NamedWeight]

    @classmethod
    def read(cls, tree: Mapping[str, Any], where: str = "") -> Self:
        """Read a mapping of names to ``low``, ``high``, ``log`` and ``default``.

        Raises:
            KnobError: There is none, or one is not of this form.
        """
        key = where or "weights"
        if not tree:
            raise KnobError(key, "is empty; give {NAME: {low: ..., high: ..., default: ...}}")
        weights = {}
        for name, given in tree.items():
            if not _NAME.fullmatch(str(name)):
                raise KnobError(
                    f"{key}.{name}",
                    "cannot be a weight's name; use letters, digits and underscores",
                )
            if name in _RESERVED or name in knobs_of(CommandConfig):
                raise KnobError(
                    f"{key}.{name}",
                    f"cannot be a weight's name, as {name} has a meaning of its own in study "
                    f"files and outputs; choose another, such as {name}_weight",
                )
            if not isinstance(given, Mapping):
                raise KnobError(
                    f"{key}.{name}",
                    f"must be a mapping of low, high and default (and log), got {given!r}",
                )
            weights[str(name)] = NamedWeight.read(given, f"{key}.{name}")
        return cls(weights=weights)

    def distributions(self) -> Mapping[str, Uniform | Choice]:
        return {name: Uniform(w.low, w.high, w.log) for name, w in self.weights.items()}

    def values(self, params: Mapping[str, Any]) -> dict[str, float]:
        """The weights that parameters stand for, the baseline's too."""
        if BASELINE in params:
            return {name: weight.default for name, weight in self.weights.items()}
        return {name: float(params[name]) for name in self.weights}

    def shown(self, params: Mapping[str, Any]) -> dict[str, Any]:
        return dict(self.values(params))

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(f"log10 {name}" if w.log else name for name, w in self.weights.items())

    def coordinates(self, params: Mapping[str, Any]) -> tuple[float, ...] | None:
        values = self.values(params)
        return tuple(
            math.log10(values[name]) if w.log else values[name] for name, w in self.weights.items()
        )

    def label(self, params: Mapping[str, Any]) -> str:
        if BASELINE in params:
            return DEFAULTS
        return ", ".join(f"{name} {params[name]:.4g}" for name in self.weights)

    def require_fitting(
        self, params: Mapping[str, Any], num_branches: int, num_intervals: int
    ) -> None:
        """Raise an ``InputError`` for parameters of other names, or that are no numbers."""
        if params.keys() != self.weights.keys():
            raise InputError(
                f"the weights are {', '.join(self.weights)}, got {', '.join(params) or 'none'}; "
                "give each of them and no other"
            )
        for name, value in params.items():
            # math.isfinite raises for an int of 400 digits.
            if not is_number(value) or not abs(value) <= sys.float_info.max:
                raise InputError(f"{name} must be a finite number, got {str(value)[:30]}")
            if self.weights[name].log and value <= 0:
                raise InputError(f"{name} must be above 0, as its log is true, got {value:g}")

    def identity(self) -> dict[str, Any]:
        defaults = {name: weight.default for name, weight in self.weights.items()}
        # Optuna holds a parameter to its kind of distribution.
        logs = [name for name, weight in self.weights.items() if weight.log]
        return {"name": self.name, "defaults": defaults, "log": logs}


def require_runnable(
    config: CommandConfig, weights: Collection[str], where: str = "method"
) -> None:
    """Refuse a program that cannot be started here, or with words that nothing stands for.

    Raises:
        InputError: Says which, and the way out.
    """
    with under(where):
        if not config.cwd.is_dir():
            raise KnobError("folder", f"{config.cwd} is no folder; correct it")
        config.program()
        for key, path in config.used_files():
            if not _is_file(path):
                raise KnobError("files", f"there is no file {path} ({key}); {_WAY_OUT}")
        if unknown := sorted(config.named() - {*weights, *_OWN}):
            known = ", ".join([*weights, *_OWN])
            raise KnobError(
                "run",
                f"has {{{unknown[0]}}}, which stands for nothing; braces may hold {known}; write "
                f"{{{{{unknown[0]}}}}} for the braces themselves",
            )


def command_line(config: CommandConfig) -> str:
    """The program's command line, for people."""
    return f"`{shlex.join(config.run)}`"
