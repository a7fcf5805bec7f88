"""Folders that the environment names."""

import os
from pathlib import Path


def runs_folder() -> Path:
    """Folder of all files of studies: ``$BDENSE_RUNS``, else ``runs``."""
    return Path(os.path.expanduser(os.environ.get("BDENSE_RUNS") or "runs"))


def cache_folder() -> Path:
    """Folder of files that studies share: ``$BDENSE_CACHE``, else ``cache`` under the runs."""
    return Path(os.path.expanduser(os.environ.get("BDENSE_CACHE") or runs_folder() / "cache"))
