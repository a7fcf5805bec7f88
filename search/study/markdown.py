"""Markdown in which texts from the database are escaped."""

import re
from collections.abc import Sequence

# Characters that would start a link, a picture, a tag, a table cell, code or a formula.
_SPECIAL = re.compile(r"([\\`*_\[\]<>|&!#~$])")
# GFM turns bare https://, www. and mail addresses into links; an invisible word joiner does not.
_BARE_LINK = re.compile(r"(?<=:)(?=//)|(?<=www)(?=\.)|(?=@)", re.IGNORECASE)
_JOINER = "\u2060"


def escaped(text: str) -> str:
    """A text as one line of Markdown, without markup."""
    return _SPECIAL.sub(r"\\\1", _BARE_LINK.sub(_JOINER, printable(text)))


def fenced(text: str, language: str) -> str:
    """Lines in a code block whose fence is longer than any in them."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    lines = "\n".join(printable(line) for line in text.splitlines())
    return f"{fence}{language}\n{lines}\n{fence}"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A header and rows of cells, all escaped."""
    header, *rest = [[escaped(cell) for cell in row] for row in rows]
    lines = [header, ["---"] * len(header), *rest]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def paragraphs(texts: Sequence[str]) -> str:
    """Markdown of paragraphs, without the empty ones."""
    return "\n\n".join(filter(None, texts))


def printable(text: str) -> str:
    """A text with spaces for its line breaks and control characters."""
    return "".join(c if c.isprintable() else " " for c in text)
