"""A page about a study as blocks, which are written as Markdown and as HTML.

Texts are escaped in both. The HTML is one file without requests or scripts, readable on a phone:
pictures are data URIs, and a policy in the page forbids all else.
"""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from search.study.markdown import escaped, fenced, markdown_table, paragraphs, printable

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'"
STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 70rem; color: #1a1a1a;
  background: #fff; font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { margin: 0; font-size: 1.8rem; overflow-wrap: anywhere; }
h2 { margin: 2.2rem 0 .6rem; padding-bottom: .2rem; border-bottom: 1px solid #ddd;
  font-size: 1.2rem; }
p { margin: .5rem 0; overflow-wrap: anywhere; }
.lead { font-size: 1.1rem; }
.best { margin: 1rem 0; padding: .8rem 1rem; border-left: 4px solid #b2182b; background: #faf6f4; }
.best strong { font-size: 1.5rem; }
.quiet { color: #555; font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #e3e3e3; text-align: right;
  white-space: nowrap; }
th { position: sticky; top: 0; background: #f4f4f4; font-weight: 600; }
th:first-child, td:first-child, .left td:last-child, .left th:last-child { text-align: left; }
tbody tr:nth-child(even) { background: #fafafa; }
.plots, .grids { display: grid; gap: 1rem; }
.plots { grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); }
.grids { grid-template-columns: repeat(auto-fit, minmax(min(100%, 13rem), 1fr)); }
figure { margin: 0; break-inside: avoid; }
figure img { width: 100%; height: auto; display: block; }
.plots img { max-width: 40rem; }
.grids img { image-rendering: pixelated; max-width: 20rem; }
figcaption { font-size: .85rem; color: #555; overflow-wrap: anywhere; }
pre { padding: .8rem; overflow-x: auto; background: #f6f6f6; font-size: .82rem; line-height: 1.4; }
li { overflow-wrap: anywhere; }
@media print {
  body { max-width: none; padding: 0; font-size: 11pt; }
  .wide, pre { overflow: visible; }
  pre { white-space: pre-wrap; }
  th { position: static; }
  table { font-size: 8pt; }
  th, td { padding: .15rem .35rem; }
  h2 { break-after: avoid; }
  tr { break-inside: avoid; }
}
"""


class Picture(NamedTuple):
    """A picture's title, and its address in Markdown; in a report, a file of its folder."""

    title: str
    address: str


@dataclass(frozen=True, slots=True)
class Best:
    """The page's main figure, and lines that explain it."""

    value: str
    lines: Sequence[str]


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph; a quiet one is a remark."""

    text: str
    quiet: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A header and rows of cells, whose last column may hold words; nothing without rows."""

    rows: Sequence[Sequence[str]]
    words: bool = True


@dataclass(frozen=True, slots=True)
class Bullets:
    """A list, one item a line."""

    lines: Sequence[str]


@dataclass(frozen=True, slots=True)
class Code:
    """Lines of YAML, or a command, as they are."""

    text: str
    language: str = "yaml"


@dataclass(frozen=True, slots=True)
class Pictures:
    """Plots, or grids of samples, beside each other."""

    pictures: Sequence[Picture]
    kind: Literal["plots", "grids"]


@dataclass(frozen=True, slots=True)
class Section:
    """Blocks under a heading, which is left out where they are empty."""

    heading: str
    blocks: Sequence["Block"]


Block: TypeAlias = Best | Text | Table | Bullets | Code | Pictures | Section


def as_markdown(title: str, blocks: Sequence[Block]) -> str:
    """The page as Markdown."""
    return paragraphs([f"# {escaped(title)}", *map(_markdown, blocks)]) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Best(value, lines):
            return f"**{escaped(value)}**, {escaped('; '.join(lines))}."
        case Text(text):
            return escaped(text)
        case Table(rows):
            return markdown_table(rows) if len(rows) > 1 else ""
        case Bullets(lines):
            return "\n".join(f"- {escaped(line)}" for line in lines)
        case Code(text, language):
            return fenced(text, language)
        case Pictures(pictures, _):
            titles = [escaped(each.title) for each in pictures]
            shown = [f"![]({each.address})" for each in pictures]
            rows = (titles, ["---"] * len(titles), shown) if pictures else ()
            return "\n".join(f"| {' | '.join(row)} |" for row in rows)
        case Section(heading, blocks):
            inside = paragraphs([*map(_markdown, blocks)])
            return inside and f"## {escaped(heading)}\n\n{inside}"


def generator(title: str) -> str:
    """The line that marks a page as our report of this study."""
    return f'<meta name="generator" content="bdense: {_tagless(title)}">'


def as_html(title: str, blocks: Sequence[Block], folder: Path) -> str:
    """The page as a document of HTML, with the pictures of that folder in it."""
    body = "\n".join(filter(None, (_html(block, folder) for block in blocks)))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
{generator(title)}
<title>{_tagless(title)}</title>
<style>{STYLE}</style></head>
<body>
<h1>{_tagless(title)}</h1>
{body}
</body></html>
"""


def _html(block: Block, folder: Path) -> str:
    match block:
        case Best(value, lines):
            return _within("div", _within("strong", _tagless(value)) + _each("p", lines), "best")
        case Text(text, quiet):
            return _within("p", _tagless(text), "quiet" * quiet)
        case Table((head, *rows), words) if rows:
            lines = [_within("tr", _each("td", row)) for row in rows]
            table = _within("thead", _within("tr", _each("th", head)))
            table += "\n" + _within("tbody", "\n".join(lines))
            return _within("div", _within("table", table, "left" * words), "wide")
        case Bullets(lines):
            return _within("ul", _each("li", lines))
        case Code(text):
            return _within("pre", "\n".join(map(_tagless, text.splitlines())))
        case Pictures(pictures, kind):
            return _within("div", "\n".join(_figure(each, folder) for each in pictures), kind)
        case Section(heading, blocks):
            inside = "\n".join(filter(None, (_html(each, folder) for each in blocks)))
            return inside and _within("section", f"<h2>{_tagless(heading)}</h2>\n{inside}")
    return ""


def _figure(picture: Picture, folder: Path) -> str:
    data = base64.b64encode((folder / picture.address).read_bytes()).decode()
    title = _tagless(picture.title)
    image = f'<img src="data:image/png;base64,{data}" alt="{title}">'
    return _within("figure", image + _within("figcaption", title))


def _each(tag: str, texts: Sequence[str]) -> str:
    return "".join(f"<{tag}>{_tagless(text)}</{tag}>" for text in texts)


def _within(tag: str, inside: str, kind: str = "") -> str:
    """HTML inside a tag with a class; "" if there is no HTML."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<{tag}{attribute}>{inside}</{tag}>" if inside else ""


def _tagless(text: str) -> str:
    """A text escaped as one line of HTML, also for an attribute's quotes."""
    return html.escape(printable(text), quote=True)
