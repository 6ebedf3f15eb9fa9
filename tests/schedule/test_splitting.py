"""Where tiles are split: edges and triangles are what they say, and tiles follow a window to the token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringpass.layouts.layout import Layout
from ringpass.masks.evaluate import evaluate
from ringpass.masks.expr import parse
from ringpass.patterns import causal, global_tokens, window
from ringpass.schedule.proof import prove
from ringpass.schedule.splitting import LOWER, UPPER, edges, grids, triangle
from ringpass.schedule.tiles import TILE_KINDS, Problem, tiling

DIAGONALS = "k <= q", "k < q", "q - k < 7", "abs(q - k) <= 5", "k <= q & q - k < 9", "2 * k - 2 * q <= 5"
MASKS = (
    *DIAGONALS, "k <= q | k < 3", "k <= q & k // 8 == q // 8", "k <= q & x0[b, k]", "k >= q + 3 & q >= 4",
    "not(k > q & k >= 6)", "3 * q - 3 * k < 8", "(q - k) % 3 == 0 & k <= q",
)  # fmt: skip


@pytest.mark.parametrize(
    "text, expected",
    [
        ("k <= q & q - k < 4", ["k - q <= 0", "k - q >= -3"]),
        ("abs(q - k) <= 5", ["k - q >= -5", "k - q <= 5"]),
        ("3 * q - 3 * k < 8", ["k - q >= -2"]),
        ("2 * k < 2 * q - 3", ["k - q <= -2"]),
        ("k < 3 | q >= 5", ["k <= 2", "q >= 5"]),
        ("k // 8 == q // 8", []),
        ("x0[b, k] < 3", []),
        ("2 * k <= q", []),
    ],
)
def test_edges_are_read(text: str, expected: list[str]) -> None:
    assert [str(edge) for edge in edges(parse(text))] == expected


def test_grids_are_read() -> None:
    assert grids(parse("(q + 3) // 8 == k // 4 & q // 16 == 0"), "q") == ((16, 0), (8, 3))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(MASKS), st.integers(0, 20), st.integers(0, 20), st.integers(1, 9))
def test_a_triangle_is_one(text: str, q: int, k: int, n: int) -> None:
    """And of masks that are diagonals, every square that is one is found."""
    expr = parse(text)
    shape = int(triangle(expr, *((np.array([at]), np.array([at + n])) for at in (q, k)))[0])
    at = {name: torch.arange(a, a + m).view(*dims) for name, a, m, dims in zip(
        "bhqk", (0, 0, q, k), (2, 1, n, n), ((-1, 1, 1, 1), (1, -1, 1, 1), (1, 1, -1, 1), (1, 1, 1, -1)), strict=True
    )}  # fmt: skip
    kept = torch.arange(2 * 64).view(2, 64) % 5 != 0
    values = evaluate(expr, at, [kept]).to(torch.bool).expand(2, 1, n, n)
    square = torch.ones(n, n, dtype=torch.bool)
    for kind, means in ((LOWER, square.tril()), (UPPER, square.triu())):
        assert shape != kind or bool((values == means).all())
        assert shape == kind or text not in DIAGONALS or n < 3 or not bool((values == means).all())


@pytest.mark.parametrize("before, after", [(700, 0), (700, 700), (100, 900), (2000, 2000)])
@pytest.mark.parametrize("world", [1, 3])
def test_tiles_follow_a_window_to_the_token(before: int, after: int, world: int) -> None:
    """What they compute beyond the window is at most what triangles at the ends of the sequence cannot follow."""
    length, tile = 4096 + 5, 256
    here = Layout("contiguous", world)
    mask = window(before, after) & causal() if after == 0 else window(before, after)
    problem = Problem(str(mask), length, length, here, here, tile)
    tiles = tiling(problem)
    prove(problem)
    q = np.arange(length)
    allowed = (np.minimum(q + after, length - 1) - np.maximum(q - before, 0) + 1).sum()
    assert allowed <= tiles.area.sum() <= allowed + 12 * world * 64 * 256
    assert {TILE_KINDS[kind] for kind in np.unique(tiles.kind)} >= {"full", "causal", "mirrored"}


def test_tiles_follow_rows_and_columns_that_see_all() -> None:
    here = Layout("contiguous", 1)
    mask = window(500, 500) | global_tokens(16)
    problem = Problem(str(mask), 4096, 4096, here, here, 256)
    q, k = np.arange(4096)[:, None], np.arange(4096)
    allowed = ((abs(q - k) <= 500) | (q < 16) | (k < 16)).sum()
    assert allowed <= tiling(problem).area.sum() <= 1.02 * allowed
    prove(problem)
