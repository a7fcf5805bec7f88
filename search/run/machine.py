"""What a launch asks of this machine: GPUs, counted without torch, and folders for Ray."""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from bdense.errors import InputError

VISIBLE, ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"
_DRIVER = Path("/proc/driver/nvidia/gpus")
_SECONDS = 30
_TOKENS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def count_gpus() -> int:
    """Number of GPUs of this machine or container, as nvidia-smi counts them."""
    if (program := shutil.which("nvidia-smi")) is not None:
        try:
            listed = subprocess.run(
                [program, "-L"], capture_output=True, text=True, timeout=_SECONDS, check=True
            )
        except (OSError, subprocess.SubprocessError):
            pass  # without a driver it fails
        else:
            return len(re.findall(r"^GPU \d+:", listed.stdout, re.MULTILINE))
    return len(list(_DRIVER.iterdir())) if _DRIVER.is_dir() else 0


def use_gpus(chosen: Sequence[int] | None) -> None:
    """Restrict a local Ray to these GPUs, by this process's environment; call before it starts.

    Args:
        chosen: nvidia-smi's numbers; None changes nothing.

    Raises:
        InputError: There are no such GPUs, this process may not use them, or Ray is not local.
    """
    if chosen is None:
        return
    asked = f"--gpus {','.join(map(str, chosen))}"
    if address := os.environ.get("RAY_ADDRESS"):
        raise InputError(
            f"{asked}: the workers are those of the cluster at RAY_ADDRESS={address}, whose "
            "machines were given their GPUs when they joined it (ray start --num-gpus, "
            f"{VISIBLE}); choose there, or unset RAY_ADDRESS to use this machine alone"
        )
    if len(set(chosen)) < len(chosen):
        raise InputError(f"{asked} names a GPU twice; name each once")
    there = count_gpus()
    if missing := [str(number) for number in chosen if not 0 <= number < there]:
        known = {0: "no GPU", 1: "GPU 0 alone"}.get(there, f"GPUs 0 to {there - 1}")
        raise InputError(
            f"{asked}: this machine has {known}, and {', '.join(missing)} cannot be used; choose "
            "others, or leave --gpus out"
        )
    given = os.environ.get(VISIBLE)
    allowed = None if given is None else {part.strip() for part in given.split(",")}
    if allowed is not None and not {*map(str, chosen)} <= allowed:
        raise InputError(
            f"{asked}: {VISIBLE}={given} does not name all of them by nvidia-smi's numbers; "
            "choose from those that it names, or unset it"
        )
    os.environ[VISIBLE] = ",".join(map(str, chosen))
    # CUDA orders GPUs by speed, nvidia-smi by bus.
    os.environ[ORDER] = "PCI_BUS_ID"


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
    if why := refusal(scratch):
        yield f"Ray cannot write its temporary files to {scratch} ({why}); set RAY_TMPDIR"
    home = Path.home()
    needs_none = os.environ.get("RAY_AUTH_MODE", "token") != "token"
    needs_none |= any(map(os.environ.get, _TOKENS))
    needs_none |= os.access(home / ".ray/auth_token", os.R_OK)
    if not needs_none and (why := refusal(home / ".ray")):
        yield (
            f"Ray cannot write its token to HOME={home} ({why}); set HOME to a folder that can "
            "be written"
        )


def refusal(folder: Path) -> str:
    """Why a folder cannot be written; "" if it can. The folder may be missing."""
    try:
        there = next(each for each in (folder, *folder.parents) if each.exists())
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"\0")
        return ""
    except OSError as error:
        return error.strerror or str(error)
