"""The pictures of docs/page.md and docs/gallery.md, taken of the page in a real browser.

    python -m tests.support.page_pictures               # all
    python -m tests.support.page_pictures gallery       # those whose names begin so

Needs playwright and Chromium.  Each picture is at most LARGEST bytes.
"""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

import ringpass
from ringpass.explain.report import Report
from ringpass.patterns import causal, grid_window, sink, window
from tests.support.browser import PHONE, WIDE, browser, draw_all, open_page
from tests.support.page_models import Layers, explained
from tests.support.repository import ROOT

PICTURES = ROOT / "docs" / "pictures"
LARGEST = 150_000
EAGER = {"compiler": "aot_eager"}


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


def gpt2() -> Report:
    """GPT-2, two layers, over 4,096 tokens."""
    with torch.device("meta"):
        config = GPT2Config(n_positions=4096, n_layer=2, n_embd=128, n_head=4, vocab_size=1000)
        model, ids = GPT2LMHeadModel(config), torch.empty(1, 4096, dtype=torch.long)
    return ringpass.explain(model, world_size=8, options=EAGER, input_ids=ids, labels=ids)


def windowed() -> Report:
    """Two layers that attend to the last 512 tokens and to the first 16."""
    pattern = causal() & (window(512) | sink(16))
    return explained(Layers(2, 64), 4096, world=8, width=64, layout="contiguous", mask=pattern)


def dilated() -> Report:
    """Two layers of dilated attention: segments of 512 tokens, and every 4th token of segments of 2,048."""
    lists: Any = {"segment_lengths": (512, 2048), "dilation_rates": (1, 4)}
    return explained(Layers(2, 64, causal=False), 4096, world=8, width=64, layout="contiguous", **lists)


def vit() -> Report:
    """ViT over 32 x 32 patches and a CLS token, each patch with those at most 3 away, along the Hilbert curve."""
    with torch.device("meta"):
        config = ViTConfig(
            image_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
        )
        model, images = ViTForImageClassification(config), torch.empty(1, 3, 512, 512)
    options = {**EAGER, "hilbert": (32, 32), "mask": grid_window((32, 32), radius=3, skip=1)}
    return ringpass.explain(model, world_size=8, options=options, pixel_values=images, labels=torch.tensor([0]))


def by_token(tab: Any) -> None:
    """The tile map in tokens."""
    tab.click("#tiles >> text=by token")


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
    "gallery_gpt2": (gpt2, "tiles", "light", by_token),
    "gallery_windowed": (windowed, "tiles", "light", by_token),
    "gallery_dilated": (dilated, "tiles", "light", by_token),
    "gallery_vit": (vit, "tiles", "light", by_token),
    "gallery_vit_curve": (vit, "tokens", "light", as_it_is),
}
"""By file name: the report, the panel, the colours, what is clicked before."""


def main() -> None:
    """Takes the pictures whose names begin with the argument; without one, all."""
    begin = sys.argv[1] if len(sys.argv) > 1 else ""
    shots = {name: shot for name, shot in SHOTS.items() if name.startswith(begin)}
    PICTURES.mkdir(exist_ok=True)
    made: dict[Any, Path] = {}
    with tempfile.TemporaryDirectory() as folder, browser() as chromium:
        for name, (make, panel, scheme, act) in shots.items():
            if make not in made:
                made[make] = Path(folder, f"{make.__name__}.html")
                make().save(made[make])
            with open_page(chromium, made[make], WIDE, scheme) as opened:
                draw_all(opened.tab)
                act(opened.tab)
                opened.tab.add_style_tag(content="nav { display: none }")  # it would cover the panel
                opened.tab.wait_for_timeout(300)
                _save(name, opened.tab.locator(f"#{panel}").screenshot())
        for name, size in (("page_wide", WIDE), ("page_phone", PHONE)) if gathering in made else ():
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
