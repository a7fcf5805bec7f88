"""A study's report as one HTML file: no request to anywhere, no script, readable on a phone.

Pictures are data URIs; every text that is not ours is escaped, and a policy in the page forbids
scripts and requests besides.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from search.report.markdown import html_table, tagless

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
th:first-child, td:first-child, .left td:last-child, .left th:last-child,
.arms td:nth-child(2) { text-align: left; }
tbody tr:nth-child(even) { background: #fafafa; }
.plots, .grids { display: grid; gap: 1rem; }
.plots { grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); }
.grids { grid-template-columns: repeat(auto-fit, minmax(min(100%, 13rem), 1fr)); }
figure { margin: 0; break-inside: avoid; }
figure img { width: 100%; height: auto; display: block; }
.grids img { image-rendering: pixelated; max-width: 20rem; }
figcaption { font-size: .85rem; color: #555; overflow-wrap: anywhere; }
pre { padding: .8rem; overflow-x: auto; background: #f6f6f6; font-size: .82rem; line-height: 1.4; }
details > summary { cursor: pointer; }
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A PNG file and what is said below it."""

    path: Path
    caption: str
    alt: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A heading and what is below it, as HTML; left out where there is nothing."""

    title: str
    parts: Sequence[str]


def page(title: str, lead: Sequence[str], sections: Sequence[Section], written: str) -> str:
    """The whole document.

    Args:
        title: The study's name.
        lead: HTML between the title and the first section.
        sections: In their order.
        written: When.
    """
    body = [f"<h1>{tagless(title)}</h1>", *lead]
    for section in sections:
        if parts := [part for part in section.parts if part]:
            body += [f"<section><h2>{tagless(section.title)}</h2>", *parts, "</section>"]
    body.append(f'<p class="quiet">Written by bdense-search report, {tagless(written)}.</p>')
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="referrer" content="no-referrer">',
            f"<title>{tagless(title)}</title>",
            f"<style>{STYLE}</style></head>",
            "<body>",
            *body,
            "</body></html>",
            "",
        ]
    )


def paragraph(text: str, kind: str = "") -> str:
    """Words of any origin."""
    attribute = f' class="{tagless(kind)}"' if kind else ""
    return f"<p{attribute}>{tagless(text)}</p>" if text else ""


def highlighted(value: str, lines: Sequence[str]) -> str:
    """The figure that the page is about, and what it is."""
    told = "".join(paragraph(line) for line in lines)
    return f'<div class="best"><strong>{tagless(value)}</strong>{told}</div>'


def bullets(lines: Sequence[str]) -> str:
    """Words of any origin, one item a line."""
    items = "".join(f"<li>{tagless(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if lines else ""


def preformatted(text: str) -> str:
    """Lines as they are."""
    lines = "\n".join(tagless(line) for line in text.splitlines())
    return f"<pre>{lines}</pre>" if lines else ""


def folded(summary: str, inside: str) -> str:
    """What opens on demand, without a script; a printed page has it if it is open."""
    return f"<details open><summary>{tagless(summary)}</summary>{inside}</details>"


def rows_table(rows: Sequence[Sequence[str]], *, left: bool = True) -> str:
    """A header and rows; the last column to the left where it holds words, as one without head."""
    kinds = ["left"] * left + ["arms"] * (rows[0][1] == "")
    return html_table(rows, kind=" ".join(kinds)) if len(rows) > 1 else ""


def figures(pictures: Sequence[Picture], kind: str) -> str:
    """Pictures beside each other, ``kind`` being plots or grids."""
    shown = [
        f'<figure><img src="{data_uri(each.path)}" alt="{tagless(each.alt)}">'
        f"<figcaption>{tagless(each.caption)}</figcaption></figure>"
        for each in pictures
    ]
    return f'<div class="{tagless(kind)}">' + "\n".join(shown) + "</div>" if shown else ""


def data_uri(path: Path) -> str:
    """A PNG as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
