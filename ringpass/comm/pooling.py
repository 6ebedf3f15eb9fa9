"""The all-to-alls of Ulysses: local tokens of all heads <-> the tokens of neighbouring ranks, of a share of the heads.

    before the attention   (B, H, L, D) local tokens    -> (B, h, n, D) pooled tokens, heads of the rank's share
    after it               (B, h, n, D)                 -> (B, H, L, D), the values of a head that several ranks give
                                                           added, in float32 or better

Each is the transpose of the other.  Only neighbours exchange anything: a group of `degree` ranks.  A K/V head that
several of them read is sent to each; one that is read several times by one of them is sent to it once.

Both functions are collective over the whole process group, as those of `ringpass.comm.collectives`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringpass.comm import collectives
from ringpass.comm.p2p import sendable
from ringpass.layouts.layout import Layout
from ringpass.layouts.ranges import Ranges, rows
from ringpass.precision import accumulator


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

    def sent_heads(self, member: int) -> tuple[int, ...]:
        """The heads that travel between a rank and `member`, each once."""
        return tuple(dict.fromkeys(self.of_member[member]))

    def pooled_rows(self, rank: int) -> Ranges:
        """The rows of the tokens of `rank` in the pooled block."""
        owned = self.pooled.ranges(self.rank, self.tokens)
        return rows(self.layout.ranges(rank, self.tokens), owned)

    @property
    def adds(self) -> bool:
        """Whether a head is read more than once, so that its gradient is a sum."""
        read = [head for of in self.of_member for head in of]
        return len(read) != len(set(read))


def pool(xs: Sequence[Tensor], how: Pooling, group: str) -> list[Tensor]:
    """The pooled tokens (B, h, n, D) of this rank's heads, from the local tokens (B, H, L, D); all in one message."""
    if how.layout.replicated:
        return [x.index_select(1, _index(how.own, x)) for x in xs]
    sent = [[_heads(x, how.sent_heads(member)) for x in xs] for member in range(how.degree)]
    number = len(how.sent_heads(how.member))
    shapes = [[(x.shape[0], number, how.length(rank), x.shape[3]) for x in xs] for rank in how.neighbours]
    received = _exchange(sent, shapes, how, group)
    found = []
    for i, x in enumerate(xs):
        out = x.new_empty((x.shape[0], number, how.pooled_length, x.shape[3]))
        for rank, parts in zip(how.neighbours, received, strict=True):
            _write_rows(out, how.pooled_rows(rank), parts[i])
        found.append(_heads(out, _numbers(how.sent_heads(how.member), how.own)))
    return found


def unpool(ys: Sequence[Tensor], how: Pooling, heads: int, group: str) -> list[Tensor]:
    """The transpose of `pool`: (B, H, L, D) of all `heads` heads, from the pooled tokens (B, h, n, D)."""
    if how.layout.replicated:
        return [_added([(y, how.own)], heads) if how.adds else _placed([(y, how.own)], heads) for y in ys]
    wide = [_each_once(y, how.own) for y in ys] if how.adds else [*ys]
    sent = [[_rows(y, how.pooled_rows(rank)) for y in wide] for rank in how.neighbours]
    length = how.length(how.rank)
    shapes = [
        [(y.shape[0], len(how.sent_heads(member)), length, y.shape[3]) for y in wide] for member in range(how.degree)
    ]
    received = _exchange(sent, shapes, how, group)
    found = []
    for i, y in enumerate(ys):
        parts = [(received[member][i], how.sent_heads(member)) for member in range(how.degree)]
        found.append((_added(parts, heads) if how.adds else _placed(parts, heads)).to(y.dtype))
    return found


def _exchange(
    sent: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[tuple[int, ...]]], how: Pooling, group: str
) -> list[list[Tensor]]:
    """What each neighbour sends, in these shapes; `sent`: what each gets."""
    flat = torch.cat([part.reshape(-1, 1) for parts in sent for part in parts])
    sizes = [sum(map(math.prod, of)) for of in shapes]
    received = flat.new_empty(sum(sizes), 1)
    ours = [sum(part.numel() for part in parts) for parts in sent]
    before, after = [0] * how.neighbours.start, [0] * (how.world - how.neighbours.stop)
    splits = [*before, *sizes, *after], [*before, *ours, *after]
    both = sendable(received), sendable(flat)
    collectives.run_collective(dist.all_to_all_single, *both, *splits, group=group)
    out = []
    for block, of in zip(received.split(sizes), shapes, strict=True):
        parts = block.split([math.prod(shape) for shape in of])
        out.append([part.view(shape) for part, shape in zip(parts, of, strict=True)])
    return out


def _heads(x: Tensor, heads: Sequence[int]) -> Tensor:
    """`heads` of x; a view of neighbouring ones."""
    if list(heads) == list(range(heads[0], heads[0] + len(heads))):
        return x.narrow(1, heads[0], len(heads))
    return x.index_select(1, _index(heads, x))


def _numbers(of: Sequence[int], heads: Sequence[int]) -> list[int]:
    """The place of each of `heads` in `of`."""
    return [of.index(head) for head in heads]


def _index(heads: Sequence[int], x: Tensor) -> Tensor:
    return torch.tensor(heads, device=x.device)


def _rows(x: Tensor, ranges: Ranges) -> Tensor:
    parts = [x.narrow(2, a, b - a) for a, b in ranges] or [x.narrow(2, 0, 0)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _write_rows(out: Tensor, ranges: Ranges, part: Tensor) -> None:
    offset = 0
    for a, b in ranges:
        out[:, :, a:b] = part[:, :, offset : offset + b - a]
        offset += b - a


def _each_once(y: Tensor, heads: Sequence[int]) -> Tensor:
    """The sums, in the accumulator's dtype, over what is read several times of each head."""
    once = tuple(dict.fromkeys(heads))
    out = y.new_zeros((y.shape[0], len(once), *y.shape[2:]), dtype=accumulator(y.dtype))
    for number, head in enumerate(heads):
        out[:, once.index(head)] += y[:, number]
    return out


def _added(parts: Sequence[tuple[Tensor, Sequence[int]]], heads: int) -> Tensor:
    """The sums over parts, each of some heads, of `heads` heads."""
    first = parts[0][0]
    out = first.new_zeros((first.shape[0], heads, *first.shape[2:]), dtype=accumulator(first.dtype))
    for part, of in parts:
        for number, head in enumerate(of):
            out[:, head] += part[:, number]
    return out


def _placed(parts: Sequence[tuple[Tensor, Sequence[int]]], heads: int) -> Tensor:
    """The parts, each of some heads that no other one has, side by side; 0 for a head that none has."""
    first = parts[0][0]
    have = [head for _, of in parts for head in of]
    if have == list(range(heads)):
        return torch.cat([part for part, _ in parts], 1)
    return _added(parts, heads)
