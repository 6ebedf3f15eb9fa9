"""Which heads and tokens ranks send each other in the all-to-alls of Ulysses: no tensors, any P.

    >>> how = Pooling("0 1|2 3", tokens=10, layout_name="contiguous", world=4, rank=1)
    >>> for parcel in how.arriving: print(parcel)
    heads 2 3 of tokens 0:3 from rank 0 to rank 1
    heads 2 3 of tokens 3:6 from rank 1 to rank 1

Ranks form groups of neighbours.  Member m of each gets the heads of list m, of the tokens of all of its group; after
the attention the same parcels go back.  A head that a list names several times is sent once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ringpass.layouts.layout import Layout
from ringpass.layouts.ranges import Ranges, rows, size


@dataclass(frozen=True)
class Parcel:
    """What rank `src` has of some heads, and rank `dst` gets: `tokens` of each of `heads`."""

    src: int
    dst: int
    heads: tuple[int, ...]
    tokens: Ranges

    @property
    def rows(self) -> int:
        """(head, token) pairs."""
        return len(self.heads) * size(self.tokens)

    def __str__(self) -> str:
        tokens = ",".join(f"{a}:{b}" for a, b in self.tokens) or "none"
        return f"heads {' '.join(map(str, self.heads))} of tokens {tokens} from rank {self.src} to rank {self.dst}"


def heads_text(heads: Sequence[Sequence[int]]) -> str:
    """The heads that each member of a group reads, as operators carry them.

    >>> heads_text([[0, 1], [1, 1, 2]])
    '0 1|1 1 2'
    """
    return "|".join(" ".join(map(str, of)) for of in heads)


@dataclass(frozen=True)
class Pooling:
    """Which tokens and heads each rank has before and after.

    `heads`: the heads, of those of x, that each member of a group gets (`heads_text`); `tokens`: S, maybe symbolic;
    `layout_name`: the layout of local tokens; if that is replicated, nothing is sent.
    """

    heads: str
    tokens: Any
    layout_name: str
    world: int
    rank: int

    @cached_property
    def of_member(self) -> tuple[tuple[int, ...], ...]:
        """The heads that each member gets, in order."""
        return tuple(tuple(map(int, of.split())) for of in self.heads.split("|"))

    @property
    def degree(self) -> int:
        """The number of members of a group."""
        return len(self.of_member)

    @property
    def member(self) -> int:
        """The number of this rank in its group."""
        return self.rank % self.degree

    @property
    def neighbours(self) -> range:
        """The ranks of its group."""
        first = self.rank - self.member
        return range(first, first + self.degree)

    @property
    def layout(self) -> Layout:
        """The layout of local tokens."""
        return Layout(self.layout_name, self.world)

    @property
    def pooled(self) -> Layout:
        """The layout of pooled tokens."""
        return self.layout.pooled(self.degree, self.member)

    @property
    def own(self) -> tuple[int, ...]:
        """The heads that this rank gets."""
        return self.of_member[self.member]

    def length(self, rank: int) -> Any:
        """The number of local tokens of `rank`."""
        return self.layout.length(rank, self.tokens)

    @property
    def pooled_length(self) -> Any:
        """The number of pooled tokens of this rank."""
        return self.pooled.length(self.rank, self.tokens)

    @cached_property
    def leaving(self) -> tuple[Parcel, ...]:
        """What this rank gives each of its group, itself included, in the order of ranks."""
        tokens = self.layout.ranges(self.rank, self.tokens)
        lists = zip(self.neighbours, self.of_member, strict=True)
        return tuple(Parcel(self.rank, dst, _once(heads), tokens) for dst, heads in lists)

    @cached_property
    def arriving(self) -> tuple[Parcel, ...]:
        """What this rank gets of each of its group, itself included, in the order of ranks."""
        heads, held = _once(self.own), [self.layout.ranges(src, self.tokens) for src in self.neighbours]
        return tuple(Parcel(src, self.rank, heads, of) for src, of in zip(self.neighbours, held, strict=True))

    @cached_property
    def arriving_rows(self) -> tuple[Ranges, ...]:
        """The rows of each arriving parcel in the pooled block."""
        owned = self.pooled.ranges(self.rank, self.tokens)
        return tuple(rows(parcel.tokens, owned) for parcel in self.arriving)

    @property
    def adds(self) -> bool:
        """Whether a head is read more than once, so that its gradient is a sum."""
        read = [head for of in self.of_member for head in of]
        return len(read) != len(set(read))


def _once(heads: Sequence[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(heads))
