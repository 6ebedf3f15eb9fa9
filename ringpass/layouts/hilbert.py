"""The generalised Hilbert curve over any rectangle or box: neighbours on the grid stay close in the sequence.

    >>> curve((2, 3))                                  # row-major numbers of the cells, in the order of the curve
    array([0, 1, 3, 4, 5, 2])
    >>> order = Order((2, 3), prefix=1)
    >>> str(order), order.tokens                       # a CLS token stays in front of the grid
    ('hilbert 2x3 after 1', 7)
    >>> order.permutation.values
    array([0, 1, 2, 4, 5, 6, 3])

The curve starts in a corner.  A box that is long in one direction is split across it; others are split like Hilbert's
curve: two sides and the base between them (J. Cerveny, "gilbert").  Splits fall on even lengths, so that each part ends
next to the start of the following one.  Every cell is visited once, in unit steps, except for

    (H, W)       one diagonal step where the longer side is odd and the shorter one even
    (T, H, W)    some longer steps where a side is odd
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ringpass.masks.constants import Array, ConstantArray

NAME = re.compile(r"hilbert (\d+(?:x\d+)+)(?: after (\d+))?")


@dataclass(frozen=True)
class Order:
    """The curve order of a sequence: `prefix` tokens, which stay in front, then a grid in row-major order."""

    sizes: tuple[int, ...]
    prefix: int = 0

    def __str__(self) -> str:
        grid = "x".join(map(str, self.sizes))
        return f"hilbert {grid}{f' after {self.prefix}' if self.prefix else ''}"

    @staticmethod
    def parse(text: str) -> Order:
        """The order that `str` wrote."""
        match = NAME.fullmatch(text)
        assert match, text
        return Order(tuple(map(int, match[1].split("x"))), int(match[2] or 0))

    @property
    def tokens(self) -> int:
        """Number of tokens, prefix included."""
        return self.prefix + math.prod(self.sizes)

    @property
    def permutation(self) -> ConstantArray:
        """The token at each curve position."""
        return _permutations(self)[0]

    @property
    def inverse(self) -> ConstantArray:
        """The curve position of each token."""
        return _permutations(self)[1]


@lru_cache(maxsize=16)
def _permutations(order: Order) -> tuple[ConstantArray, ConstantArray]:
    tokens = np.concatenate([np.arange(order.prefix), order.prefix + curve(order.sizes)])
    return ConstantArray(tokens), ConstantArray(np.argsort(tokens))


def curve(sizes: tuple[int, ...]) -> Array:
    """Row-major numbers of the cells of a grid of two or three sizes, in the order of the curve."""
    assert 2 <= len(sizes) <= 3 and min(sizes) >= 1, sizes
    box = (1,) * (3 - len(sizes)) + tuple(sizes)
    cells = np.empty((math.prod(box), 3), dtype=np.int64)
    boxes = _grid(box)
    while len(boxes.start):
        flat = (boxes.sides == 1).sum(1) >= 2
        _walk(boxes.take(flat), cells)
        boxes = _split(boxes.take(~flat))
    return np.asarray(np.ravel_multi_index(tuple(cells.T), box))


# --- boxes: many at once ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Boxes:
    """N boxes: the curve position where each one starts, its first corner, and its edges a, b and c from there.

    The curve runs from the corner to the other end of edge a.  `edges` is (N, 3, 3): which edge, which direction.
    """

    start: Array
    corner: Array
    edges: Array

    @property
    def sides(self) -> Array:
        """(N, 3): the lengths of a, b and c."""
        lengths: Array = np.abs(self.edges).sum(2)
        return lengths

    def take(self, where: Array) -> Boxes:
        """The boxes at which `where` (N,) is True."""
        return Boxes(self.start[where], self.corner[where], self.edges[where])


def _grid(box: tuple[int, ...]) -> Boxes:
    """The whole grid as one box, edge a along its longest side; of equal sides, the fastest in row-major order."""
    longest = max(range(3), key=lambda i: (box[i], i))
    sides = [longest, *sorted(set(range(3)) - {longest}, reverse=True)]
    return Boxes(np.zeros(1, np.int64), np.zeros((1, 3), np.int64), np.diag(box)[sides][None])


def _walk(lines: Boxes, cells: Array) -> None:
    """Writes the cells of boxes with one edge of more than one cell: straight lines."""
    length = lines.sides.prod(1)
    longest = lines.edges[np.arange(len(length)), lines.sides.argmax(1)]
    line = np.repeat(np.arange(len(length)), length)
    step = np.arange(len(line)) - np.repeat(np.cumsum(length) - length, length)
    cells[lines.start[line] + step] = lines.corner[line] + step[:, None] * np.sign(longest)[line]


def _split(boxes: Boxes) -> Boxes:
    """The parts of each box."""
    parts = []
    for where, shapes in _shapes(boxes):
        start = boxes.start[where]
        for corner, *edges in shapes:
            part = Boxes(start, boxes.corner[where] + corner[where], np.stack(edges, 1)[where])
            start = start + part.sides.prod(1)
            parts.append(part.take(part.sides.prod(1) > 0))
    fields = [np.concatenate([getattr(p, name) for p in parts]) for name in ("start", "corner", "edges")]
    return Boxes(*fields)


def _shapes(boxes: Boxes) -> Iterator[tuple[Array, list[tuple[Array, ...]]]]:
    """(which boxes, their parts in order); a part is its corner, relative to the box's, and its three edges."""
    a, b, c = (boxes.edges[:, i] for i in range(3))
    w, h, d = boxes.sides.T
    a1, b1, c1 = np.sign(a), np.sign(b), np.sign(c)
    a2, b2, c2 = _half(a, w), _half(b, h), _half(c, d)
    nothing = np.zeros_like(a)
    long = (2 * w > 3 * h) & (2 * w > 3 * d)
    flat, thin = ~long & (3 * h > 4 * d), ~long & (3 * d > 4 * h)
    yield long, [(nothing, a2, b, c), (a2, a - a2, b, c)]
    yield flat, [(nothing, b2, c, a2), (b2, a, b - b2, c), (a - a1 + b2 - b1, -b2, c, a2 - a)]
    yield thin, [(nothing, c2, a2, b), (c2, a, b, c - c2), (a - a1 + c2 - c1, -c2, a2 - a, b)]
    yield (
        ~(long | flat | thin),
        [
            (nothing, b2, c2, a2),
            (b2, c, a2, b - b2),
            (b2 - b1 + c - c1, a, -b2, c2 - c),
            (a - a1 + b2 + c - c1, -c, a2 - a, b - b2),
            (a - a1 + b2 - b1, -b2, c2, a2 - a),
        ],
    )


def _half(edge: Array, length: Array) -> Array:
    """Half of each edge, of even length where possible."""
    half = edge // 2
    odd = (np.abs(half).sum(1) % 2 == 1) & (length > 2)
    return half + np.where(odd[:, None], np.sign(edge), 0)
