"""The pictures of docs/page.md, taken of the page in a real browser: `python -m tests.support.page_pictures`.

Needs playwright and Chromium.  Each picture is at most LARGEST bytes.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from ringpass.explain.report import Report
from tests.support.browser import PHONE, WIDE, browser, draw_all, open_page
from tests.support.page_models import Layers, explained
from tests.support.repository import ROOT

PICTURES = ROOT / "docs" / "pictures"
LARGEST = 150_000


def gathering() -> Report:
    """Two causal layers in contiguous order, of which the last output is gathered for an op without a rule."""
    model = Layers(2, 64, gathers=True)
    return explained(model, 4096, world=8, rank=7, width=64, layout="contiguous")


def balanced() -> Report:
    """The same layers without that op, in zigzag order."""
    return explained(Layers(2, 64), 4096, world=8, rank=7, width=64, layout="zigzag")


def picture() -> Report:
    """Two layers over 16 x 16 patches and a CLS token, along the Hilbert curve."""
    return explained(Layers(2, 32, causal=False), 257, world=8, rank=1, width=32, hilbert=(16, 16))


def choose_rank(tab: Any) -> None:
    """Rank 7 of the tile map."""
    tab.select_option("#tiles select[aria-label=rank]", "7")


def follow_line(tab: Any) -> None:
    """From the attention's line in the model to its nodes in the forward."""
    tab.select_option("#code select[aria-label='right stage']", "forward.py")
    tab.click("#code .panes > div:first-child >> text=mixed = scaled_dot_product_attention")


def as_it_is(tab: Any) -> None:
    """Nothing is clicked."""


SHOTS: dict[str, tuple[Callable[[], Report], str, str, Callable[[Any], None]]] = {
    "page_verdict": (gathering, "verdict", "light", as_it_is),
    "page_tiles": (gathering, "tiles", "light", choose_rank),
    "page_timeline": (gathering, "timeline", "light", as_it_is),
    "page_timeline_zigzag": (balanced, "timeline", "light", as_it_is),
    "page_code": (gathering, "code", "dark", follow_line),
    "page_gathers": (gathering, "gathers", "light", as_it_is),
    "page_memory": (gathering, "memory", "light", as_it_is),
    "page_curve": (picture, "tokens", "light", as_it_is),
}
"""By file name: the report, the panel, the colours, what is clicked before."""


def main() -> None:
    """Takes all pictures."""
    PICTURES.mkdir(exist_ok=True)
    made: dict[Any, Path] = {}
    with tempfile.TemporaryDirectory() as folder, browser() as chromium:
        for name, (make, panel, scheme, act) in SHOTS.items():
            if make not in made:
                made[make] = Path(folder, f"{make.__name__}.html")
                make().save(made[make])
            with open_page(chromium, made[make], WIDE, scheme) as opened:
                draw_all(opened.tab)
                act(opened.tab)
                opened.tab.add_style_tag(content="nav { display: none }")  # it would cover the panel
                opened.tab.wait_for_timeout(300)
                _save(name, opened.tab.locator(f"#{panel}").screenshot())
        for name, size in (("page_wide", WIDE), ("page_phone", PHONE)):
            with open_page(chromium, made[gathering], size) as opened:
                draw_all(opened.tab)
                opened.tab.evaluate("document.querySelector('#tiles').scrollIntoView({behavior: 'instant'})")
                opened.tab.wait_for_timeout(300)
                _save(name, opened.tab.screenshot())


def _save(name: str, data: bytes) -> None:
    """In 128 colours, which is enough for what the page draws."""
    path = PICTURES / f"{name}.png"
    Image.open(io.BytesIO(data)).convert("RGB").quantize(128).save(path, optimize=True)
    size = path.stat().st_size
    assert size <= LARGEST, f"{path} has {size} bytes"
    print(f"{path.relative_to(ROOT)}: {size} bytes")


if __name__ == "__main__":
    main()
