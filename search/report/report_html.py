"""A study's report as one HTML file without requests or scripts, readable on a phone.

Pictures are data URIs; texts are escaped, and a policy in the page forbids scripts and requests.
"""

import base64
from collections.abc import Mapping, Sequence
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
th:first-child, td:first-child, .left td:last-child, .left th:last-child { text-align: left; }
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


@dataclass(frozen=True, slots=True)
class Picture:
    """A PNG file, its title, and the caption below it."""

    path: Path
    title: str
    caption: str


def page(
    title: str, lead: Sequence[str], sections: Mapping[str, Sequence[str]], written: str
) -> str:
    """The whole document.

    ``lead`` is HTML between the title and the first section; ``sections`` are headings and HTML,
    left out where empty.
    """
    body = [f"<h1>{tagless(title)}</h1>", *filter(None, lead)]
    for heading, parts in sections.items():
        if any(parts):
            body += [f"<section><h2>{tagless(heading)}</h2>", *filter(None, parts), "</section>"]
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
    """A text, escaped."""
    attribute = f' class="{tagless(kind)}"' if kind else ""
    return f"<p{attribute}>{tagless(text)}</p>" if text else ""


def highlighted(value: str, lines: Sequence[str]) -> str:
    """The page's main figure and lines that explain it."""
    lines = [paragraph(line) for line in lines]
    return f'<div class="best"><strong>{tagless(value)}</strong>{"".join(lines)}</div>'


def bullets(lines: Sequence[str]) -> str:
    """Texts, escaped, one item a line."""
    items = "".join(f"<li>{tagless(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if lines else ""


def preformatted(text: str) -> str:
    """Lines as they are."""
    lines = "\n".join(tagless(line) for line in text.splitlines())
    return f"<pre>{lines}</pre>" if lines else ""


def folded(summary: str, inside: str) -> str:
    """What closes and opens without a script."""
    return f"<details open><summary>{tagless(summary)}</summary>{inside}</details>"


def rows_table(rows: Sequence[Sequence[str]], *, left: bool = True) -> str:
    """A header and rows, "" without rows; the last column to the left where it holds words."""
    return html_table(rows, kind="left" * left) if len(rows) > 1 else ""


def figures(pictures: Sequence[Picture], kind: str) -> str:
    """Pictures beside each other, ``kind`` being plots or grids."""
    shown = [
        f'<figure><img src="data:image/png;base64,{_base64(each.path)}" '
        f'alt="{tagless(each.title)}">'
        f"<figcaption>{tagless(each.caption)}</figcaption></figure>"
        for each in pictures
    ]
    return f'<div class="{tagless(kind)}">' + "\n".join(shown) + "</div>" if shown else ""


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
