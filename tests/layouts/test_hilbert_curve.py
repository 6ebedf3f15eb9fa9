"""The Hilbert curve on rectangles and boxes: neighbours, compactness, names."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from ringpass.layouts.hilbert import Order, curve
from ringpass.layouts.layout import Layout
from tests.support.marks import slow


def steps(sizes: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Distances between neighbours on the curve, in each direction; fails where a cell is not visited once."""
    order = curve(sizes)
    assert np.array_equal(np.sort(order), np.arange(math.prod(sizes)))
    return np.abs(np.diff(np.stack(np.unravel_index(order, sizes), 1), axis=0))


def check_rectangle(sizes: tuple[int, int]) -> None:
    """Unit steps; where the longer side is odd and the shorter one even, parity forbids that, and one is diagonal."""
    found, diagonal = steps(sizes), int(max(sizes) % 2 == 1 and min(sizes) % 2 == 0)
    assert (found.max(initial=0), int((found.sum(1) != 1).sum())) == (int(math.prod(sizes) > 1), diagonal), sizes


def test_every_small_rectangle() -> None:
    for h in range(1, 13):
        for w in range(1, 13):
            check_rectangle((h, w))


def test_rectangles_to_128() -> None:
    drawn = np.random.default_rng(0).integers(1, 129, (40, 2)).tolist()
    for h, w in [(128, 128), (127, 128), (128, 127), (127, 127), (1, 128), (128, 1), (2, 127), (126, 125), *drawn]:
        check_rectangle((h, w))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_every_rectangle_to_128(part: int) -> None:
    for h in range(part + 1, 129, 8):
        for w in range(1, 129):
            check_rectangle((h, w))


@pytest.mark.parametrize("most", [5, slow(12)])
def test_boxes(most: int) -> None:
    """Every cell once; in unit steps where all sides are even."""
    for sizes in np.ndindex(most, most, most):
        found = steps(tuple(n + 1 for n in sizes))
        assert all(n % 2 for n in sizes) <= bool((found.sum(1) == 1).all()), sizes


def test_squares_of_the_classical_curve_are_compact() -> None:
    """Each run of 4^n cells that starts at a multiple of 4^n is a square."""
    cells = np.stack(np.unravel_index(curve((32, 32)), (32, 32)), 1)
    for edge in (2, 4, 8, 16):
        runs = cells.reshape(-1, edge * edge, 2)
        assert (runs.max(1) - runs.min(1) == edge - 1).all()


def test_names() -> None:
    for order in (Order((3, 4)), Order((3, 4), 2), Order((2, 3, 4), 7)):
        assert Order.parse(str(order)) == order
        assert np.array_equal(order.permutation.values[order.inverse.values], np.arange(order.tokens))
        for name in ("contiguous", "zigzag", "chunks 0,1,1,0"):
            layout, plain = Layout(f"{name} along {order}", 2), Layout(name, 2)
            assert layout.order == order and layout.scheme == name and not layout.replicated
            assert [layout.ranges(r, order.tokens) for r in (0, 1)] == [plain.ranges(r, order.tokens) for r in (0, 1)]
