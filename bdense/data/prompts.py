"""Prompts: where a user names them, and their tables; does not import torch."""

import csv
import io
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bdense.errors import InputError
from bdense.models.zoo import PROMPT_SETS

# What a user may name, see ``read_prompts``.
PROMPTS = (
    "text file with a prompt in each line, FILE:COLUMN of a .csv, .tsv, .json or .jsonl, or "
    "ms-coco-val2014-30k"
)
_TEXT = "text"  # the usual column, as of MS-COCO's captions


def split_column(source: str) -> tuple[Path, str | None]:
    """``FILE.csv:COLUMN`` (or .tsv, .json, .jsonl) as its parts; None where no column is named."""
    match = re.fullmatch(r"(.+\.(?:csv|tsv|jsonl?)):([^/:]+)", source)
    return (Path(source), None) if match is None else (Path(match[1]), match[2])


def read_prompts(source: str | Path) -> list[str]:
    """The prompts of a file; blank ones do not count.

    Args:
        source: A text file with one in each line, or a table (.csv, .tsv, .json, .jsonl) with a
            column of them: ``FILE:COLUMN``, or FILE if it has one column or one called text. A
            .json may be a list of prompts, too. Or the name of a public table
            (``bdense.models.zoo.PROMPT_SETS``), which is downloaded once.

    Raises:
        InputError: The file cannot be read, holds none, or has no such column.
    """
    if (published := PROMPT_SETS.get(str(source))) is not None:
        source = published.fetch()
    file, column = split_column(str(source))
    try:
        text = file.read_text(encoding="utf-8-sig")
        read = _TABLES.get(file.suffix)
        found = text.splitlines() if read is None else _column(read(text), column, file)
    except (OSError, UnicodeDecodeError, ValueError, csv.Error, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} cannot be read: {error}") from error
    if not (texts := [stripped for each in found if (stripped := each.strip())]):
        raise InputError(f"{source} is empty; write a prompt in each line")
    return texts


def _json(text: str) -> list[Any]:
    found = json.loads(text)
    if isinstance(found, dict):  # by column
        columns = {name: each for name, each in found.items() if isinstance(each, list)}
        return [
            dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
        ]
    return found if isinstance(found, list) else [found]


# Readers by file suffix. A row is a mapping by column, or a prompt.
_TABLES: Mapping[str, Callable[[str], list[Any]]] = {
    ".csv": lambda text: list(csv.DictReader(io.StringIO(text))),
    ".tsv": lambda text: list(csv.DictReader(io.StringIO(text), delimiter="\t")),
    ".json": _json,
    ".jsonl": lambda text: [json.loads(line) for line in text.splitlines() if line.strip()],
}


def _column(rows: list[Any], column: str | None, file: Path) -> list[str]:
    """The prompts of rows."""
    if rows and column is None and all(isinstance(row, str) for row in rows):
        return rows
    if not all(isinstance(row, dict) for row in rows):
        raise InputError(
            f"{file} is not a table of prompts; give rows of which one column is the prompt"
        )
    names = list(dict.fromkeys(name for row in rows for name in row))
    chosen = column or (names[0] if len(names) == 1 else _TEXT)
    if rows and not all(isinstance(row.get(chosen), str) for row in rows):
        known = ", ".join(map(str, names))
        raise InputError(
            f"{file} lacks text in column {chosen} of some row; its columns are {known}; choose "
            f"one by {file.name}:COLUMN"
        )
    return [row[chosen] for row in rows]
