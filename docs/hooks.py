"""Makes one site of the README, docs/ and the files of the repository that they link to.

mkdocs calls the functions whose names begin with on_; see mkdocs.yml.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")
OUTSIDE = "repository"  # where the site has files that do not lie in docs/


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Gives headings the anchors that GitHub gives them: the pages are read there, too."""
    config.mdx_configs["toc"]["slugify"] = lambda heading, separator: re.sub(
        r"[^\w\- ]", "", heading.lower()
    ).replace(" ", separator)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the README, the command line's help, and what is linked outside docs/."""
    reference = f"# Command line\n\n```text\n{(ROOT / 'docs/cli.txt').read_text()}```\n"
    files.append(File.generated(config, "cli.md", content=reference))
    files.append(File.generated(config, "index.md", abs_src_path=str(ROOT / "README.md")))
    nav = [uri for each in config.nav or () for uri in each.values()]
    found = [uri.removeprefix(OUTSIDE + "/") for uri in nav if uri.startswith(OUTSIDE)]
    for uri in [file.src_uri for file in files.documentation_pages()]:
        folder, text = _source(uri)
        found += [_resolved(folder, link) for link in LINK.findall(text)]
    while found:
        path = found.pop()
        source, uri = ROOT / path, f"{OUTSIDE}/{path}"
        if (
            path.startswith(("docs/", ".."))
            or not source.is_file()
            or files.get_file_from_path(uri)
        ):
            continue
        level = InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, uri, abs_src_path=str(source), inclusion=level))
        if path.endswith(".md"):
            folder = posixpath.dirname(path)
            found += [_resolved(folder, link) for link in LINK.findall(source.read_text())]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as they are in the repository become links of the site."""
    folder, _ = _source(page.file.src_uri)
    here = posixpath.dirname(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        path = _resolved(folder, link[1])
        if (ROOT / path).is_dir():  # the site has no listing of a folder
            return "#"
        uri = path.removeprefix("docs/") if path.startswith("docs/") else f"{OUTSIDE}/{path}"
        uri = {f"{OUTSIDE}/README.md": "index.md", "cli.txt": "cli.md"}.get(uri, uri)
        return posixpath.relpath(uri, here or ".")

    return LINK.sub(moved, markdown)


def _source(uri: str) -> tuple[str, str]:
    """The folder in the repository, and the text, of a page of the site."""
    path = "README.md" if uri == "index.md" else uri.removeprefix(OUTSIDE + "/")
    if path == uri:
        path = f"docs/{uri}"
    file = ROOT / path
    return posixpath.dirname(path), file.read_text() if file.is_file() else ""


def _resolved(folder: str, link: str) -> str:
    """The path in the repository that a link leads to."""
    return posixpath.normpath(posixpath.join(folder, link))
