"""What each rank sends, receives and computes for one attention site: pure Python, no tensors, any P on one machine.

    >>> zigzag = Layout("zigzag", 2)
    >>> site = Problem(mask="k <= q", queries=8, keys=8, query_layout=zigzag, key_layout=zigzag)
    >>> for step in program(site, rank=1).steps: print(step)
    local tokens 2:6: causal q0:4 k0:4
    receive 0:2 from rank 0, send 2:6 to rank 0: full q0:4 k0:2

Terms: a *tile* is a (query rows, key rows) rectangle of a site, in rows of the local query block and of the received
key block.  A *transfer* names the token ranges that travel, never a whole shard.  A *step* is one transfer in, one
transfer out, and the tiles that the arrived keys serve; step 0 is the rank's own keys.  In step t, rank r receives from
rank r - t and sends to rank r + t (mod P): each step is a matching, and the order of steps is the same on all ranks.

`tiling` finds the non-empty tiles of all ranks at once, as arrays; `program` reads one rank's steps out of it.

Contract (proved by `ringpass.schedule.proof.prove` for all ranks together): each send has its receive, in the same
order on both sides; nothing waits in a circle; each (query, key) pair that the mask may allow is in exactly one tile; a
rank receives only tokens that a tile of its own uses.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringpass.layouts.layout import Layout, Ranges, size, tokens
from ringpass.masks.constants import Known
from ringpass.masks.expr import CAUSAL, FULL, KINDS, Expr, Spans, bind, classify_all, parse
from ringpass.schedule import splitting as cuts

CAUSAL_TILE = "causal"  # query row i sees key rows 0..i: the kernels' own causal flag
MIRRORED = "mirrored"  # query row i sees key rows i and after: the same, with all rows in reverse
TRIANGLES = (CAUSAL_TILE, MIRRORED)
TILE = 1024  # default edge, in tokens, of a tile whose mask must be evaluated
FINEST = 64  # edge of the smallest tiles that pay: for fewer rows no other tile is cut
THIN = TILE // 4  # a full tile narrower than this is no longer than TILE, and shares a kernel call with others
TILE_KINDS = (*KINDS, *TRIANGLES)
_EMPTY, _PARTIAL, _FULL, _CAUSAL, _MIRRORED = range(5)  # indices into TILE_KINDS
TRIMMED = 1 << 17  # tiles of other ranks' keys whose ends are trimmed to the token; more are left as they are
BATCH = 1 << 18  # rectangles classified at once
Array = NDArray[Any]
Rectangle = tuple[tuple[int, int], tuple[int, int]]  # half-open rows, half-open columns


@dataclass(frozen=True)
class Tile:
    """Query rows `q` (of the local block) x key rows `k` (of the step's key block), half-open.

    `kind`: how the mask looks there: one of TILE_KINDS but empty.
    """

    q: tuple[int, int]
    k: tuple[int, int]
    kind: str

    def __str__(self) -> str:
        return f"{self.kind} q{self.q[0]}:{self.q[1]} k{self.k[0]}:{self.k[1]}"


@dataclass(frozen=True)
class Transfer:
    """K and V of `tokens` (of one axis, original order) go from rank `src` to rank `dst`."""

    src: int
    dst: int
    tokens: Ranges

    @property
    def size(self) -> int:
        return size(self.tokens)


@dataclass(frozen=True)
class Step:
    """One exchange and the tiles it serves.

    `tokens` are those of the key block; `shift` is t, the same on both sides.
    """

    shift: int
    tokens: Ranges
    tiles: tuple[Tile, ...]
    receive: Transfer | None = None
    send: Transfer | None = None

    def __str__(self) -> str:
        moves = []
        if self.receive:
            moves.append(f"receive {_text(self.receive.tokens)} from rank {self.receive.src}")
        if self.send:
            moves.append(f"send {_text(self.send.tokens)} to rank {self.send.dst}")
        moved = ", ".join(moves) or f"local tokens {_text(self.tokens)}"
        return f"{moved}: {', '.join(map(str, self.tiles)) or 'no tile'}"


@dataclass(frozen=True)
class Problem:
    """One site as the schedule sees it.

    `mask` is a boolean expression of `ringpass.masks.expr`; lengths are in tokens.  `cut_all`: no tile may be larger
    than `tile`, full ones included, because the kernel holds a tile's scores in memory.  `known`: the values of some of
    the mask's leaves, by number.
    """

    mask: str
    queries: int
    keys: int
    query_layout: Layout
    key_layout: Layout
    tile: int = TILE
    cut_all: bool = False
    known: tuple[tuple[int, Known], ...] = ()

    @property
    def world(self) -> int:
        return self.query_layout.world

    @cached_property
    def expr(self) -> Expr:
        return bind(parse(self.mask), dict(self.known))


@dataclass(frozen=True, eq=False)
class Tiling:
    """The non-empty tiles of a problem on all ranks: arrays of equal length, sorted by (dst, src, q, k).

    Tile i holds queries q[0][i]:q[1][i], of rank dst[i], and keys k[0][i]:k[1][i], of rank src[i], in positions of the
    sequence; kind[i] is an index into TILE_KINDS.
    """

    dst: Array
    src: Array
    q: Spans
    k: Spans
    kind: Array
    programs: dict[int, Program] = field(default_factory=dict)  # those that have been read out of it, by rank

    def __len__(self) -> int:
        return len(self.kind)

    def take(self, where: Array | slice) -> Tiling:
        """The tiles at the indices `where`."""
        q, k = ((x[0][where], x[1][where]) for x in (self.q, self.k))
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
        """(query, key) pairs of each tile; a triangle counts as one."""
        n, m = self.q[1] - self.q[0], self.k[1] - self.k[0]
        pairs: Array = np.where(self.kind >= _CAUSAL, n * (n + 1) // 2, n * m)
        return pairs

    def areas(self, world: int) -> Array:
        """(query, key) pairs of each rank."""
        return np.bincount(self.dst, self.area, world)

    def received(self, world: int) -> Array:
        """Key tokens that each rank receives."""
        runs = self.used()
        remote = runs.src != runs.dst
        return np.bincount(runs.dst[remote], (runs.k[1] - runs.k[0])[remote], world)

    def used(self) -> Tiling:
        """One entry per (dst, src, run of keys that tiles use): their queries and kinds mean nothing."""
        order = np.lexsort((self.k[0], self.src, self.dst))
        dst, src, start, stop = (x[order] for x in (self.dst, self.src, *self.k))
        pair = np.concatenate([[0], np.cumsum((np.diff(dst) != 0) | (np.diff(src) != 0))])[: len(dst)]
        offset = pair * (int(stop.max(initial=0)) + 1)  # keeps the pairs apart in one running maximum
        reached = np.maximum.accumulate(stop + offset)
        begins = np.concatenate([[True], (start + offset)[1:] > reached[:-1]])[: len(dst)]
        ends = np.concatenate([begins[1:], [True]])[: len(dst)]
        runs = start[begins], (reached - offset)[ends]
        return Tiling(dst[begins], src[begins], runs, runs, np.zeros(int(begins.sum()), np.int8))


@dataclass(frozen=True)
class Program:
    """One rank's steps for one site, the own keys first."""

    problem: Problem
    rank: int
    steps: tuple[Step, ...]

    @property
    def area(self) -> int:
        """Number of (query, key) pairs in this rank's tiles; a triangle counts as one."""
        return sum(_area(tile) for step in self.steps for tile in step.tiles)

    @property
    def received(self) -> int:
        """Number of key tokens that this rank receives."""
        return sum(step.receive.size for step in self.steps if step.receive)

    @property
    def empty(self) -> list[Rectangle]:
        """What no tile covers, as (queries, keys) in tokens: not computed, nor sent where nothing else needs it."""
        own = self.problem.query_layout.ranges(self.rank, self.problem.queries)
        tiles = [
            (q, k)
            for step in self.steps
            for tile in step.tiles
            for q in tokens(own, tile.q)
            for k in tokens(step.tokens, tile.k)
        ]
        rows = np.unique([edge for span in (*own, *(q for q, _ in tiles)) for edge in span])
        columns = np.unique([0, self.problem.keys, *(edge for _, span in tiles for edge in span)])
        left = np.zeros((len(rows), len(columns)), dtype=bool)
        for where, value in (*(((q, (0, self.problem.keys)), True) for q in own), *((tile, False) for tile in tiles)):
            (q0, q1), (k0, k1) = np.searchsorted(rows, where[0]), np.searchsorted(columns, where[1])
            left[q0:q1, k0:k1] = value
        cells = np.argwhere(left).tolist()
        at, beside = rows.tolist(), columns.tolist()
        return _joined([((at[i], at[i + 1]), (beside[j], beside[j + 1])) for i, j in cells])


@lru_cache(maxsize=64)
def tiling(problem: Problem) -> Tiling:
    """The non-empty tiles of all ranks: pairs of chunks, cut until each is full, empty, a triangle or small enough."""
    q, k = chunks(problem.query_layout, problem.queries), chunks(problem.key_layout, problem.keys)
    found = []
    rows_at_once = max(1, BATCH // max(1, len(k[0])))
    for low in range(0, max(1, len(q[0])), rows_at_once):
        some = [x[low : low + rows_at_once] for x in q]
        pairs = [np.repeat(x, len(k[0])) for x in some], [np.tile(x, len(some[0])) for x in k]
        found += _cut_up(problem, *_with_ranks(problem, *pairs))
    dst, src, q0, q1, k0, k1, kind = (np.concatenate(x) for x in zip(*found, strict=True))
    remote = np.flatnonzero((kind == _PARTIAL) & (dst != src))
    if len(remote) <= TRIMMED:
        by = q0[remote], q1[remote]
        k0[remote], k1[remote] = _trim(problem.expr, by, (k0[remote], k1[remote]))
        kind[remote] = _kinds(problem, by, (k0[remote], k1[remote]))
    order = np.lexsort((k0, q0, src, dst))
    order = order[kind[order] != _EMPTY]
    return Tiling(dst[order], src[order], (q0[order], q1[order]), (k0[order], k1[order]), kind[order])


def _trim(expr: Expr, q: Spans, k: Spans) -> Spans:
    """The keys of each tile without those at either end that no query sees, by bisection: what is left travels."""
    start = k[0] + _empty(lambda n: classify_all(expr, q, (k[0], k[0] + n)), k[1] - k[0])
    stop = k[1] - _empty(lambda n: classify_all(expr, q, (k[1] - n, k[1])), k[1] - start)
    return start, stop


def _empty(kind_of_strip: Callable[[Array], Array], width: Array) -> Array:
    """For each tile, the width of the widest strip that is empty, below `width`."""
    low, high = np.zeros_like(width), width
    while (high - low > 1).any():
        middle = np.where(high - low > 1, (low + high) // 2, np.maximum(low, 1))
        empty = kind_of_strip(middle) == _EMPTY
        found = high - low > 1
        low, high = np.where(found & empty, middle, low), np.where(found & ~empty, middle, high)
    return low


def chunks(layout: Layout, tokens: int) -> tuple[Array, Array, Array]:
    """(rank, start, stop) of each range of each rank; a replicated sequence belongs to all ranks."""
    spans = [(rank, *span) for rank in range(layout.world) for span in layout.ranges(rank, tokens)]
    table = np.array(spans, dtype=np.int64).reshape(-1, 3)
    return table[:, 0], table[:, 1], table[:, 2]


def _with_ranks(problem: Problem, q: list[Array], k: list[Array]) -> list[Array]:
    """dst, src, q0, q1, k0, k1 of pairs of chunks; replicated keys are each rank's own."""
    pairs = [q[0], k[0], *q[1:], *k[1:]]
    return [x[q[0] == k[0]] for x in pairs] if problem.key_layout.replicated else pairs


def _cut_up(problem: Problem, dst: Array, src: Array, q0: Array, q1: Array, k0: Array, k1: Array) -> list[list[Array]]:
    """Cuts rectangles by `cuts`; returns the columns of the tiles found at each size."""
    found = []
    while True:
        kind = _kinds(problem, (q0, q1), (k0, k1))
        rows, columns, more = _cuts(problem, (q0, q1), (k0, k1), kind)
        found.append([x[~more & (kind != _EMPTY)] for x in (dst, src, q0, q1, k0, k1, kind)])
        if not more.any():
            return found
        dst, src, q0, q1, k0, k1, rows, columns = (x[more] for x in (dst, src, q0, q1, k0, k1, rows, columns))
        q_end, k_end = np.where(rows >= 0, rows, q1), np.where(rows >= 0, k1, columns)
        dst, src = np.concatenate([dst, dst]), np.concatenate([src, src])
        q0, q1 = np.concatenate([q0, np.where(rows >= 0, rows, q0)]), np.concatenate([q_end, q1])
        k0, k1 = np.concatenate([k0, np.where(rows >= 0, k0, columns)]), np.concatenate([k_end, k1])


def _kinds(problem: Problem, q: Spans, k: Spans) -> Array:
    """Indices into TILE_KINDS; where the scores of a tile stay in memory, only small tiles are triangles."""
    kind = classify_all(problem.expr, q, k)
    some = np.flatnonzero(kind == _PARTIAL)
    some_q, some_k = _some(q, some), _some(k, some)
    shape = cuts.triangle(problem.expr, some_q, some_k)
    if problem.cut_all:
        shape[(shape == cuts.UPPER) | (some_q[1] - some_q[0] > problem.tile)] = cuts.NONE
    kind[some] = np.choose(shape, (_PARTIAL, _CAUSAL, _MIRRORED))
    return kind


def _cuts(problem: Problem, q: Spans, k: Spans, kind: Array) -> tuple[Array, Array, Array]:
    """Where to cut each rectangle, by rows or else by columns (-1: not), and which ones."""
    large = np.maximum(q[1] - q[0], k[1] - k[0]) > problem.tile
    rows, columns = np.full(len(kind), -1), np.full(len(kind), -1)
    whole = np.flatnonzero((kind == _FULL) & large & problem.cut_all)
    rows[whole], columns[whole] = cuts.middle(_some(q, whole), _some(k, whole), problem.tile)
    through = np.flatnonzero(kind == _PARTIAL)
    rows[through], columns[through] = cuts.cut(problem.expr, _some(q, through), _some(k, through), problem.tile)
    return rows, columns, (rows >= 0) | (columns >= 0)


def _some(spans: Spans, where: Array) -> Spans:
    return spans[0][where], spans[1][where]


def halves(q: Spans, k: Spans) -> tuple[Spans, Spans]:
    """Rectangles cut in two in the middle of their longer side: the first halves of all, then the second ones."""
    tall = q[1] - q[0] >= k[1] - k[0]
    q_cut, k_cut = (q[0] + q[1]) // 2, (k[0] + k[1]) // 2
    rows = np.concatenate([q[0], np.where(tall, q_cut, q[0])]), np.concatenate([np.where(tall, q_cut, q[1]), q[1]])
    columns = np.concatenate([k[0], np.where(tall, k[0], k_cut)]), np.concatenate([np.where(tall, k[1], k_cut), k[1]])
    return rows, columns


def program(problem: Problem, rank: int) -> Program:
    """The steps of `rank`."""
    whole = tiling(problem)
    if rank not in whole.programs:
        whole.programs[rank] = _read(whole, problem, rank)
    return whole.programs[rank]


def _read(whole: Tiling, problem: Problem, rank: int) -> Program:
    mine, queries = whole.of(rank), problem.query_layout.ranges(rank, problem.queries)
    own = problem.key_layout.ranges(rank, problem.keys)
    steps = [Step(0, own, _local_tiles(problem, queries, own, _from(mine, rank)))]
    incoming, outgoing = _by_peer(mine.used(), "src"), _by_peer(whole.serving(rank).used(), "dst")
    for shift in range(1, problem.world):
        src, dst = (rank - shift) % problem.world, (rank + shift) % problem.world
        receives, sends = incoming.get(src, ()), outgoing.get(dst, ())
        if receives or sends:
            steps.append(
                Step(
                    shift,
                    tokens=receives,
                    tiles=_tiles(problem, queries, receives, _from(mine, src)),
                    receive=Transfer(src, rank, receives) if receives else None,
                    send=Transfer(rank, dst, sends) if sends else None,
                )
            )
    return Program(problem, rank, tuple(steps))


def _from(mine: Tiling, src: int) -> Tiling:
    """Those of one rank's tiles whose keys are those of `src`."""
    return mine.take(slice(*np.searchsorted(mine.src, (src, src + 1))))


def _by_peer(used: Tiling, side: str) -> dict[int, Ranges]:
    """The runs of keys, by the rank that they come from (`src`) or go to (`dst`)."""
    out: dict[int, Ranges] = {}
    for peer, start, stop in zip(getattr(used, side).tolist(), *(x.tolist() for x in used.k), strict=True):
        out[peer] = (*out.get(peer, ()), (start, stop))
    return out


def rows(ranges: Ranges, owned: Ranges) -> Ranges:
    """Where the tokens `ranges` stand in a block that holds the tokens `owned`.

    >>> rows(((8, 9),), owned=((0, 3), (8, 10)))
    ((3, 4),)
    """
    out, offset = [], 0
    for start, stop in owned:
        for a, b in ranges:
            low, high = max(a, start), min(b, stop)
            if low < high:
                out.append((offset + low - start, offset + high - start))
        offset += stop - start
    assert size(tuple(out)) == size(ranges), (ranges, owned)
    return tuple(out)


def _local_tiles(problem: Problem, queries: Ranges, keys: Ranges, found: Tiling) -> tuple[Tile, ...]:
    if problem.expr == CAUSAL and queries == keys and queries and not problem.cut_all:
        # positions ascend: the triangle in rows is that in positions
        return (Tile((0, size(queries)), (0, size(keys)), CAUSAL_TILE),)
    return _tiles(problem, queries, keys, found)


def _tiles(problem: Problem, queries: Ranges, block: Ranges, found: Tiling) -> tuple[Tile, ...]:
    """The tiles `found` in rows of the local queries and of `block`, the keys that they use."""
    q, k = _rows(found.q, queries), _rows(found.k, block)
    columns = [x.tolist() for x in (*q, *k, found.kind)]
    tiles = [Tile((a, b), (c, d), TILE_KINDS[kind]) for a, b, c, d, kind in zip(*columns, strict=True)]
    return tuple(tiles) if problem.cut_all else _merge(tiles)


def _rows(spans: Spans, owned: Ranges) -> Spans:
    """Where each of `spans`, each inside one range of `owned`, stands in a block that holds the tokens `owned`."""
    starts = np.array([a for a, _ in owned], dtype=np.int64)
    before = np.concatenate([[0], np.cumsum([b - a for a, b in owned])])[: len(owned)]
    shift = (before - starts)[np.searchsorted(starts, spans[0], side="right") - 1] if len(owned) else spans[0]
    return spans[0] + shift, spans[1] + shift


def _merge(tiles: list[Tile]) -> tuple[Tile, ...]:
    """Joins full tiles that share an edge: one kernel call instead of several."""
    rest = [t for t in tiles if t.kind != FULL]
    whole = _joined([(t.q, t.k) for t in tiles if t.kind == FULL])
    edges = sorted({edge for q, k in whole if FINEST <= q[1] - q[0] <= TILE and k[1] - k[0] <= TILE for edge in q})
    full = [part for rectangle in whole for part in _lengths(*rectangle, edges)]
    return tuple(sorted([*rest, *(Tile(q, k, FULL) for q, k in full)], key=lambda t: (t.q, t.k)))


def _lengths(q: tuple[int, int], k: tuple[int, int], edges: Sequence[int] = ()) -> list[Rectangle]:
    """A thin rectangle in parts of at most TILE: for the little that it computes, it gives all of its length.

    Its rows are cut at `edges`, those of other tiles that it may share a call with.

    >>> _lengths((500, 2500), (0, 64))
    [((500, 1024), (0, 64)), ((1024, 2048), (0, 64)), ((2048, 2500), (0, 64))]
    >>> _lengths((500, 2500), (0, 64), edges=[0, 1000, 2000])
    [((500, 1000), (0, 64)), ((1000, 2000), (0, 64)), ((2000, 2500), (0, 64))]
    """
    if min(stop - start for start, stop in (q, k)) >= THIN:
        return [(q, k)]
    return list(product(pairwise(_cut_at(q, edges)), pairwise(_cut_at(k, ()))))


def _cut_at(span: tuple[int, int], edges: Sequence[int]) -> list[int]:
    """Where to cut a span: at `edges`, which ascend, and what is still longer than TILE at its multiples."""
    inside = edges[bisect_right(edges, span[0]) : bisect_left(edges, span[1])]
    parts = pairwise([span[0], *inside, span[1]])
    return [cut for part in parts for cut in (part[0], *_multiples(*part))] + [span[1]]


def _multiples(start: int, stop: int) -> range:
    return range(start // TILE * TILE + TILE, stop, TILE) if stop - start > TILE else range(0)


def _joined(rectangles: list[Rectangle]) -> list[Rectangle]:
    """Joins rectangles that share an edge: side by side first, then one above the other."""
    wide = _join(rectangles)
    return sorted((q, k) for k, q in _join([(k, q) for q, k in wide]))


def _join(rectangles: list[Rectangle]) -> list[Rectangle]:
    """Joins rectangles with equal first side whose second sides touch."""
    out: list[Rectangle] = []
    for first, second in sorted(rectangles):
        if out and out[-1][0] == first and out[-1][1][1] == second[0]:
            out[-1] = (first, (out[-1][1][0], second[1]))
        else:
            out.append((first, second))
    return out


def divided(tiles: tuple[Tile, ...]) -> tuple[tuple[Tile, ...], tuple[Tile, ...]]:
    """The tiles of a step in two parts; a tile that is alone and needs no mask is cut in the middle of its rows.

    >>> for part in divided((Tile((0, 8), (0, 8), CAUSAL_TILE),)): print(*part, sep="; ")
    causal q0:4 k0:4
    full q4:8 k0:4; causal q4:8 k4:8
    """
    if len(tiles) != 1 or tiles[0].kind not in (FULL, CAUSAL_TILE):
        return tiles[: len(tiles) // 2], tiles[len(tiles) // 2 :]
    ((q0, q1), (k0, k1)), kind = (tiles[0].q, tiles[0].k), tiles[0].kind
    q = (q0 + q1) // 2
    if q == q0:
        return tiles, ()
    if kind == FULL:
        return (Tile((q0, q), (k0, k1), FULL),), (Tile((q, q1), (k0, k1), FULL),)
    k = k0 + q - q0  # a triangle: a smaller one above, a rectangle beside another below
    return (Tile((q0, q), (k0, k), kind),), (Tile((q, q1), (k0, k), FULL), Tile((q, q1), (k, k1), kind))


def _area(tile: Tile) -> int:
    rows_q, rows_k = tile.q[1] - tile.q[0], tile.k[1] - tile.k[0]
    return rows_q * (rows_q + 1) // 2 if tile.kind in TRIANGLES else rows_q * rows_k


def _text(ranges: Ranges) -> str:
    return "+".join(f"{a}:{b}" for a, b in ranges) or "none"
