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

`zigzag cut 77,-1`: the first 77 tokens, the last, and those between are dealt out each by itself, as for a text and
an image that stand in one sequence, so that a run of tokens from cut to cut is in a layout of the same kind.  A
piece of fewer than 8 tokens, or 2P (CLS, what a convolution pads), is not divided: the rank of the chunk before it
holds it, or, at the start, of that after.

`zigzag along hilbert 14x14 after 1`: the tokens are in the order of that curve (`ringpass.layouts.hilbert`) before they
are cut into chunks.  Ranges, and all schedules made of them, then speak of places along the curve.

`zigzag every 2/1 of 8 of 16`: of the 16 tokens of that layout, those of a residue class alone
(`ringpass.layouts.strided`), counted 0, 1, 2 ..; ranges speak of these numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from itertools import pairwise
from typing import Any

from ringpass.layouts.hilbert import Order
from ringpass.layouts.ranges import Ranges, size
from ringpass.layouts.strided import StridedSegments

NAMES = ("contiguous", "zigzag", "striped", "replicated")
STRIPES = 8  # chunks of each rank in the striped layout
ASSIGNED, CUT, ALONG, EVERY = "chunks ", " cut ", " along ", " every "
CHUNKED = "chunked"  # of tensors that come and go, never of a plan


@dataclass(frozen=True)
class Layout:
    """Where each token of one sequence axis lives.  `world` is the number of ranks P."""

    name: str
    world: int

    def __post_init__(self) -> None:
        assert self.scheme in (*NAMES, CHUNKED) or self.scheme.startswith(ASSIGNED), self.name

    @property
    def assignment(self) -> str:
        """The name without the order and the residue class: how places are dealt out."""
        return self.name.partition(EVERY)[0].partition(ALONG)[0]

    @property
    def scheme(self) -> str:
        """How each piece is dealt out."""
        return self.assignment.partition(CUT)[0]

    @property
    def split_points(self) -> tuple[int, ...]:
        """Between which tokens the sequence is in pieces, ascending; counted from the end where they are negative."""
        text = self.assignment.partition(CUT)[2]
        return tuple(int(n) for n in text.split(",")) if text else ()

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
    def strided(self) -> StridedSegments | None:
        """The tokens that count; None: all."""
        text = self.name.partition(EVERY)[2]
        return StridedSegments.parse(text) if text else None

    @property
    def replicated(self) -> bool:
        return self.scheme == "replicated"

    @property
    def chunks(self) -> int:
        if self.scheme.startswith(ASSIGNED):
            return len(_owners(self.scheme))
        per_rank = {"contiguous": 1, "zigzag": 2, "striped": STRIPES, CHUNKED: 1}
        return 1 if self.replicated else per_rank[self.scheme] * self.world

    def owned(self, rank: int) -> tuple[int, ...]:
        """The chunks that `rank` holds, ascending."""
        if self.scheme == "zigzag":
            return (rank, 2 * self.world - 1 - rank)
        if self.scheme == "striped":
            return tuple(range(rank, self.chunks, self.world))
        if self.scheme.startswith(ASSIGNED):
            return tuple(chunk for chunk, owner in enumerate(_owners(self.scheme)) if owner == rank)
        return (0,) if self.replicated else (rank,)

    def length(self, rank: int, tokens: Any) -> Any:
        """Number of local tokens L.  `tokens` may be an int, a SymInt or an fx Proxy: only `+` and `//` are used."""
        if self.scheme == CHUNKED:
            return size(self.ranges(rank, tokens))
        return tokens if self.replicated else self.before(rank, tokens, None)

    def before(self, rank: int, tokens: Any, cut: int | None) -> Any:
        """Number of local tokens before a cut, 0 for the first token; None: of all."""
        if cut == 0:
            return 0
        ends = [*self.split_points, None]
        assert cut in ends, (cut, self.name)
        sizes = [self._share(rank, size, owner) for size, owner in self._pieces(tokens)[: ends.index(cut) + 1]]
        return reduce(operator.add, sizes)

    def _pieces(self, tokens: Any) -> list[tuple[Any, int | None]]:
        """(size, the rank that holds all of it, or None) of each piece."""
        if not self.split_points:
            return [(tokens, None)]
        starts = [0, *(c if c >= 0 else tokens + c for c in self.split_points), tokens]
        ends: list[Any] = [0, *self.split_points, None]
        small = [_is_small(a, b, few(self.world)) for a, b in pairwise(ends)]
        first, last = (_owner(self.scheme, self.world, chunk) for chunk in (0, self.chunks - 1))
        owners = [None if not alone else first if all(small[:i]) else last for i, alone in enumerate(small)]
        return [(b - a, owner) for (a, b), owner in zip(pairwise(starts), owners, strict=True)]

    def _share(self, rank: int, tokens: Any, owner: int | None) -> Any:
        """How many tokens of a piece `rank` holds."""
        if owner is not None:
            return tokens if owner == rank else 0
        n = self.chunks
        return reduce(operator.add, [(tokens + (n - 1 - chunk)) // n for chunk in self.owned(rank)] or [0])

    def ranges(self, rank: int, tokens: int) -> Ranges:
        """Token ranges of `rank` in ascending order; neighbouring and empty ones are joined."""
        if self.strided:
            assert tokens == self.strided.length, (tokens, self.strided)
            whole = self.whole.ranges(rank, self.strided.tokens)
            found = [(self.strided.before(a), self.strided.before(b)) for a, b in whole]
            return tuple((a, b) for a, b in found if a < b)
        out: list[tuple[int, int]] = []
        for start, stop in self.spans(rank, tokens):
            if out and out[-1][1] == start:
                out[-1] = (out[-1][0], stop)
            elif start < stop:
                out.append((start, stop))
        return tuple(out)

    def spans(self, rank: int, tokens: int) -> Iterator[tuple[int, int]]:
        """The tokens of `rank`, chunk by chunk and piece by piece: as many spans for every length, some maybe empty."""
        offset = 0
        for length, owner in self._pieces(tokens):
            if owner is None:
                for chunk in self.owned(rank):
                    yield offset + self._start(chunk, length), offset + self._start(chunk + 1, length)
            elif owner == rank:
                yield offset, offset + length
            offset += length

    def _start(self, chunk: int, tokens: int) -> int:
        if self.scheme == CHUNKED:
            return min(chunk * -(-tokens // self.chunks), tokens)
        size, longer = divmod(tokens, self.chunks)
        return chunk * size + min(chunk, longer)

    def holder(self, tokens: int, start: int, stop: int) -> int | None:
        """The rank that holds all of the pieces in which these tokens are; None if any of them is dealt out."""
        owners, end = set(), 0
        for length, owner in self._pieces(tokens):
            begin, end = end, end + length
            if max(begin, start) < min(end, stop):
                owners.add(owner)
        return owners.pop() if len(owners) == 1 else None

    def with_scheme(self, name: str) -> Layout:
        """The same cuts, order and residue class, with another map."""
        return replace(self, name=name + self.name.removeprefix(self.scheme))


def few(world: int) -> int:
    """Fewer tokens from cut to cut are not divided."""
    return max(8, 2 * world)


def _is_small(start: int, stop: int | None, least: int) -> bool:
    """Whether a piece from cut to cut has fewer than `least` tokens; one that has the middle has not.

    The answer must be that of each length of the sequence, which may be symbolic.
    """
    beginning, end = stop is not None and 0 <= start <= stop, start < 0
    return (beginning or end) and (stop or 0) - start < least


def assigned(owners: Sequence[int]) -> str:
    """The name of the layout whose chunk i is held by rank `owners[i]`."""
    return ASSIGNED + ",".join(map(str, owners))


def split_at(name: str, points: Sequence[int]) -> str:
    """The layout `name`, each piece from cut to cut by itself."""
    return f"{name}{CUT}{','.join(map(str, points))}" if points else name


def following(name: str, order: Order | None) -> str:
    """The layout `name` of tokens that are in `order`."""
    return f"{name}{ALONG}{order}" if order else name


def restricted(name: str, strided: StridedSegments | None) -> str:
    """The layout `name` of the tokens in `strided` alone."""
    return f"{name}{EVERY}{strided}" if strided else name


@lru_cache(maxsize=256)
def _owner(name: str, world: int, chunk: int) -> int:
    layout = Layout(name, world)
    return next(rank for rank in range(world) if chunk in layout.owned(rank))


@lru_cache(maxsize=256)
def _owners(name: str) -> tuple[int, ...]:
    return tuple(int(n) for n in name.removeprefix(ASSIGNED).split(","))
