"""Folders that a Ray of this machine's own writes to: temporary files, and a token in HOME."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bdense.errors import InputError

_TOKENS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def require_ray_folders() -> None:
    """Refuse to launch where Ray could not start.

    Raises:
        InputError: A folder cannot be written; names the variable that sets it.
    """
    for problem in ray_folder_problems():
        raise InputError(problem)


def ray_scratch() -> Path:
    """Folder of Ray's temporary files and logs."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp") / "ray"


def ray_folder_problems() -> Iterator[str]:
    """A line for each folder that Ray needs here and cannot write, with the way out."""
    if os.environ.get("RAY_ADDRESS"):
        return
    scratch = ray_scratch()
    if why := _refusal(scratch):
        yield f"Ray cannot write its temporary files to {scratch} ({why}); set RAY_TMPDIR"
    home = Path.home()
    needs_none = os.environ.get("RAY_AUTH_MODE", "token") != "token"
    needs_none |= any(map(os.environ.get, _TOKENS))
    needs_none |= os.access(home / ".ray/auth_token", os.R_OK)
    if not needs_none and (why := _refusal(home / ".ray")):
        yield (
            f"Ray cannot write its token to HOME={home} ({why}); set HOME to a folder that can "
            "be written"
        )


def _refusal(folder: Path) -> str:
    """Why nothing can be written to a folder, made if it is missing; "" if it can."""
    try:
        there = next(each for each in (folder, *folder.parents) if each.exists())
        with tempfile.TemporaryFile(dir=there):
            return ""
    except OSError as error:
        return error.strerror or str(error)
