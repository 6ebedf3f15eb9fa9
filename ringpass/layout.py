"""Token -> rank maps.

    >>> Layout("zigzag", world=2).ranges(rank=0, tokens=10)
    ((0, 3), (8, 10))
    >>> Layout("contiguous", world=2).ranges(rank=1, tokens=5)
    ((3, 5),)

A layout cuts S tokens into n chunks of near-equal size (the first S mod n chunks are one token longer) and gives each
rank some of them, in ascending order.

    contiguous       n = P, rank r holds chunk r
    zigzag           n = 2P, rank r holds chunks r and 2P-1-r, which balances causal attention
    striped          n = 8P, rank r holds every P-th chunk from r on
    chunks 0,1,1,0   as many chunks as numbers, each held by the rank of that number
    chunked          n = P, as torch.chunk and DTensor cut: all chunks equal, but for the last ones that hold any
    replicated       every rank holds all tokens

`zigzag along hilbert 14x14 after 1`: the tokens are in the order of that curve (`ringpass.hilbert`) before they are cut
into chunks.  Ranges, and all schedules made of them, then speak of places along the curve.

`zigzag every 2/1 of 8 of 16`: of the 16 tokens of that layout, those of a residue class alone (`ringpass.residue`),
counted 0, 1, 2 ..; ranges speak of these numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from typing import Any

from ringpass.hilbert import Order
from ringpass.residue import Residue

Ranges = tuple[tuple[int, int], ...]  # half-open token ranges, ascending

NAMES = ("contiguous", "zigzag", "striped", "replicated")
STRIPES = 8  # chunks of each rank in the striped layout
ASSIGNED, ALONG, EVERY = "chunks ", " along ", " every "
CHUNKED = "chunked"  # of tensors that come and go, never of a plan


@dataclass(frozen=True)
class Layout:
    """Where each token of one sequence axis lives.  `world` is the number of ranks P."""

    name: str
    world: int

    def __post_init__(self) -> None:
        assert self.map in (*NAMES, CHUNKED) or self.map.startswith(ASSIGNED), self.name

    @property
    def map(self) -> str:
        """The name without the order and the residue class."""
        return self.name.partition(EVERY)[0].partition(ALONG)[0]

    @property
    def order(self) -> Order | None:
        """The curve along which the tokens are; None: their own order."""
        text = self.name.partition(EVERY)[0].partition(ALONG)[2]
        return Order.parse(text) if text else None

    @property
    def whole(self) -> Layout:
        """That of all tokens, where only those of a residue class count."""
        return replace(self, name=self.name.partition(EVERY)[0])

    @property
    def residue(self) -> Residue | None:
        """The tokens that count; None: all."""
        text = self.name.partition(EVERY)[2]
        return Residue.parse(text) if text else None

    @property
    def replicated(self) -> bool:
        return self.map == "replicated"

    @property
    def chunks(self) -> int:
        if self.map.startswith(ASSIGNED):
            return len(_owners(self.map))
        per_rank = {"contiguous": 1, "zigzag": 2, "striped": STRIPES, CHUNKED: 1}
        return 1 if self.replicated else per_rank[self.map] * self.world

    def owned(self, rank: int) -> tuple[int, ...]:
        """The chunks that `rank` holds, ascending."""
        if self.map == "zigzag":
            return (rank, 2 * self.world - 1 - rank)
        if self.map == "striped":
            return tuple(range(rank, self.chunks, self.world))
        if self.map.startswith(ASSIGNED):
            return tuple(chunk for chunk, owner in enumerate(_owners(self.map)) if owner == rank)
        return (0,) if self.replicated else (rank,)

    def length(self, rank: int, tokens: Any) -> Any:
        """Number of local tokens L.  `tokens` may be an int, a SymInt or an fx Proxy: only `+` and `//` are used."""
        if self.replicated:
            return tokens
        if self.map == CHUNKED:
            return size(self.ranges(rank, tokens))
        n = self.chunks
        return reduce(operator.add, [(tokens + (n - 1 - chunk)) // n for chunk in self.owned(rank)] or [0])

    def ranges(self, rank: int, tokens: int) -> Ranges:
        """Token ranges of `rank` in ascending order; neighbouring and empty ones are joined."""
        if self.residue:
            assert tokens == self.residue.length, (tokens, self.residue)
            whole = self.whole.ranges(rank, self.residue.tokens)
            found = [(self.residue.before(a), self.residue.before(b)) for a, b in whole]
            return tuple((a, b) for a, b in found if a < b)
        out: list[tuple[int, int]] = []
        for chunk in self.owned(rank):
            start, stop = self._start(chunk, tokens), self._start(chunk + 1, tokens)
            if out and out[-1][1] == start:
                out[-1] = (out[-1][0], stop)
            elif start < stop:
                out.append((start, stop))
        return tuple(out)

    def _start(self, chunk: int, tokens: int) -> int:
        if self.map == CHUNKED:
            return min(chunk * -(-tokens // self.chunks), tokens)
        size, longer = divmod(tokens, self.chunks)
        return chunk * size + min(chunk, longer)


def assigned(owners: Sequence[int]) -> str:
    """The name of the layout whose chunk i is held by rank `owners[i]`."""
    return ASSIGNED + ",".join(map(str, owners))


def following(name: str, order: Order | None) -> str:
    """The layout `name` of tokens that are in `order`."""
    return f"{name}{ALONG}{order}" if order else name


def sieved(name: str, residue: Residue | None) -> str:
    """The layout `name` of the tokens in `residue` alone."""
    return f"{name}{EVERY}{residue}" if residue else name


@lru_cache(maxsize=256)
def _owners(name: str) -> tuple[int, ...]:
    return tuple(int(n) for n in name.removeprefix(ASSIGNED).split(","))


def size(ranges: Ranges) -> int:
    """Number of tokens in `ranges`."""
    return sum(stop - start for start, stop in ranges)


def tokens(ranges: Ranges, rows: tuple[int, int]) -> Ranges:
    """The tokens that stand in `rows` of a block that holds `ranges`.

    >>> tokens(((0, 3), (8, 10)), rows=(2, 4))
    ((2, 3), (8, 9))
    """
    out, offset = [], 0
    for start, stop in ranges:
        low, high = max(rows[0] - offset, 0) + start, min(rows[1] - offset, stop - start) + start
        out += [(low, high)] if low < high else []
        offset += stop - start
    return tuple(out)
