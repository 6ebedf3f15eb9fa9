"""Where to split a rectangle of (query, key) pairs so that its parts are full, empty or triangles.  No tensors.

    >>> from ringpass.masks.expr import parse
    >>> window = parse("k <= q & q - k < 4")
    >>> for edge in edges(window): print(edge)
    k - q <= 0
    k - q >= -3
    >>> triangle(window, (np.array([8, 8]), np.array([12, 12])), (np.array([8, 5]), np.array([12, 9]))).tolist()
    [1, 2]

Terms: an *edge* of a mask is one of its comparisons that holds on one side of a line: a diagonal k - q = c, a row q = c
or a column k = c.  A *triangle* is a square in which the mask is one diagonal from corner to corner and nothing else:
`LOWER` (row i sees columns 0..i, the kernels' own causal flag) or `UPPER` (row i sees columns i and after, the same
flag with rows and columns in reverse).  A *grid* n + c is a floor division `(q + c) // n`: the mask is made of blocks.

Contract: a square that `triangle` calls a triangle is one, for every batch, head and all data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ringpass.masks.constants import Array
from ringpass.masks.expr import FALSE, TRUE, Call, Const, Expr, Index, K, Q, call, parts, rebuilt
from ringpass.masks.intervals import EMPTY_CODE, FULL_CODE, PARTIAL_CODE, IntervalArrays, classify_all, selected
from ringpass.masks.simplify import linear

NONE, LOWER, UPPER = range(3)
DIAGONAL = "k - q"
SMALLEST = 64  # fewest rows and columns of a rectangle that is split to get a triangle


@dataclass(frozen=True)
class Edge:
    """Holds where `line`, one of k - q, q, k, is at most `bound` (`below`), or at least."""

    line: str
    bound: int
    below: bool
    comparison: Expr

    def __str__(self) -> str:
        return f"{self.line} {'<=' if self.below else '>='} {self.bound}"

    @property
    def boundary(self) -> int:
        """The first row or column behind a row or column edge."""
        return self.bound + 1 if self.below else self.bound


@lru_cache(maxsize=1024)
def edges(expr: Expr) -> tuple[Edge, ...]:
    """The edges of a mask, each once."""
    return tuple(dict.fromkeys(edge for part in _walk(opened(expr)) if (edge := _edge(part)) is not None))


@lru_cache(maxsize=1024)
def grids(expr: Expr, axis: str) -> tuple[tuple[int, int], ...]:
    """(n, c) of each `(axis + c) // n` in `expr`, the coarsest first; `axis` is "q" or "k"."""
    found = []
    for part in _walk(expr):
        if isinstance(part, Call) and part.op == "floordiv" and isinstance(part.args[1], Const):
            terms = linear(part.args[0])
            if terms is not None and {*terms} - {Const(1)} == {Index(axis)} and terms[Index(axis)] == 1:
                found.append((int(part.args[1].value), terms.get(Const(1), 0)))
    return tuple(sorted({*found}, reverse=True))


@lru_cache(maxsize=1024)
def opened(expr: Expr) -> Expr:
    """`expr` with each `abs(x) < c` as two comparisons of x, so that both are edges."""
    if isinstance(expr, Call) and expr.op in ("lt", "le"):
        inner, most = expr.args
        if isinstance(inner, Call) and inner.op == "abs" and isinstance(most, Const) and linear(inner.args[0]):
            return call("and", Call(expr.op, (inner.args[0], most)), Call(expr.op, (call("neg", inner.args[0]), most)))
    return rebuilt(expr, opened)


def _walk(expr: Expr) -> Iterator[Expr]:
    yield expr
    for part in parts(expr):
        yield from _walk(part)


def _edge(expr: Expr) -> Edge | None:
    if not (isinstance(expr, Call) and expr.op in ("lt", "le", "gt", "ge")):
        return None
    terms = linear(call("sub", *expr.args)) or {}
    constant, below, strict = terms.get(Const(1), 0), expr.op in ("lt", "le"), expr.op in ("lt", "gt")
    indices = {*terms} - {Const(1)}
    if indices == {K, Q} and terms[K] == -terms[Q]:
        line, n = DIAGONAL, terms[K]
    elif indices in ({K}, {Q}):
        (index,) = indices
        line, n = str(index), terms[index]
    else:
        return None
    if n < 0:
        n, constant, below = -n, -constant, not below
    # n * line + constant <= 0 (or < 0, >= 0, > 0), in integers
    bound = (-constant - strict) // n if below else -((constant - strict) // n)
    return Edge(line, bound, below, expr)


# --- triangles --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def _forced(expr: Expr, comparison: Expr, value: bool) -> Expr:
    """`expr` with each occurrence of `comparison` replaced by `value`."""

    def force(part: Expr) -> Expr:
        return (TRUE if value else FALSE) if part == comparison else rebuilt(part, force)

    return force(opened(expr))


def alone(expr: Expr, edge: Edge, q: IntervalArrays, k: IntervalArrays) -> Array:
    """(n,) bools: whether, in each rectangle q x k, the mask is `edge` and nothing else."""
    out: Array = classify_all(_forced(expr, edge.comparison, True), q, k) == FULL_CODE
    out[out] = classify_all(_forced(expr, edge.comparison, False), selected(q, out), selected(k, out)) == EMPTY_CODE
    return out


def triangle(expr: Expr, q: IntervalArrays, k: IntervalArrays) -> Array:
    """(n,) of NONE, LOWER or UPPER: which triangle the mask is in each rectangle q x k."""
    out = np.full(len(q[0]), NONE, np.int8)
    for edge in _diagonals(expr):
        fits = (q[1] - q[0] == k[1] - k[0]) & (k[0] - q[0] == edge.bound) & (out == NONE)
        fits[fits] = alone(expr, edge, selected(q, fits), selected(k, fits))
        out[fits] = LOWER if edge.below else UPPER
    return out


def _diagonals(expr: Expr) -> list[Edge]:
    return [edge for edge in edges(expr) if edge.line == DIAGONAL]


# --- splits -----------------------------------------------------------------------------------------------------------


def split(expr: Expr, q: IntervalArrays, k: IntervalArrays, tile: int) -> tuple[Array, Array]:
    """(rows, columns): where to split partial rectangles, by rows or else by columns; -1 where it does not pay.

    larger than a tile   at a row or column edge; a strip of at most `tile` rows (columns) at a diagonal's ends; else
                         columns in the middle, where that leaves a half empty or full or there are few rows; else rows
    as small as a tile   at a row or column edge that leaves a side empty; at the ends of a diagonal that is alone
    """
    n, m = q[1] - q[0], k[1] - k[0]
    large = np.maximum(n, m) > tile
    rows, columns = _straight(expr, q, k, large)
    for edge in _diagonals(expr):
        open_ = (rows < 0) & (columns < 0)
        strip = open_ & large & (np.minimum(n, m) <= tile)
        small = np.flatnonzero(open_ & ~large & (np.minimum(n, m) >= min(SMALLEST, tile // 2)))
        pure = np.zeros_like(strip)
        pure[small] = alone(expr, edge, selected(q, small), selected(k, small))
        across = _inside((q[0] + edge.bound, q[1] + edge.bound), k)
        down = _inside((k[0] - edge.bound, k[1] - edge.bound), q)
        columns = np.where(pure | (strip & (n <= m)), across, columns)
        rows = np.where((columns < 0) & (pure | (strip & (m < n))), down, rows)
    left = np.flatnonzero(large & (rows < 0) & (columns < 0))
    rows[left], columns[left] = _halved(expr, selected(q, left), selected(k, left), tile)
    return rows, columns


def middle(q: IntervalArrays, k: IntervalArrays, tile: int) -> tuple[Array, Array]:
    """(rows, columns): where to split rectangles near the middle of the longer side; -1: not in this direction."""
    tall = q[1] - q[0] >= k[1] - k[0]
    return np.where(tall, _middle(q, tile), -1), np.where(tall, -1, _middle(k, tile))


def _inside(candidates: IntervalArrays, span: IntervalArrays) -> Array:
    """The first of the candidates strictly inside `span`; -1 if none is."""
    out = np.full(len(span[0]), -1)
    for at in candidates:
        out = np.where((out < 0) & (span[0] < at) & (at < span[1]), at, out)
    return out


def _straight(expr: Expr, q: IntervalArrays, k: IntervalArrays, large: Array) -> tuple[Array, Array]:
    """Row and column edges inside the rectangles; in those of a tile's size only where a side is empty."""
    rows, columns = np.full(len(large), -1), np.full(len(large), -1)
    for edge in (edge for edge in edges(expr) if edge.line != DIAGONAL):
        side, out = (q, rows) if edge.line == "q" else (k, columns)
        inside = (side[0] < edge.boundary) & (edge.boundary < side[1]) & (rows < 0) & (columns < 0)
        small = np.flatnonzero(inside & ~large)
        inside[small] = _clears(expr, selected(q, small), selected(k, small), edge)
        out[inside] = edge.boundary
    return rows, columns


def _clears(expr: Expr, q: IntervalArrays, k: IntervalArrays, edge: Edge) -> Array:
    """Whether a split at the row or column `edge` leaves an empty side."""
    out = np.zeros(len(q[0]), dtype=bool)
    start, stop = q if edge.line == "q" else k
    for part in (start, np.full_like(start, edge.boundary)), (np.full_like(start, edge.boundary), stop):
        out |= classify_all(expr, *((part, k) if edge.line == "q" else (q, part))) == EMPTY_CODE
    return out


def _halved(expr: Expr, q: IntervalArrays, k: IntervalArrays, tile: int) -> tuple[Array, Array]:
    """Splits near the middle, rows or else columns."""
    row, column = _middle(q, tile, grids(expr, "q")), _middle(k, tile, grids(expr, "k"))
    wide = k[1] - k[0] > tile
    settled = [classify_all(expr, q, half) != PARTIAL_CODE for half in ((k[0], column), (column, k[1]))]
    by_columns = wide & (settled[0] | settled[1] | (q[1] - q[0] <= tile))
    return np.where(by_columns, -1, row), np.where(by_columns, column, -1)


def _middle(span: IntervalArrays, tile: int, grid: tuple[tuple[int, int], ...] = ()) -> Array:
    """Near the middle: at a grid line inside the span, else at a multiple of `tile`."""
    start, stop = span
    middle, out = (start + stop) // 2, np.full(len(start), -1)
    for n, offset in (*((n * max(1, tile // n), c) for n, c in grid), *grid, (tile, 0)):
        at = (middle + offset + n // 2) // n * n - offset
        out = np.where((out < 0) & (start < at) & (at < stop), at, out)
    return np.where(out < 0, middle, out)
