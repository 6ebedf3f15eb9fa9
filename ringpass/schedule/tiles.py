"""The tiles of one attention on all ranks at once, as arrays: which pairs are computed, under which kind of mask.

Terms: a *problem* is one attention as the schedule sees it: a mask, lengths, layouts.  A *tile* is a rectangle of
(query, key) pairs whose mask is full, partial or a triangle.

Contract: each pair that the mask may allow is in exactly one tile; no tile's mask is empty.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from ringpass.layouts.layout import Layout
from ringpass.layouts.ranges import Ranges
from ringpass.masks.constants import Array, ConstantArray
from ringpass.masks.expr import Expr, parse
from ringpass.masks.intervals import EMPTY_CODE, FULL_CODE, KINDS, PARTIAL_CODE, IntervalArrays, classify_all, selected
from ringpass.masks.rewrite import bind
from ringpass.schedule import splitting

CAUSAL_TILE = "causal"  # query row i sees key rows 0..i: the kernels' own causal flag
MIRRORED = "mirrored"  # query row i sees key rows i and after: causal, with all rows in reverse
TRIANGLES = (CAUSAL_TILE, MIRRORED)
TILE = 1024  # default edge, in tokens, of a tile whose mask must be evaluated
FINEST = 64  # edge of the smallest tiles that pay
THIN = TILE // 4  # a full tile narrower than this is at most TILE long, and shares a kernel launch with others
TILE_KINDS = (*KINDS, *TRIANGLES)
CAUSAL_CODE, MIRRORED_CODE = range(len(KINDS), len(TILE_KINDS))  # with the codes of KINDS, indices into TILE_KINDS
TRIMMED = 1 << 17  # with more partial tiles of remote keys than this, their ends are not trimmed to the token
BATCH = 1 << 18  # rectangles classified at once


@dataclass(frozen=True)
class Tile:
    """Query rows `q` (of the local block) x key rows `k` (of the step's key block), half-open.

    `kind`: one of TILE_KINDS, but not empty.
    """

    q: tuple[int, int]
    k: tuple[int, int]
    kind: str

    def __str__(self) -> str:
        return f"{self.kind} q{self.q[0]}:{self.q[1]} k{self.k[0]}:{self.k[1]}"


@dataclass(frozen=True)
class Problem:
    """One site as the schedule sees it.

    `mask` is a boolean expression of `ringpass.masks.expr`; lengths are in tokens.  `cut_all`: no tile may be larger
    than `tile`, full ones included, because the kernel holds a tile's scores in memory.  `constants`: the values of
    some of the mask's leaves, by number.
    """

    mask: str
    queries: int
    keys: int
    query_layout: Layout
    key_layout: Layout
    tile: int = TILE
    cut_all: bool = False
    constants: tuple[tuple[int, ConstantArray], ...] = ()

    @property
    def world(self) -> int:
        """Number of ranks P."""
        return self.query_layout.world

    @property
    def split(self) -> bool:
        """Whether all ranks have all queries, and each attends with them to its own keys alone."""
        return self.query_layout.replicated and not self.key_layout.replicated

    def keys_met(self, rank: int) -> Ranges:
        """The keys that the queries of `rank` may attend to, as far as it computes that."""
        return self.key_layout.ranges(rank, self.keys) if self.split else ((0, self.keys),)

    @cached_property
    def expr(self) -> Expr:
        """`mask` parsed, with the values of `constants` in place of their leaves."""
        return bind(parse(self.mask), dict(self.constants))


@dataclass(frozen=True, eq=False)
class Tiling:
    """The non-empty tiles of a problem on all ranks: arrays of equal length, sorted by (dst, src, q, k).

    Tile i holds queries q[0][i]:q[1][i], of rank dst[i], and keys k[0][i]:k[1][i], of rank src[i], in positions of the
    sequence; kind[i] is an index into TILE_KINDS.
    """

    dst: Array
    src: Array
    q: IntervalArrays
    k: IntervalArrays
    kind: Array

    def __len__(self) -> int:
        return len(self.kind)

    def take(self, where: Array | slice) -> Tiling:
        """The tiles at the indices `where`."""
        q, k = selected(self.q, where), selected(self.k, where)
        return Tiling(self.dst[where], self.src[where], q, k, self.kind[where])

    def of(self, dst: int) -> Tiling:
        """The tiles of the queries of rank `dst`."""
        return self.take(slice(*np.searchsorted(self.dst, (dst, dst + 1))))

    def serving(self, src: int) -> Tiling:
        """The tiles that use keys of rank `src`, sorted by dst."""
        return self.take(self._by_source[slice(*np.searchsorted(self.src[self._by_source], (src, src + 1)))])

    @cached_property
    def _by_source(self) -> Array:
        return np.argsort(self.src, kind="stable")

    @cached_property
    def area(self) -> Array:
        """(n,): number of (query, key) pairs of each tile; of a causal or mirrored tile only its triangle counts."""
        n, m = self.q[1] - self.q[0], self.k[1] - self.k[0]
        pairs: Array = np.where(self.kind >= CAUSAL_CODE, n * (n + 1) // 2, n * m)
        return pairs

    def areas(self, world: int) -> Array:
        """(world,): number of (query, key) pairs in the tiles of each rank."""
        return np.bincount(self.dst, self.area, world)

    def received(self, world: int) -> Array:
        """(world,): number of key tokens that each rank receives."""
        used = self.used()
        remote = used.src != used.dst
        return np.bincount(used.dst[remote], (used.k[1] - used.k[0])[remote], world)

    def used(self) -> Tiling:
        """One entry per (dst, src, interval of keys that tiles use), as a Tiling whose queries and kinds are unused."""
        order = np.lexsort((self.k[0], self.src, self.dst))
        dst, src, start, stop = (x[order] for x in (self.dst, self.src, *self.k))
        pair = np.concatenate([[0], np.cumsum((np.diff(dst) != 0) | (np.diff(src) != 0))])[: len(dst)]
        offset = pair * (int(stop.max(initial=0)) + 1)  # keeps the pairs apart in one running maximum
        reached = np.maximum.accumulate(stop + offset)
        begins = np.concatenate([[True], (start + offset)[1:] > reached[:-1]])[: len(dst)]
        ends = np.concatenate([begins[1:], [True]])[: len(dst)]
        intervals = start[begins], (reached - offset)[ends]
        return Tiling(dst[begins], src[begins], intervals, intervals, np.zeros(int(begins.sum()), np.int8))


@lru_cache(maxsize=64)
def tiling(problem: Problem) -> Tiling:
    """The non-empty tiles of `problem` on all ranks: pairs of chunks, split until each is full, a triangle or small."""
    q, k = chunks(problem.query_layout, problem.queries), chunks(problem.key_layout, problem.keys)
    found = []
    rows_at_once = max(1, BATCH // max(1, len(k[0])))
    for low in range(0, max(1, len(q[0])), rows_at_once):
        some = [x[low : low + rows_at_once] for x in q]
        pairs = [np.repeat(x, len(k[0])) for x in some], [np.tile(x, len(some[0])) for x in k]
        found += _split_up(problem, *_with_ranks(problem, *pairs))
    dst, src, q0, q1, k0, k1, kind = (np.concatenate(x) for x in zip(*found, strict=True))
    remote = np.flatnonzero((kind == PARTIAL_CODE) & (dst != src))
    if len(remote) <= TRIMMED:
        by = q0[remote], q1[remote]
        k0[remote], k1[remote] = _trim(problem.expr, by, (k0[remote], k1[remote]))
        kind[remote] = _kinds(problem, by, (k0[remote], k1[remote]))
    order = np.lexsort((k0, q0, src, dst))
    order = order[kind[order] != EMPTY_CODE]
    return Tiling(dst[order], src[order], (q0[order], q1[order]), (k0[order], k1[order]), kind[order])


def _trim(expr: Expr, q: IntervalArrays, k: IntervalArrays) -> IntervalArrays:
    """The keys of each tile without those at either end that no query sees, found by bisection: they are not sent."""
    start = k[0] + _empty(lambda n: classify_all(expr, q, (k[0], k[0] + n)), k[1] - k[0])
    stop = k[1] - _empty(lambda n: classify_all(expr, q, (k[1] - n, k[1])), k[1] - start)
    return start, stop


def _empty(kind_of_strip: Callable[[Array], Array], width: Array) -> Array:
    """For each tile, the width of the widest strip that is empty, below `width`."""
    low, high = np.zeros_like(width), width
    while (high - low > 1).any():
        middle = np.where(high - low > 1, (low + high) // 2, np.maximum(low, 1))
        empty = kind_of_strip(middle) == EMPTY_CODE
        found = high - low > 1
        low, high = np.where(found & empty, middle, low), np.where(found & ~empty, middle, high)
    return low


def chunks(layout: Layout, tokens: int) -> tuple[Array, Array, Array]:
    """Arrays rank, start, stop of the token ranges of all ranks; a replicated sequence belongs to each rank."""
    spans = [(rank, *span) for rank in range(layout.world) for span in layout.ranges(rank, tokens)]
    table = np.array(spans, dtype=np.int64).reshape(-1, 3)
    return table[:, 0], table[:, 1], table[:, 2]


def _with_ranks(problem: Problem, q: list[Array], k: list[Array]) -> list[Array]:
    """Columns dst, src, q0, q1, k0, k1 of pairs of chunks; what is replicated is local on each rank."""
    pairs = [q[0], k[0], *q[1:], *k[1:]]
    return [x[q[0] == k[0]] for x in pairs] if problem.split or problem.key_layout.replicated else pairs


def _split_up(
    problem: Problem, dst: Array, src: Array, q0: Array, q1: Array, k0: Array, k1: Array
) -> list[list[Array]]:
    """Splits rectangles until all are tiles; returns the columns of the tiles found in each round."""
    found = []
    while True:
        kind = _kinds(problem, (q0, q1), (k0, k1))
        rows, columns, more = _boundaries(problem, (q0, q1), (k0, k1), kind)
        found.append([x[~more & (kind != EMPTY_CODE)] for x in (dst, src, q0, q1, k0, k1, kind)])
        if not more.any():
            return found
        dst, src, q0, q1, k0, k1, rows, columns = (x[more] for x in (dst, src, q0, q1, k0, k1, rows, columns))
        q_end, k_end = np.where(rows >= 0, rows, q1), np.where(rows >= 0, k1, columns)
        dst, src = np.concatenate([dst, dst]), np.concatenate([src, src])
        q0, q1 = np.concatenate([q0, np.where(rows >= 0, rows, q0)]), np.concatenate([q_end, q1])
        k0, k1 = np.concatenate([k0, np.where(rows >= 0, k0, columns)]), np.concatenate([k_end, k1])


def _kinds(problem: Problem, q: IntervalArrays, k: IntervalArrays) -> Array:
    """Indices into TILE_KINDS; where a tile's scores are held in memory, only small tiles are triangles."""
    kind = classify_all(problem.expr, q, k)
    some = np.flatnonzero(kind == PARTIAL_CODE)
    some_q, some_k = selected(q, some), selected(k, some)
    shape = splitting.triangle(problem.expr, some_q, some_k)
    if problem.cut_all:
        shape[(shape == splitting.UPPER) | (some_q[1] - some_q[0] > problem.tile)] = splitting.NONE
    kind[some] = np.choose(shape, (PARTIAL_CODE, CAUSAL_CODE, MIRRORED_CODE))
    return kind


def _boundaries(problem: Problem, q: IntervalArrays, k: IntervalArrays, kind: Array) -> tuple[Array, Array, Array]:
    """Where to split each rectangle, by rows or else by columns (-1: not), and which ones to split."""
    large = np.maximum(q[1] - q[0], k[1] - k[0]) > problem.tile
    rows, columns = np.full(len(kind), -1), np.full(len(kind), -1)
    full = np.flatnonzero((kind == FULL_CODE) & large & problem.cut_all)
    rows[full], columns[full] = splitting.middle(selected(q, full), selected(k, full), problem.tile)
    partial = np.flatnonzero(kind == PARTIAL_CODE)
    rows[partial], columns[partial] = splitting.split(
        problem.expr, selected(q, partial), selected(k, partial), problem.tile
    )
    return rows, columns, (rows >= 0) | (columns >= 0)
