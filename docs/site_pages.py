"""Makes one site of the repository's pages: mkdocs calls the `on_...` functions (mkdocs.yml names this file).

- docs/README.md is the table of contents: its headings are the sections, the links of its lists their pages.
- Pages are written for the repository: a link to a file outside docs/ leads, on the site, to a page of that file.
- Docstrings are those of the package: doctests become code, and the lines `field: text` of a class a list.
"""

from __future__ import annotations

import posixpath
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "docs/README.md": "contents.md", "benchmarks/README.md": "benchmarks.md"}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)(?=[)#])")  # the path in [text](path#anchor)
DOCTEST = re.compile(r"^ *>>> (?:.*\S.*\n?)+", re.MULTILINE)  # up to an empty line
FIELDS = re.compile(r"^(\w+(?:, \w+)*): ", re.MULTILINE)
CONTENTS = re.compile(r"^## (?P<section>.+)|^- \[(?P<title>.+?)\]\((?P<path>[^)]+)\)", re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The navigation is that of docs/README.md."""
    sections: list[dict[str, list[dict[str, str]]]] = []
    for found in CONTENTS.finditer((ROOT / "docs" / "README.md").read_text()):
        if found["section"]:
            sections.append({found["section"]: []})
        else:
            (pages,) = sections[-1].values()
            pages.append({found["title"]: uri_of(posixpath.normpath(posixpath.join("docs", found["path"])))})
    config.nav = [{"Start": "index.md"}, *sections]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are outside docs/: the READMEs, and the code that a page links to."""
    files.remove(files.src_uris["README.md"])
    hidden = InclusionLevel.NOT_IN_NAV
    for path, uri in PAGES.items():
        inclusion = hidden if uri == "contents.md" else InclusionLevel.INCLUDED
        files.append(File.generated(config, uri, content=(ROOT / path).read_text(), inclusion=inclusion))
    for path in sorted({path for page in files.documentation_pages() for path in linked(page.content_string, page)}):
        if path.endswith(".py"):
            code = f"# {path}\n\n```python\n{(ROOT / path).read_text()}```\n"
            files.append(File.generated(config, uri_of(path), content=code, inclusion=hidden))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with its links as they are on the site."""
    folder = posixpath.dirname(page.file.src_uri)
    paths = linked(markdown, page.file)
    return LINK.sub(lambda _: posixpath.relpath(uri_of(next(paths)), folder or "."), markdown)


def uri_of(path: str) -> str:
    """Where a file of the repository is on the site; paths begin at the repository, or at docs/."""
    if path in PAGES or path.startswith("docs/"):
        return PAGES.get(path, path.removeprefix("docs/"))
    return f"source/{path.removesuffix('.py')}.md" if path.endswith(".py") else path


def linked(markdown: str, file: File) -> Iterator[str]:
    """The files of the repository that a page links to, in order."""
    path = {uri: path for path, uri in PAGES.items()}.get(file.src_uri, f"docs/{file.src_uri}")
    for link in LINK.findall(markdown):
        yield posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


class Docstrings(griffe.Extension):
    """Docstrings as Markdown: doctests become code, and a class's lines `field: text` a list."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring is None:
            return
        text = DOCTEST.sub(lambda found: f"```pycon\n{textwrap.dedent(found[0]).rstrip()}\n```\n", obj.docstring.value)
        if obj.is_class:
            text = FIELDS.sub(lambda found: f"\n- `{found[1]}`: " if _fields(obj, found[1]) else found[0], text)
        obj.docstring.value = text


def _fields(cls: griffe.Object, names: str) -> bool:
    return all(name in cls.members for name in names.split(", "))
