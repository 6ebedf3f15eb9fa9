"""A real browser: headless Chromium, driven by playwright, without a network.

>>> with browser() as chromium, open_page(chromium, path) as page:
...     page.tab.click("text=by token")
...     assert page.complaints == []
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), "")
QUIET = ("background-networking", "component-update", "sync")  # what Chromium would do besides
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", *(f"--disable-{name}" for name in QUIET)]
LOCAL = ("file:", "blob:", "data:")
WIDE, PHONE = (1280, 800), (390, 844)


@dataclass
class Opened:
    """A page in a tab, and what its console complained of, network requests included."""

    tab: Any
    complaints: list[str] = field(default_factory=list)


@contextmanager
def browser() -> Iterator[Any]:
    """Chromium; skips the test where it, or playwright, is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    if not CHROMIUM:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as started:
        yield (chromium := started.chromium.launch(executable_path=CHROMIUM, headless=True, args=ARGUMENTS))
        chromium.close()


@contextmanager
def open_page(chromium: Any, path: Path, size: tuple[int, int] = WIDE, scheme: str = "light") -> Iterator[Opened]:
    """The file in a new tab of this size."""
    screen = {"width": size[0], "height": size[1]}
    tab = chromium.new_page(viewport=screen, color_scheme=scheme, reduced_motion="reduce")  # no scrolling under a click
    opened = Opened(tab)
    tab.on("console", lambda m: opened.complaints.append(m.text) if m.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: opened.complaints.append(str(error)))
    tab.on(
        "request", lambda r: None if r.url.startswith(("file:", "blob:", "data:")) else opened.complaints.append(r.url)
    )
    tab.goto(path.as_uri())
    tab.wait_for_function("document.documentElement.dataset.ready")
    yield opened
    tab.close()


def draw_at_once(tab: Any) -> None:
    """Draws every panel, wherever the page is scrolled to."""
    tab.evaluate("holders.forEach(draw)")
    tab.wait_for_function("holders.every(holder => holder.dataset.drawn === 'yes')")


def draw_all(tab: Any) -> None:
    """Scrolls to every panel and waits until it is drawn."""
    for section in tab.query_selector_all("section"):
        section.scroll_into_view_if_needed()
        holder = section.query_selector(".panel")
        tab.wait_for_function("holder => holder.dataset.drawn === 'yes'", arg=holder)
