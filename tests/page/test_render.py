"""The page as a file: well formed, self-contained, its data whole; and the texts that it is made of."""

from __future__ import annotations

import base64
import json
import re
import zlib
from functools import cache
from html.parser import HTMLParser
from typing import Any

import pytest

from ringpass.explain.report import Report
from ringpass.page import render
from ringpass.page.code import MODEL, as_data, stages
from ringpass.page.glossary import TERMS
from ringpass.page.panels import PANELS
from tests.support.page_models import Layers, explained
from tests.support.repository import ROOT

VOID = {"meta", "br", "input", "link", "img"}


@cache
def small() -> Report:
    """Two layers on rank 1 of 4, with an op that gathers."""
    return explained(Layers(gathers=True), 64, world=4, rank=1, layout="zigzag")


@cache
def page() -> str:
    return small().to_html()


def texts() -> dict[str, str]:
    """The stages of its only graph, by file name."""
    return {name.removeprefix("graph0/"): text for name, text in small().texts.items()}


class Parsed(HTMLParser):
    """The elements of a page, by id, their nesting checked."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: dict[str, str] = {}
        self.inside = ""
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        self.inside = dict(attrs).get("id") or ""
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.ids[self.inside] = self.ids.get(self.inside, "") + data


def parsed(html: str) -> Parsed:
    parser = Parsed()
    parser.feed(html)
    assert parser.open == []
    return parser


def test_it_is_well_formed_and_needs_nothing_else() -> None:
    found = parsed(page())
    assert not [value for name, value in found.attributes if name in ("src", "srcset", "action")]
    assert all((value or "").startswith("#") for name, value in found.attributes if name == "href")
    addresses = set(re.findall(r"https?://[^\s\"'<>`]+", page()))
    assert addresses == {"http://www.w3.org/2000/svg"}  # the name of SVG, which no browser loads
    assert not re.search(r"\b(fetch|XMLHttpRequest|import)\s*\(|@import|url\(|<link", page())


def test_its_data_is_the_report() -> None:
    found = parsed(page())
    report = json.loads(found.ids["report"])
    slowest = report.pop("slowest")
    assert report == json.loads(small().to_json()) and len(slowest[0]) == len(report["graphs"][0]["schedules"])
    more = json.loads(zlib.decompress(base64.b64decode(found.ids["more"])))
    names = [stage["name"] for stage in more["code"][0]["stages"]]
    assert names == [MODEL, *texts()]
    assert more["timelines"][0][0]["rank"] and more["measured"] is None


def test_texts_of_a_model_cannot_end_a_script() -> None:
    evil = "</script><script>alert(1)</script><!--"
    report = {"version": 1, "model": evil, "world": 1, "graphs": [], "command": evil}
    html = render(report, {"captured.py": evil})
    assert html.count("<script") == page().count("<script") and "alert(1)<" not in html
    assert json.loads(parsed(html).ids["report"])["command"] == evil


@pytest.mark.parametrize("missing", ["graphs", "verdict", "options", "made_by"])
def test_what_is_missing_is_no_error(missing: str) -> None:
    report = {name: value for name, value in small().to_dict().items() if name != missing}
    parsed(render(report, {}))


def test_every_panel_has_a_script() -> None:
    for panel in PANELS:
        assert f"panels.{panel.name} = " in page() and f'data-panel="{panel.name}"' in page()


def test_terms_are_those_of_the_glossary() -> None:
    rows = dict(re.findall(r"^\| ([^|`]+) \| (.+) \|$", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE))
    for term, meaning in TERMS.items():
        assert re.sub(r"[*`]", "", rows[term]) == meaning, term
    named = {term for panel in PANELS for term in re.findall(r"\[([^\]]+)\]", panel.about)}
    assert named <= set(TERMS)


def test_lines_of_the_model_are_linked_with_their_nodes() -> None:
    data: dict[str, Any] = as_data(stages(texts()))
    lines = {stage["name"]: [re.sub("<[^>]*>", "", line) for line in stage["lines"]] for stage in data["stages"]}
    of = {stage["name"]: stage["sources"] for stage in data["stages"]}
    (model_line,) = (i for i, line in enumerate(lines[MODEL]) if "mixed = scaled_dot_product_attention" in line)
    source = of[MODEL][model_line]
    assert data["sources"][source].startswith("tests/support/page_models.py:")
    for name, node in (("captured.py", "scaled_dot_product_attention"), ("forward.py", "attention_step1")):
        linked = [line for line, s in zip(lines[name], of[name], strict=True) if s == source]
        assert any(node in line for line in linked), name


def test_colours_change_no_text() -> None:
    found = stages(texts())
    for stage in found:
        shown = [re.sub("<[^>]*>", "", line) for line in stage.lines]
        plain = [line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") for line in stage.plain]
        assert [x.replace("&quot;", '"').replace("&#x27;", "'") for x in shown] == plain
