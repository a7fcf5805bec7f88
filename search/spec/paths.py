"""Paths that a study file names: absolute, and of files that are there."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from bdense.data.names import split_fit, split_format
from bdense.data.prompts import split_column
from bdense.errors import did_you_mean
from bdense.models.zoo import PROMPT_SETS
from search.errors import SpecError


@dataclass(frozen=True, slots=True)
class Paths:
    """Absolute paths of what a study's file names, relative to that file or to a home.

    Attributes:
        source: The study's file; errors begin with it.
    """

    source: str

    def path(self, key: str, file: str) -> Path:
        """A path; there may be nothing there."""
        if not file:  # else the study's own folder
            raise self._error(key, "'' names no file; leave the key out, or name one")
        try:
            return (Path(self.source).parent / Path(file).expanduser()).resolve()
        except (OSError, RuntimeError, ValueError) as error:  # such as ~ of no user
            raise self._error(key, f"{file!r} is not a path: {error}") from error

    def file(
        self, key: str, file: str | None, names: Collection[str] = (), *, folder: bool = False
    ) -> str | None:
        """A file that is there, or a folder if that will do; a public name stays one."""
        if file is None or file in names:
            return file
        path = self.path(key, file)
        if path.is_dir() and not folder:
            raise self._error(key, f"{file} is a folder; give the name of a file")
        if not path.exists():
            public = did_you_mean(file, names) or f" ({', '.join(names)})"
            known = f", nor a public one of that name{public}" if names else ""
            raise self._error(key, f"there is no file {file}{known}{_elsewhere(file)}")
        return str(path)

    def prompts(self, key: str, prompts: str | None) -> str | None:
        """A file of prompts and its column."""
        if prompts is None or prompts in PROMPT_SETS:
            return prompts
        file, column = split_column(prompts)
        path = self.file(key, str(file))
        return path if column is None else f"{path}:{column}"

    def log(self, place: str) -> str:
        """A tracker with its folder; a project or a URL stays one."""
        name, _, folder = place.partition(":")
        if name != "tensorboard" or not folder:
            return place
        return f"{name}:{self.path('resources.log', folder)}"

    def data(self, data: str | None) -> str | None:
        """A data set of files; a name stays one."""
        if data is None:
            return None
        given, fit = split_fit(data)
        if (found := split_format(given)) is None:
            return data
        kind, path = found[0], self.path("data", found[1])
        what = "folder" if kind == "folder" else "file"
        if not (path.is_dir() if what == "folder" else path.is_file()):
            raise self._error("data", f"there is no {what} {found[1]}{_elsewhere(found[1])}")
        return f"{kind}:{path}" if fit is None else f"{kind}:{path}@{fit}"

    def _error(self, key: str, problem: str) -> SpecError:
        return SpecError(f"{self.source}: {key}: {problem}")


def _elsewhere(file: str) -> str:
    """A hint for a path that was meant relative to the current folder."""
    here = Path(file).exists()
    return "; paths are relative to the study's file" if here else ""
