"""The page in a real browser, from disk: every panel is drawn, clicked and filtered, wide and on a phone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ringpass.explain.real import HOW_LONG
from ringpass.page import render
from ringpass.page.panels import PANELS
from ringpass.page.timeline import Costs, planned
from tests.support.browser import PHONE, WIDE, Opened, browser, draw_all, draw_at_once, open_page
from tests.support.page_models import Layers, explained
from tests.support.profiles import profile_of

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as started:
        yield started


@pytest.fixture(scope="module")
def file(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of layers that gather, and of a picture along its curve as a second graph, with a profile."""
    layers = explained(Layers(gathers=True), 64, world=4, rank=1, layout="contiguous")
    picture = explained(Layers(causal=False), 37, world=3, rank=1, hilbert=(6, 6))
    report = layers.to_dict()
    report["graphs"] += picture.to_dict()["graphs"]
    report["breaks"] = [{"reason": "a call of print", "source": "model.py:3", "count": 2}]
    report["graphs"][0]["sites"][0]["ways"] = [
        {
            "name": name,
            "degree": 1,
            "comm": "ring",
            "chosen": name == "ring",
            "seconds": 2e-3,
            "parts": {"compute": 2e-3},
        }
        for name in ("ring", "ulysses degree 4")
    ]
    texts = {**layers.texts, **{name.replace("graph0", "graph1"): text for name, text in picture.texts.items()}}
    events = planned(report["graphs"][0]["schedules"][0]["ranks"], Costs(1e-9, 1e-9, "s"))
    path = tmp_path_factory.mktemp("page") / "index.html"
    path.write_text(render(report, texts, [profile_of(events, rank) for rank in range(4)]))
    return path


@pytest.fixture
def page(chromium: Any, file: Path) -> Iterator[Opened]:
    """The page, all panels drawn; fails if the browser complains or the page asks for anything."""
    with open_page(chromium, file) as opened:
        draw_at_once(opened.tab)
        yield opened
        assert opened.complaints == []


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_panel_is_drawn(chromium: Any, file: Path, size: tuple[int, int], scheme: str) -> None:
    with open_page(chromium, file, size, scheme) as opened:
        draw_all(opened.tab)
        for panel in PANELS:
            assert opened.tab.inner_text(f"#{panel.name} .panel").strip(), panel.name
        assert "cannot be drawn" not in opened.tab.inner_text("main")
        assert opened.tab.evaluate("document.documentElement.scrollWidth") == size[0]
        dark = opened.tab.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(251, 251, 250)"
        assert dark == (scheme == "dark") and opened.complaints == []


def test_the_verdict_is_first(page: Opened) -> None:
    assert page.tab.inner_text("section:first-of-type h2") == "Verdict"
    assert "linalg_qr.default gathers" in page.tab.inner_text("#verdict .headline:first-child")
    assert "a call of print" in page.tab.inner_text("#verdict table")
    assert 'ringpass.explain(.., device="H100")' in page.tab.inner_text("#verdict .panel")  # no device was named


def test_the_device_of_a_run(chromium: Any, tmp_path: Path) -> None:
    """A run knows its device, and no longest sequence: the page says how to find it."""
    report = explained(Layers(1), 64, world=4).to_dict()
    report["verdict"] |= {"device": {"name": "H100", "bytes": 80 * 10**9}, "fits": True}
    report["longest"] = {"tokens": None, "device": "H100", "verified": False, "why": HOW_LONG}
    (tmp_path / "index.html").write_text(render(report, {}))
    with open_page(chromium, tmp_path / "index.html") as opened:
        text = opened.tab.inner_text("#verdict .cards")
    assert "fits H100" in text and "not known" in text and f"H100: {HOW_LONG}" in text


def test_a_rank_of_the_tile_map(page: Opened) -> None:
    """Chosen by click, by arrow keys and from the list; its steps are listed."""
    tab = page.tab
    assert "Rank 3 computes 1.74 times the mean" in tab.inner_text("#tiles .panel")
    box = tab.query_selector("#tiles canvas").bounding_box()
    tab.click("#tiles canvas", position={"x": box["width"] * 0.3, "y": box["height"] * 0.9})
    assert "Rank 3, step by step" in tab.inner_text("#tiles .panel")
    assert len(tab.query_selector_all("#tiles tbody tr")) == 4
    tab.keyboard.press("ArrowUp")
    assert "Rank 2, step by step" in tab.inner_text("#tiles .panel")
    assert "rank 1" in tab.inner_text("#tiles tbody")
    tab.click("#tiles >> text=by token")
    tab.select_option("#tiles select[aria-label=rank]", "0")
    assert "Rank 0, step by step" in tab.inner_text("#tiles .panel") and "its own" in tab.inner_text("#tiles tbody")


def test_a_panel_is_drawn_once_its_canvas_is_painted(page: Opened) -> None:
    """Else a click, at a part of the size that a canvas has before, hits another rank."""
    width = page.tab.evaluate("""() => new Promise((resolve) => {
        const holder = document.querySelector("#tiles .panel");
        const look = () => { if (holder.dataset.drawn === "yes") resolve(holder.querySelector("canvas").style.width); };
        new MutationObserver(look).observe(holder, {attributes: true});
        draw(holder);
    })""")
    assert width == page.tab.evaluate("`${document.querySelector('#tiles canvas').clientWidth}px`") != "300px"


@pytest.mark.parametrize("view", ["by rank", "by token"])
def test_colours_of_the_tile_map(page: Opened, view: str) -> None:
    """Its pixels are those of the tiles: as large a share is coloured as the mask leaves."""
    page.tab.click(f"#tiles >> text={view}")
    share = page.tab.evaluate("""() => {
        const canvas = document.querySelector("#tiles canvas"), pen = canvas.getContext("2d");
        const scale = canvas.width / canvas.clientWidth, left = 34 * scale, top = 18 * scale;
        const size = Math.min(canvas.clientWidth - 36, canvas.clientHeight - 20) * scale;
        const {data} = pen.getImageData(left, top, size, size);
        let n = 0;
        for (let i = 0; i < data.length; i += 4) if (Math.abs(data[i] - data[i + 2]) > 60) n += 1;
        return n / (data.length / 4);
    }""")
    assert share == pytest.approx(10 / 16 if view == "by rank" else 0.5, abs=0.05)


def test_steps_of_the_exchanges(page: Opened) -> None:
    tab = page.tab
    assert "6 transfers" in tab.inner_text("#exchanges .panel")
    tab.focus("#exchanges input[type=range]")
    tab.keyboard.press("ArrowRight")
    assert "step 1 of 3" in tab.inner_text("#exchanges .panel") and "3 transfers" in tab.inner_text("#exchanges .panel")
    tab.fill("#exchanges input[type=search]", "no such row")
    assert not tab.query_selector_all("#exchanges tbody tr")


def test_the_timeline(page: Opened) -> None:
    tab = page.tab
    assert "Rank 3 ends last" in tab.inner_text("#timeline .panel")
    tab.click("#timeline >> text=measured")
    assert "Measured: " in tab.inner_text("#timeline .panel")
    tab.click("#timeline th >> text=ends at")
    assert tab.inner_text("#timeline tbody tr:first-child td:first-child") == "3"


def test_lines_and_nodes_are_linked(page: Opened) -> None:
    """From a line of the model to its nodes, and back."""
    tab = page.tab
    tab.click("#code .panes > div:first-child >> text=mixed = scaled_dot_product_attention")
    right = "#code .panes > div:last-child"
    nodes = " ".join(x.inner_text() for x in tab.query_selector_all(f"{right} .chosen"))
    assert "scaled_dot_product_attention" in nodes
    assert "lines of captured.py" in tab.inner_text("#code [role=status]")
    tab.select_option("#code select[aria-label='right stage']", "forward.py")
    tab.fill("#code input[type=search]", "attention_step1")
    tab.click(f"{right} .found >> nth=0")
    chosen = tab.inner_text("#code .panes > div:first-child .chosen")
    assert "scaled_dot_product_attention" in chosen


def test_differences_of_stages(page: Opened) -> None:
    tab = page.tab
    tab.select_option("#code select[aria-label='left stage']", "captured.py")
    tab.select_option("#code select[aria-label='right stage']", "partitioned.py")
    assert "places differ" in tab.inner_text("#code [role=status]")
    tab.click("#code >> text=next difference")
    assert "difference 1 of" in tab.inner_text("#code [role=status]")
    assert tab.query_selector("#code .panes > div:last-child .differs")


def test_gathers_and_boundaries(page: Opened) -> None:
    tab = page.tab
    assert "linalg_qr" in tab.inner_text("#gathers table") and "page_models.py:" in tab.inner_text("#gathers table")
    for name in ("gathers", "boundaries"):
        tab.click(f"#{name} th >> text=bytes")
        assert tab.get_attribute(f"#{name} th:has-text('bytes')", "aria-sort") == "descending"


def test_memory_is_read_with_keys(page: Opened) -> None:
    page.tab.focus("#memory canvas")
    page.tab.keyboard.press("ArrowRight")
    assert "alive" in page.tab.inner_text("#memory .readout")


def test_alternatives_and_proof(page: Opened) -> None:
    assert "ulysses degree 4" in page.tab.inner_text("#alternatives .panel")
    assert "no deadlock" in page.tab.inner_text("#about .panel")
    page.tab.click("#about >> text=copy")


def test_another_graph(page: Opened) -> None:
    """The curve is drawn on its grid."""
    page.tab.select_option("#graph", "1")
    page.tab.wait_for_selector("#tokens svg path")
    assert len(page.tab.query_selector_all("#tokens svg[aria-label^='the curve'] rect")) == 36
    assert "6 × 6" in page.tab.inner_text("#tokens .panel")


def test_colours_can_be_chosen(page: Opened) -> None:
    for name in ("light", "dark", "system"):
        page.tab.click("#theme")
        assert page.tab.inner_text("#theme") == f"Colours: {name}"


def test_all_is_reached_by_keyboard(page: Opened) -> None:
    """Every control and canvas takes the focus by Tab, and shows it."""
    controls = "[...document.querySelectorAll('main button:enabled, main select, main input, main canvas')]"
    now = "document.activeElement"
    wanted = page.tab.evaluate(f"{controls}.length")
    page.tab.evaluate("document.querySelector('.skip').focus()")
    seen: set[int] = set()
    while len(seen) < wanted:
        page.tab.keyboard.press("Tab")
        number, outline = page.tab.evaluate(f"[{controls}.indexOf({now}), getComputedStyle({now}).outlineStyle]")
        if number >= 0:
            assert outline != "none" and number not in seen  # else it came round without the others
            seen.add(number)


def test_terms_are_explained(page: Opened) -> None:
    page.tab.hover("#tiles .term")
    assert page.tab.inner_text("#tip").startswith("tile: a range of queries by a range of keys")


@pytest.mark.slow
def test_size_and_start_of_a_large_page(chromium: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """64 ranks and 32 layers: at most 5 MB, interactive within 3 s."""
    found = explained(Layers(32), 64 * 64, world=64, rank=1, layout="zigzag")
    assert len(found.to_json()) < 2e6
    path = tmp_path / "index.html"
    found.save(path)
    with open_page(chromium, path) as opened:
        ready = opened.tab.evaluate("Number(document.documentElement.dataset.ready)")
        draw_all(opened.tab)
        drawn = opened.tab.evaluate("performance.now()")
        assert opened.complaints == []
    size, times = path.stat().st_size, f"interactive after {ready / 1e3:.2f} s, all drawn after {drawn / 1e3:.2f} s"
    with capsys.disabled():
        print(f"\n64 ranks, 32 layers: {size / 1e6:.2f} MB, {times}")
    assert size <= 5e6 and ready <= 3000
