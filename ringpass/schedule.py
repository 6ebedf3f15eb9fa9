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

Contract (proved by `ringpass.passes.verify.prove` for all ranks together): each send has its receive, in the same order
on both sides; nothing waits in a circle; each (query, key) pair that the mask may allow is in exactly one tile; a rank
receives only tokens that a tile of its own uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ringpass.layout import Layout, Ranges, size
from ringpass.mask import CAUSAL, EMPTY, FULL, PARTIAL, TRUE, Expr, classify, parse

CAUSAL_TILE = "causal"  # query row i sees key rows 0..i: the kernels' own causal flag
TILE = 1024  # default edge, in tokens, of a tile whose mask must be evaluated


@dataclass(frozen=True)
class Tile:
    """Query rows `q` (of the local block) x key rows `k` (of the step's key block), half-open.

    `kind`: how the mask looks there.
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

    `mask` is a boolean expression of `ringpass.mask`; lengths are in tokens.  `cut_all`: no tile may be larger than
    `tile`, full ones included, because the kernel holds a tile's scores in memory.
    """

    mask: str
    queries: int
    keys: int
    query_layout: Layout
    key_layout: Layout
    tile: int = TILE
    cut_all: bool = False

    @property
    def world(self) -> int:
        return self.query_layout.world

    @property
    def expr(self) -> Expr:
        return parse(self.mask)


@dataclass(frozen=True)
class Program:
    """One rank's steps for one site, the own keys first."""

    problem: Problem
    rank: int
    steps: tuple[Step, ...]

    @property
    def area(self) -> int:
        """Number of (query, key) pairs in this rank's tiles; a causal tile counts its triangle."""
        return sum(_area(tile) for step in self.steps for tile in step.tiles)

    @property
    def received(self) -> int:
        """Number of key tokens that this rank receives."""
        return sum(step.receive.size for step in self.steps if step.receive)


@lru_cache(maxsize=4096)
def program(problem: Problem, rank: int) -> Program:
    """The steps of `rank`.  Cost O(P) in planning, whatever the other ranks do."""
    steps = [Step(0, problem.key_layout.ranges(rank, problem.keys), _local_tiles(problem, rank))]
    queries = problem.query_layout.ranges(rank, problem.queries)
    for shift in range(1, 1 if problem.key_layout.replicated else problem.world):
        src, dst = (rank - shift) % problem.world, (rank + shift) % problem.world
        incoming, outgoing = needed(problem, src, rank), needed(problem, rank, dst)
        if incoming or outgoing:
            steps.append(
                Step(
                    shift,
                    tokens=incoming,
                    tiles=_tiles(problem, queries, problem.key_layout.ranges(src, problem.keys), incoming),
                    receive=Transfer(src, rank, incoming) if incoming else None,
                    send=Transfer(rank, dst, outgoing) if outgoing else None,
                )
            )
    return Program(problem, rank, tuple(steps))


@lru_cache(maxsize=65536)
def needed(problem: Problem, src: int, dst: int) -> Ranges:
    """The tokens of rank `src` whose keys serve a non-empty tile of rank `dst`, ascending."""
    queries = problem.query_layout.ranges(dst, problem.queries)
    keys = problem.key_layout.ranges(src, problem.keys)
    used = sorted({tile[1] for q in queries for k in keys for tile in _split(problem, q, k)})
    out: list[tuple[int, int]] = []
    for start, stop in used:
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(stop, out[-1][1]))
        else:
            out.append((start, stop))
    return tuple(out)


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


def _local_tiles(problem: Problem, rank: int) -> tuple[Tile, ...]:
    queries = problem.query_layout.ranges(rank, problem.queries)
    keys = problem.key_layout.ranges(rank, problem.keys)
    if problem.expr == CAUSAL and queries == keys and queries and not problem.cut_all:
        # positions ascend: the triangle in rows is that in positions
        return (Tile((0, size(queries)), (0, size(keys)), CAUSAL_TILE),)
    return _tiles(problem, queries, keys, keys)


def _tiles(problem: Problem, queries: Ranges, keys: Ranges, block: Ranges) -> tuple[Tile, ...]:
    """Non-empty tiles of `queries` x `keys`, in rows of the local queries and of `block`, the keys that tiles use."""
    found = []
    for q in queries:
        for k in keys:
            for tile_q, tile_k, kind in _split(problem, q, k):
                (local_q,), (local_k,) = rows((tile_q,), queries), rows((tile_k,), block)
                found.append(Tile(local_q, local_k, kind))
    return tuple(found) if problem.cut_all else _merge(found)


@lru_cache(maxsize=65536)
def _split(
    problem: Problem, q: tuple[int, int], k: tuple[int, int]
) -> tuple[tuple[tuple[int, int], tuple[int, int], str], ...]:
    """Cuts the rectangle in halves until each part is full, empty (left out), or no larger than a tile."""
    expr = problem.expr
    kind = FULL if expr == TRUE else classify(expr, q, k)
    if kind == EMPTY:
        return ()
    small = max(q[1] - q[0], k[1] - k[0]) <= problem.tile
    if small or (kind == FULL and not problem.cut_all):
        return ((q, k, CAUSAL_TILE if kind == PARTIAL and expr == CAUSAL and q == k else kind),)
    if q[1] - q[0] >= k[1] - k[0]:
        middle = (q[0] + q[1]) // 2
        return _split(problem, (q[0], middle), k) + _split(problem, (middle, q[1]), k)
    middle = (k[0] + k[1]) // 2
    return _split(problem, q, (k[0], middle)) + _split(problem, q, (middle, k[1]))


def _merge(tiles: list[Tile]) -> tuple[Tile, ...]:
    """Joins full tiles that share an edge: one kernel call instead of several."""
    rest = [t for t in tiles if t.kind != FULL]
    full = _join([(t.q, t.k) for t in tiles if t.kind == FULL])
    full = [(q, k) for k, q in _join([(k, q) for q, k in full])]
    return tuple(sorted([*rest, *(Tile(q, k, FULL) for q, k in full)], key=lambda t: (t.q, t.k)))


Rectangle = tuple[tuple[int, int], tuple[int, int]]


def _join(rectangles: list[Rectangle]) -> list[Rectangle]:
    """Joins rectangles with equal first side whose second sides touch."""
    out: list[Rectangle] = []
    for first, second in sorted(rectangles):
        if out and out[-1][0] == first and out[-1][1][1] == second[0]:
            out[-1] = (first, (out[-1][1][0], second[1]))
        else:
            out.append((first, second))
    return out


def _area(tile: Tile) -> int:
    rows_q, rows_k = tile.q[1] - tile.q[0], tile.k[1] - tile.k[0]
    return rows_q * (rows_q + 1) // 2 if tile.kind == CAUSAL_TILE else rows_q * rows_k


def _text(ranges: Ranges) -> str:
    return "+".join(f"{a}:{b}" for a, b in ranges) or "none"
