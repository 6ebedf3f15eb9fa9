"""What each rank sends, receives and computes for one attention site: pure Python, no tensors, any P on one machine.

    >>> from ringpass.layouts.layout import Layout
    >>> from ringpass.schedule.tiles import Problem
    >>> zigzag = Layout("zigzag", 2)
    >>> problem = Problem(mask="k <= q", queries=8, keys=8, query_layout=zigzag, key_layout=zigzag)
    >>> for step in program(problem, rank=1).steps: print(step)
    local tokens 2:6: causal q0:4 k0:4
    receive 0:2 from rank 0, send 2:6 to rank 0: full q0:4 k0:2

Terms: a *tile* is a (query rows, key rows) rectangle of a site, in rows of the local query block and of the received
key block.  A *transfer* names the token ranges that are sent, which may be less than a shard.  A *step* is one incoming
and one outgoing transfer, and the tiles that use the received keys; step 0 uses the local keys.  In step t, rank r
receives from rank r - t and sends to rank r + t (mod P): each step is a matching, and the order of steps is the same on
all ranks.

`tiling` finds the non-empty tiles of all ranks at once, as arrays; `program` reads one rank's steps from it.

Contract (proved by `ringpass.schedule.proof.prove` for all ranks together): each send has its receive, in the same
order on both sides; there is no deadlock; each (query, key) pair that the mask may allow is in exactly one tile; a rank
receives only tokens that its tiles use.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product
from weakref import WeakKeyDictionary

import numpy as np

from ringpass.layouts.ranges import Ranges, size, tokens, union
from ringpass.masks.expr import CAUSAL
from ringpass.masks.intervals import FULL, IntervalArrays
from ringpass.schedule.tiles import (
    CAUSAL_TILE,
    FINEST,
    THIN,
    TILE,
    TILE_KINDS,
    TRIANGLES,
    Problem,
    Tile,
    Tiling,
    tiling,
)

Rectangle = tuple[tuple[int, int], tuple[int, int]]  # half-open rows, half-open columns


@dataclass(frozen=True)
class Transfer:
    """K and V of `tokens` (positions in the layout's order) go from rank `src` to rank `dst`."""

    src: int
    dst: int
    tokens: Ranges

    @property
    def size(self) -> int:
        """Number of tokens that are sent."""
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
class Program:
    """One rank's steps for one site, local keys first."""

    problem: Problem
    rank: int
    steps: tuple[Step, ...]

    @property
    def area(self) -> int:
        """Number of (query, key) pairs in this rank's tiles; of a causal or mirrored tile only its triangle counts."""
        return sum(_area(tile) for step in self.steps for tile in step.tiles)

    @property
    def received(self) -> int:
        """Number of key tokens that this rank receives."""
        return sum(step.receive.size for step in self.steps if step.receive)

    @property
    def empty(self) -> list[Rectangle]:
        """The rectangles (queries, keys), in tokens, that no tile covers and that are therefore not computed."""
        local = self.problem.query_layout.ranges(self.rank, self.problem.queries)
        tiles = [
            (q, k)
            for step in self.steps
            for tile in step.tiles
            for q in tokens(local, tile.q)
            for k in tokens(step.tokens, tile.k)
        ]
        rows = np.unique([edge for span in (*local, *(q for q, _ in tiles)) for edge in span])
        columns = np.unique([0, self.problem.keys, *(edge for _, span in tiles for edge in span)])
        left = np.zeros((len(rows), len(columns)), dtype=bool)
        for where, value in (*(((q, (0, self.problem.keys)), True) for q in local), *((tile, False) for tile in tiles)):
            (q0, q1), (k0, k1) = np.searchsorted(rows, where[0]), np.searchsorted(columns, where[1])
            left[q0:q1, k0:k1] = value
        cells = np.argwhere(left).tolist()
        at, beside = rows.tolist(), columns.tolist()
        return _joined([((at[i], at[i + 1]), (beside[j], beside[j + 1])) for i, j in cells])


_PROGRAMS: WeakKeyDictionary[Tiling, dict[int, Program]] = WeakKeyDictionary()
"""The programs read from a tiling so far, by rank, for as long as the tiling lives."""


def program(problem: Problem, rank: int) -> Program:
    """The steps of `rank` for `problem`; the same object as long as the tiling of `problem` is cached."""
    tiles = tiling(problem)
    programs = _PROGRAMS.setdefault(tiles, {})
    if rank not in programs:
        programs[rank] = _read(tiles, problem, rank)
    return programs[rank]


def _read(tiles: Tiling, problem: Problem, rank: int) -> Program:
    mine, queries = tiles.of(rank), problem.query_layout.ranges(rank, problem.queries)
    local = problem.key_layout.ranges(rank, problem.keys)
    steps = [Step(0, local, _local_tiles(problem, queries, local, _from(mine, rank)))]
    incoming, outgoing = _by_peer(mine.used(), "src"), _by_peer(tiles.serving(rank).used(), "dst")
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


@lru_cache(maxsize=256)
def remote_step(problem: Problem, rank: int) -> Step | None:
    """All keys of other ranks that `rank` uses as one block, ascending, with their tiles; None: it uses none.

    Tiles that touch are one: keys that come together take fewer kernel calls.  Nothing is said of who sends them.

    >>> from ringpass.layouts.layout import Layout
    >>> zigzag = Layout("zigzag", 4)
    >>> for tile in remote_step(Problem("k <= q", 64, 64, zigzag, zigzag), rank=1).tiles: print(tile)
    full q0:8 k0:8
    full q8:16 k0:40
    """
    mine, queries = tiling(problem).of(rank), problem.query_layout.ranges(rank, problem.queries)
    remote = mine.take(mine.src != rank)
    tokens = union(tuple(span for spans in _by_peer(remote.used(), "src").values() for span in spans))
    if not tokens:
        return None
    return Step(1, tokens, _tiles(problem, queries, tokens, remote))


def tiles_between(problem: Problem, rank: int, src: int) -> tuple[Tile, ...]:
    """The tiles of `rank` that use keys of another rank, `src`, as its program has them: readable on every rank."""
    mine, queries = tiling(problem).of(rank), problem.query_layout.ranges(rank, problem.queries)
    return _tiles(problem, queries, _by_peer(mine.used(), "src").get(src, ()), _from(mine, src))


def _from(mine: Tiling, src: int) -> Tiling:
    """The tiles of one rank that use keys of rank `src`."""
    return mine.take(slice(*np.searchsorted(mine.src, (src, src + 1))))


def _by_peer(used: Tiling, side: str) -> dict[int, Ranges]:
    """The ranges of keys, by the rank that they come from (`src`) or go to (`dst`)."""
    out: dict[int, Ranges] = {}
    for peer, start, stop in zip(getattr(used, side).tolist(), *(x.tolist() for x in used.k), strict=True):
        out[peer] = (*out.get(peer, ()), (start, stop))
    return out


def _local_tiles(problem: Problem, queries: Ranges, keys: Ranges, found: Tiling) -> tuple[Tile, ...]:
    if problem.expr == CAUSAL and queries == keys and queries and not problem.cut_all:
        # positions ascend with rows, so a triangle in positions is one in rows
        return (Tile((0, size(queries)), (0, size(keys)), CAUSAL_TILE),)
    return _tiles(problem, queries, keys, found)


def _tiles(problem: Problem, queries: Ranges, block: Ranges, found: Tiling) -> tuple[Tile, ...]:
    """The tiles `found`, in rows of the local queries and of `block`, the tokens of the key block."""
    q, k = _rows(found.q, queries), _rows(found.k, block)
    columns = [x.tolist() for x in (*q, *k, found.kind)]
    tiles = [Tile((a, b), (c, d), TILE_KINDS[kind]) for a, b, c, d, kind in zip(*columns, strict=True)]
    return tuple(tiles) if problem.cut_all else _merge(tiles)


def _rows(spans: IntervalArrays, owned: Ranges) -> IntervalArrays:
    """The rows of `spans`, each inside one range of `owned`, in a block that holds the tokens `owned`."""
    starts = np.array([a for a, _ in owned], dtype=np.int64)
    before = np.concatenate([[0], np.cumsum([b - a for a, b in owned])])[: len(owned)]
    shift = (before - starts)[np.searchsorted(starts, spans[0], side="right") - 1] if len(owned) else spans[0]
    return spans[0] + shift, spans[1] + shift


def _merge(tiles: list[Tile]) -> tuple[Tile, ...]:
    """Joins full tiles that share an edge, so that one kernel launch replaces several."""
    rest = [t for t in tiles if t.kind != FULL]
    joined = _joined([(t.q, t.k) for t in tiles if t.kind == FULL])
    edges = sorted({edge for q, k in joined if FINEST <= q[1] - q[0] <= TILE and k[1] - k[0] <= TILE for edge in q})
    full = [part for rectangle in joined for part in _lengths(*rectangle, edges)]
    return tuple(sorted([*rest, *(Tile(q, k, FULL) for q, k in full)], key=lambda t: (t.q, t.k)))


def _lengths(q: tuple[int, int], k: tuple[int, int], edges: Sequence[int] = ()) -> list[Rectangle]:
    """Splits a thin rectangle into parts of at most TILE: it computes little, but yields results of its full length.

    Its rows are split at `edges`, those of other tiles that it may share a launch with.

    >>> _lengths((500, 2500), (0, 64))
    [((500, 1024), (0, 64)), ((1024, 2048), (0, 64)), ((2048, 2500), (0, 64))]
    >>> _lengths((500, 2500), (0, 64), edges=[0, 1000, 2000])
    [((500, 1000), (0, 64)), ((1000, 2000), (0, 64)), ((2000, 2500), (0, 64))]
    """
    if min(stop - start for start, stop in (q, k)) >= THIN:
        return [(q, k)]
    return list(product(pairwise(_boundaries(q, edges)), pairwise(_boundaries(k, ()))))


def _boundaries(span: tuple[int, int], edges: Sequence[int]) -> list[int]:
    """Where to split a span: at `edges`, which ascend, and parts longer than TILE at multiples of TILE."""
    inside = edges[bisect_right(edges, span[0]) : bisect_left(edges, span[1])]
    parts = pairwise([span[0], *inside, span[1]])
    return [boundary for part in parts for boundary in (part[0], *_multiples(*part))] + [span[1]]


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
    """The tiles of a step in two parts; a single tile that needs no mask is split in the middle of its rows.

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
