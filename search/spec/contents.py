"""What a study's files hold, and the fingerprint of its conditions."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bdense.data.names import LABELS_FILE, image_files, labels_beside, split_fit, split_format
from bdense.data.prompts import split_column
from bdense.files import sha256_file
from bdense.models.zoo import PROMPT_SETS


def fingerprint_of(conditions: Mapping[str, Any]) -> str:
    """16 hex digits over flat conditions."""
    text = json.dumps(conditions, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def content_of(data: str) -> str:
    """A data set's name, or the digest of its files."""
    source, fit = split_fit(data)
    if (found := split_format(source)) is None:
        return data
    kind, path = found[0], Path(os.path.expanduser(found[1]))
    if kind == "folder":
        content = _digest_of_folder(path)
    else:
        labels = labels_beside(path) if kind == "idx" else None
        content = "+".join(sha256_file(file) for file in (path, labels) if file is not None)
    return f"{kind}:{content}" if fit is None else f"{kind}:{content}@{fit}"


def content_of_prompts(prompts: str) -> str:
    """A public name, or the digest of a file of prompts and the column that is read of it."""
    if prompts in PROMPT_SETS:
        return prompts
    file, column = split_column(prompts)
    return sha256_file(file) if column is None else f"{sha256_file(file)}:{column}"


def _digest_of_folder(folder: Path) -> str:
    """Hex digest over the images' names and sizes, and the labels.

    Pixels take minutes to read at every launch, and modification times change with every copy.
    """
    files = [(name, (folder / name).stat().st_size) for name in image_files(folder)]
    labels = folder / LABELS_FILE
    known = [files, sha256_file(labels) if labels.is_file() else None]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
