"""Token -> rank maps.

    >>> Layout("zigzag", world=2).ranges(rank=0, tokens=10)
    ((0, 3), (8, 10))
    >>> Layout("contiguous", world=2).ranges(rank=1, tokens=5)
    ((3, 5),)

A layout splits S tokens into n chunks of near-equal size (the first S mod n chunks are one token longer) and assigns
some of them to each rank, in ascending order.

    contiguous       n = P, rank r holds chunk r
    zigzag           n = 2P, rank r holds chunks r and 2P-1-r, which balances causal attention
    striped          n = 8P, rank r holds every P-th chunk from r on
    chunks 0,1,1,0   as many chunks as numbers, each held by the rank of that number
    chunked          n = P, as torch.chunk and DTensor split: chunks of ceil(S / P) tokens, the last ones maybe shorter
    replicated       every rank holds all tokens

`zigzag cut 77,-1`: the sequence has split points after its first 77 tokens and before its last one.  Each part between
two split points is assigned to ranks by itself, as for a text and an image in one sequence, so a slice from one split
point to another is again in a layout of the same kind.  A part of fewer than max(8, 2P) tokens (CLS, the padding of a
convolution) is not divided: the rank that holds the chunk before it, or at the start the chunk after it, holds all of
it.

`zigzag in units of 4`: units of 4 neighbouring tokens are assigned to ranks as single tokens would be, so that what
merges the 4 into one reads no other rank's tokens.  Split points count units.  `in units of 4 from 1` begins with token
1 of the first unit.  S need not be a multiple of 4: the last unit may be shorter.

`zigzag along hilbert 14x14 after 1`: the tokens are put in the order of that curve (`ringpass.layouts.hilbert`) before
they are split into chunks.  Ranges, and all schedules made of them, are then in positions along the curve.

`zigzag pooled 2 at 1`: the tokens of each 2 neighbouring ranks are held by rank 1 of the two (`pooled`); the other one
holds none.

`zigzag every 2/1 of 8 of 16`: of the 16 tokens of that layout, only those of strided segments
(`ringpass.layouts.strided`), numbered 0, 1, 2 ..; ranges are in these numbers.

`zigzag section 25:50 of 2 x 61`: of the rows of 2 samples of 61 tokens in that layout, one sample after the other, only
25 to 50, numbered from 0.  A token is where it is in the layout, so a rank may hold many rows of a section, or none.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from itertools import pairwise
from typing import Any

from ringpass.layouts.hilbert import Order
from ringpass.layouts.names import check_name
from ringpass.layouts.ranges import Ranges, clipped, size, union
from ringpass.layouts.strided import StridedSegments

CONTIGUOUS, REPLICATED, CHUNKED = "contiguous", "replicated", "chunked"
STRIPES = 8  # chunks of each rank in the striped layout, and in one that is made for a mask
ASSIGNED, CUT, UNITS, FROM = "chunks ", " cut ", " in units of ", " from "
ALONG, POOLED, AT, EVERY, SECTION = " along ", " pooled ", " at ", " every ", " section "


@dataclass(frozen=True)
class Scheme:
    """How the tokens of each part are assigned to P ranks.

    chunks: P -> the number n of chunks.
    owned: (rank, P) -> the chunks that a rank holds, ascending.
    automatic: whether the layout "auto" weighs it.
    fine: many small chunks, weighed only for sequences that are long enough.
    option: whether the option `layout` may name it.
    even: the chunks have near-equal sizes; else they are those of torch.chunk, for inputs and outputs alone.
    """

    chunks: Callable[[int], int]
    owned: Callable[[int, int], tuple[int, ...]]
    automatic: bool = True
    fine: bool = False
    option: bool = True
    even: bool = True


LAYOUTS: Mapping[str, Scheme] = {
    CONTIGUOUS: Scheme(chunks=lambda world: world, owned=lambda rank, world: (rank,)),
    CHUNKED: Scheme(
        chunks=lambda world: world, owned=lambda rank, world: (rank,), automatic=False, option=False, even=False
    ),
    "zigzag": Scheme(chunks=lambda world: 2 * world, owned=lambda rank, world: (rank, 2 * world - 1 - rank)),
    "striped": Scheme(
        chunks=lambda world: STRIPES * world,
        owned=lambda rank, world: tuple(range(rank, STRIPES * world, world)),
        fine=True,
    ),
    REPLICATED: Scheme(chunks=lambda world: 1, owned=lambda rank, world: (0,), automatic=False, option=False),
}
"""The named schemes, in the order in which "auto" prefers them."""

NAMES = tuple(name for name, scheme in LAYOUTS.items() if scheme.even)
OPTIONS = tuple(name for name, scheme in LAYOUTS.items() if scheme.option)
INPUTS = tuple(name for name in LAYOUTS if name != REPLICATED)
"""Schemes of plans; those that the option `layout` may name; those of sharded inputs."""


@dataclass(frozen=True)
class Section:
    """Rows `start` to `stop` of the rows of `samples` sequences of `tokens` tokens, one after the other."""

    start: int
    stop: int
    samples: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.start}:{self.stop} of {self.samples} x {self.tokens}"

    @staticmethod
    def parse(text: str) -> Section:
        """The section whose `str` is `text`."""
        rows, _, whole = text.partition(" of ")
        return Section(*map(int, (*rows.split(":"), *whole.split(" x "))))


@dataclass(frozen=True)
class Layout:
    """Where each token of one sequence axis lives.  `world` is the number of ranks P."""

    name: str
    world: int

    def __post_init__(self) -> None:
        check_name(self.name)

    @property
    def assignment(self) -> str:
        """The name without the order and the restrictions: how positions are assigned to ranks."""
        return _unpooled(self.name).partition(ALONG)[0]

    @property
    def scheme(self) -> str:
        """How the tokens of each part are assigned to ranks."""
        return self.assignment.partition(UNITS)[0].partition(CUT)[0]

    @property
    def split_points(self) -> tuple[int, ...]:
        """The first token of each part but the first one, ascending; negative ones count from the end."""
        text = self.assignment.partition(UNITS)[0].partition(CUT)[2]
        return tuple(int(n) for n in text.split(",")) if text else ()

    @property
    def unit(self) -> int:
        """How many neighbouring tokens are assigned together."""
        return int(self.assignment.partition(UNITS)[2].partition(FROM)[0] or 1)

    @property
    def left_out(self) -> int:
        """How many tokens of the first unit are not in the sequence."""
        return int(self.assignment.partition(UNITS)[2].partition(FROM)[2] or 0)

    @property
    def order(self) -> Order | None:
        """The curve that orders the tokens; None: their original order."""
        text = _unpooled(self.name).partition(ALONG)[2]
        return Order.parse(text) if text else None

    @property
    def unrestricted(self) -> Layout:
        """The layout of all tokens, also where this one covers only those of strided segments or of a section."""
        return replace(self, name=_unrestricted(self.name))

    @property
    def of_units(self) -> Layout:
        """The layout of the units."""
        assignment, units, _ = self.assignment.partition(UNITS)
        return replace(self, name=assignment + self.name.removeprefix(self.assignment)) if units else self

    @property
    def pool(self) -> tuple[int, int] | None:
        """(how many neighbouring ranks pool their tokens, number of the one that holds them); None: each its own."""
        degree, _, member = _unrestricted(self.name).partition(POOLED)[2].partition(AT)
        return (int(degree), int(member)) if degree else None

    def pooled(self, degree: int, member: int) -> Layout:
        """The layout where member number `member` of each `degree` neighbouring ranks holds the tokens of all of them.

        What every rank holds stays so.
        """
        assert self.world % degree == 0 and not self.pool and not self.strided and not self.section, (degree, self)
        return (
            self if degree == 1 or self.replicated else replace(self, name=f"{self.name}{POOLED}{degree}{AT}{member}")
        )

    def shares(self, rank: int) -> range:
        """The ranks whose tokens, but for pooling, `rank` holds: its own, or those of its neighbours, or none."""
        if self.pool is None:
            return range(rank, rank + 1)
        degree, member = self.pool
        first = rank // degree * degree
        return range(first, first + degree if rank % degree == member else first)

    @property
    def strided(self) -> StridedSegments | None:
        """The strided segments that the layout covers; None: all tokens."""
        text = self.name.partition(EVERY)[2]
        return StridedSegments.parse(text) if text else None

    @property
    def section(self) -> Section | None:
        """The section that the layout covers; None: all tokens."""
        text = self.name.partition(SECTION)[2]
        return Section.parse(text) if text else None

    @property
    def replicated(self) -> bool:
        """Whether every rank holds all tokens."""
        return self.scheme == REPLICATED

    @property
    def chunks(self) -> int:
        """The number of chunks of each part."""
        return _scheme(self.scheme).chunks(self.world)

    def owned(self, rank: int) -> tuple[int, ...]:
        """The chunks that `rank` holds, ascending."""
        return _owned(self.scheme, self.shares(rank), self.world)

    def length(self, rank: int, tokens: Any) -> Any:
        """Number of local tokens L.  `tokens` may be an int, a SymInt or an fx Proxy, for `+`, `*`, `//`."""
        if self.unit > 1 and not isinstance(tokens, int):
            return self.of_units.length(rank, tokens // self.unit) * self.unit
        if self.section or self.unit > 1 or not _scheme(self.scheme).even:
            return size(self.ranges(rank, tokens))
        return tokens if self.replicated else self.before(rank, tokens, None)

    def before(self, rank: int, tokens: Any, point: int | None) -> Any:
        """Number of local tokens before a split point; 0: the start of the sequence; None: its end."""
        if point == 0:
            return 0
        ends = [*self.split_points, None]
        assert point in ends and self.unit == 1, (point, self.name)
        sizes = [self._local_size(rank, size, owner) for size, owner in self._parts(tokens)[: ends.index(point) + 1]]
        return reduce(operator.add, sizes)

    def _parts(self, tokens: Any) -> list[tuple[Any, int | None]]:
        """(size, the rank that holds all of it, or None) of each part."""
        if not self.split_points:
            return [(tokens, None)]
        starts = [0, *(c if c >= 0 else tokens + c for c in self.split_points), tokens]
        ends: list[Any] = [0, *self.split_points, None]
        small = [_is_small(a, b, few(self.world)) for a, b in pairwise(ends)]
        first, last = (_owner(self.scheme, self.world, chunk) for chunk in (0, self.chunks - 1))
        owners = [None if not alone else first if all(small[:i]) else last for i, alone in enumerate(small)]
        return [(b - a, owner) for (a, b), owner in zip(pairwise(starts), owners, strict=True)]

    def _local_size(self, rank: int, tokens: Any, owner: int | None) -> Any:
        """How many tokens of a part `rank` holds."""
        if owner is not None:
            return tokens if owner in self.shares(rank) else 0
        n = self.chunks
        return reduce(operator.add, [(tokens + (n - 1 - chunk)) // n for chunk in self.owned(rank)] or [0])

    def ranges(self, rank: int, tokens: int) -> Ranges:
        """Token ranges of `rank` in ascending order; neighbouring and empty ones are joined."""
        if self.strided:
            assert tokens == self.strided.length, (tokens, self.strided)
            full = self.unrestricted.ranges(rank, self.strided.tokens)
            found = [(self.strided.before(a), self.strided.before(b)) for a, b in full]
            return tuple((a, b) for a, b in found if a < b)
        if section := self.section:
            assert tokens == section.stop - section.start, (tokens, section)
            rows = self.unrestricted.rows(rank, section.tokens, section.samples)
            return clipped(rows, section.start, section.stop, -section.start)
        out: list[tuple[int, int]] = []
        for start, stop in self.spans(rank, tokens):
            if out and out[-1][1] == start:
                out[-1] = (out[-1][0], stop)
            elif start < stop:
                out.append((start, stop))
        return tuple(out)

    def rows(self, rank: int, tokens: int, samples: int) -> Ranges:
        """`ranges` in the rows of `samples` sequences of `tokens` tokens, one after the other."""
        held = self.ranges(rank, tokens)
        return union(tuple((i * tokens + a, i * tokens + b) for i in range(samples) for a, b in held))

    def spans(self, rank: int, tokens: int) -> Iterator[tuple[int, int]]:
        """The tokens of `rank`, by part and chunk: the same number of spans for every length, some may be empty."""
        if self.unit > 1:
            units = -(-(self.left_out + tokens) // self.unit)
            for start, stop in self.of_units.spans(rank, units):
                first, last = (min(max(n * self.unit - self.left_out, 0), tokens) for n in (start, stop))
                yield first, last
            return
        offset = 0
        for length, owner in self._parts(tokens):
            if owner is None:
                for chunk in self.owned(rank):
                    yield offset + self._start(chunk, length), offset + self._start(chunk + 1, length)
            elif owner in self.shares(rank):
                yield offset, offset + length
            offset += length

    def _start(self, chunk: int, tokens: int) -> int:
        if not _scheme(self.scheme).even:
            return min(chunk * -(-tokens // self.chunks), tokens)
        size, longer = divmod(tokens, self.chunks)
        return chunk * size + min(chunk, longer)

    def holder(self, tokens: int, start: int, stop: int) -> int | None:
        """The rank that holds all parts that these tokens touch; None if several ranks do."""
        assert self.unit == 1, self
        owners, end = set(), 0
        for length, owner in self._parts(tokens):
            begin, end = end, end + length
            if max(begin, start) < min(end, stop):
                owners.add(owner)
        return owners.pop() if len(owners) == 1 else None

    def with_scheme(self, name: str) -> Layout:
        """The same split points, order, strided segments and section, with another scheme."""
        return replace(self, name=name + self.name.removeprefix(self.scheme))

    def in_units(self, size: int, left_out: int = 0) -> Layout:
        """The layout of a sequence of which `size` neighbouring tokens are one token of this one.

        It may leave out tokens of the first unit, and of the last one.
        """
        assert size == 1 or (self.unit == 1 and self.name == self.assignment), (size, self)
        if size == 1:
            return self
        return replace(self, name=f"{self.name}{UNITS}{size}{f'{FROM}{left_out}' if left_out else ''}")


def few(world: int) -> int:
    """A part with fewer tokens is not divided."""
    return max(8, 2 * world)


def _is_small(start: int, stop: int | None, least: int) -> bool:
    """Whether a part has fewer than `least` tokens; the part that spans the middle of the sequence counts as large.

    The answer must hold for every length of the sequence, which may be symbolic.
    """
    beginning, end = stop is not None and 0 <= start <= stop, start < 0
    return (beginning or end) and (stop or 0) - start < least


def assigned(owners: Sequence[int]) -> str:
    """The name of the layout whose chunk i is held by rank `owners[i]`."""
    return ASSIGNED + ",".join(map(str, owners))


def split_at(name: str, points: Sequence[int]) -> str:
    """The layout `name` with split points."""
    return f"{name}{CUT}{','.join(map(str, points))}" if points else name


def following(name: str, order: Order | None) -> str:
    """The layout `name` of tokens in `order`."""
    return f"{name}{ALONG}{order}" if order else name


def restricted(name: str, strided: StridedSegments | None) -> str:
    """The layout `name`, of the tokens of `strided` alone."""
    return f"{name}{EVERY}{strided}" if strided else name


def section_of(name: str, section: Section) -> str:
    """The layout `name`, of the rows of `section` alone."""
    return f"{name}{SECTION}{section}"


def _unrestricted(name: str) -> str:
    return name.partition(SECTION)[0].partition(EVERY)[0]


def _unpooled(name: str) -> str:
    return _unrestricted(name).partition(POOLED)[0]


@lru_cache(maxsize=1024)
def _owned(name: str, ranks: range, world: int) -> tuple[int, ...]:
    return tuple(sorted(chunk for rank in ranks for chunk in _scheme(name).owned(rank, world)))


@lru_cache(maxsize=256)
def _owner(name: str, world: int, chunk: int) -> int:
    layout = Layout(name, world)
    return next(rank for rank in range(world) if chunk in layout.owned(rank))


@lru_cache(maxsize=256)
def _scheme(name: str) -> Scheme:
    """The scheme of that name: of the table, or made for a mask."""
    if not name.startswith(ASSIGNED):
        return LAYOUTS[name]
    owners = tuple(int(n) for n in name.removeprefix(ASSIGNED).split(","))
    return Scheme(
        chunks=lambda world: len(owners),
        owned=lambda rank, world: tuple(chunk for chunk, owner in enumerate(owners) if owner == rank),
    )
