"""Attention sites made by hand: what a plan would hand to the loop of ring attention."""

from __future__ import annotations

from typing import Any

from ringpass.layouts.layout import Layout
from ringpass.masks.expr import loads, parse
from ringpass.schedule.site import Site
from ringpass.schedule.tiles import TILE, Problem


def site(
    mask: str, tokens: int, layout: str = "contiguous", rank: int = 0, world: int = 1, tile: int = TILE, **about: Any
) -> Site:
    """The site on `rank` of self-attention over `tokens` tokens; `about`: other fields of `Site`."""
    text, learned = about.get("bias", ""), {*about.get("learned", ())}
    holds_scores = bool(about.get("dropout") or about.get("score") or (text and loads(parse(text)) & learned))
    layouts = Layout(layout, world), Layout(layout, world)
    return Site(Problem(mask, tokens, tokens, *layouts, tile, holds_scores), rank, **about)
