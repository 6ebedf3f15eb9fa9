"""The all-to-alls of Ulysses: local tokens of all heads <-> the tokens of neighbouring ranks, of a share of the heads.

    before the attention   (B, H, L, D) local tokens    -> (B, h, n, D) pooled tokens, heads of the rank's share
    after it               (B, h, n, D)                 -> (B, H, L, D), the values of a head that several ranks give
                                                           added, in float32 or better

Each is the transpose of the other.  Only neighbours exchange anything: a group of `degree` ranks.  A K/V head that
several of them read is sent to each; one that is read several times by one of them is sent to it once.

    message = pack(xs, how, back=False)
    pending = start(message, *contents(xs).splits(how, back=False), group)      # collective over the whole group
    pooled = unpack(pending.received, contents(xs), how)                        # once it has been waited for
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ringpass.comm import collectives
from ringpass.comm.p2p import PendingExchange, sendable
from ringpass.layouts.pooling import Parcel, Pooling
from ringpass.layouts.ranges import size
from ringpass.precision import accumulator


@dataclass(frozen=True)
class Contents:
    """What a message holds: `batch` rows of all heads and tokens of its parcels, of tensors of these `widths`."""

    batch: int
    widths: tuple[int, ...]

    def shapes(self, parcel: Parcel) -> list[tuple[int, int, int, int]]:
        """The part of a parcel of each tensor: (B, heads, tokens, D)."""
        return [(self.batch, len(parcel.heads), size(parcel.tokens), width) for width in self.widths]

    def elements(self, parcel: Parcel) -> int:
        """The number of elements of a parcel."""
        return sum(map(math.prod, self.shapes(parcel)))

    def splits(self, how: Pooling, back: bool) -> tuple[list[int], list[int]]:
        """The elements that this rank receives of each rank, and sends to each."""
        arriving, leaving = ([self.elements(p) for p in parcels] for parcels in _sides(how, back))
        before, after = [0] * how.neighbours.start, [0] * (how.world - how.neighbours.stop)
        return [*before, *arriving, *after], [*before, *leaving, *after]


def contents(xs: Sequence[Tensor]) -> Contents:
    """What a message of `xs`, (B, H, L, D) or (B, h, n, D), holds."""
    return Contents(xs[0].shape[0], tuple(x.shape[3] for x in xs))


def _sides(how: Pooling, back: bool) -> tuple[tuple[Parcel, ...], tuple[Parcel, ...]]:
    """The parcels that arrive, and those that leave; `back`: after the attention."""
    return (how.leaving, how.arriving) if back else (how.arriving, how.leaving)


def pack(xs: Sequence[Tensor], how: Pooling, back: bool) -> Tensor:
    """The message of this rank, 1-D: all parcels, in the order of ranks.

    `back`: `xs` are pooled; where a head is read more than once, in the dtype in which its gradients are added.
    """
    parts: list[Tensor] = []
    if back:
        wide = [_each_once(x, how.own) for x in xs] if how.adds else [*xs]
        for rows in how.arriving_rows:
            parts += [collectives.ranged(x, 2, rows) for x in wide]
    else:
        for parcel in how.leaving:
            parts += [_heads(x, parcel.heads) for x in xs]
    return torch.cat([part.reshape(-1) for part in parts])


def start(message: Tensor, received: Sequence[int], sent: Sequence[int], group: str) -> PendingExchange:
    """Starts the all-to-all of `message`, in parts of these numbers of elements.

    Raises PeerError if the process group is broken.
    """
    into = message.new_empty(sum(received))
    ours, theirs = sendable(message), sendable(into)
    each = message.element_size() // ours.element_size()  # where elements travel as bytes
    splits = [each * n for n in received], [each * n for n in sent]
    work = collectives.start_collective(dist.all_to_all_single, theirs, ours, *splits, group=group, what="all-to-all")
    return PendingExchange(into, message, [work], (), group, kind="all-to-all")


def unpack(message: Tensor, holds: Contents, how: Pooling) -> list[Tensor]:
    """The pooled tokens (B, h, n, D) of this rank's heads, from what arrived before the attention."""
    found = _by_tensor(message, holds, how.arriving)
    once, tokens = how.arriving[0].heads, [parcel.tokens for parcel in how.arriving]
    numbers = [once.index(head) for head in how.own]
    return [_heads(collectives.assembled(parts, tokens, 2), numbers) for parts in found]


def unpack_back(message: Tensor, holds: Contents, how: Pooling, heads: int, dtype: torch.dtype) -> list[Tensor]:
    """(B, H, L, D) of all `heads` heads, in `dtype`, from what arrived after the attention."""
    found = _by_tensor(message, holds, how.leaving)
    lists = [parcel.heads for parcel in how.leaving]
    each = [list(zip(parts, lists, strict=True)) for parts in found]
    return [(_added(parts, heads) if how.adds else _placed(parts, heads)).to(dtype) for parts in each]


def _by_tensor(message: Tensor, holds: Contents, parcels: Sequence[Parcel]) -> list[list[Tensor]]:
    """The parts of each tensor, one per parcel."""
    shapes = [shape for parcel in parcels for shape in holds.shapes(parcel)]
    parts = message.split([math.prod(shape) for shape in shapes])
    views = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    return [views[i :: len(holds.widths)] for i in range(len(holds.widths))]


def take_heads(xs: Sequence[Tensor], how: Pooling) -> list[Tensor]:
    """This rank's heads of what every rank has: nothing is sent."""
    return [_heads(x, how.own) for x in xs]


def place_heads(ys: Sequence[Tensor], how: Pooling, heads: int) -> list[Tensor]:
    """The transpose of `take_heads`."""
    return [_added([(y, how.own)], heads).to(y.dtype) for y in ys]


def _heads(x: Tensor, heads: Sequence[int]) -> Tensor:
    """`heads` of x; a view of neighbouring ones."""
    if list(heads) == list(range(heads[0], heads[0] + len(heads))):
        return x.narrow(1, heads[0], len(heads))
    return x.index_select(1, _index(heads, x))


def _index(heads: Sequence[int], x: Tensor) -> Tensor:
    return torch.tensor(heads, device=x.device)


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
    have = [head for _, of in parts for head in of]
    if have == list(range(heads)):
        return torch.cat([part for part, _ in parts], 1)
    return _added(parts, heads)
