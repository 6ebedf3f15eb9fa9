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

import torch
import torch.distributed as dist
from torch import Tensor

from ringpass.comm import collectives
from ringpass.comm.p2p import sendable
from ringpass.layouts.pooling import Parcel, Pooling
from ringpass.layouts.ranges import Ranges, size
from ringpass.precision import accumulator


def pool(xs: Sequence[Tensor], how: Pooling, group: str) -> list[Tensor]:
    """The pooled tokens (B, h, n, D) of this rank's heads, from the local tokens (B, H, L, D); all in one message."""
    if how.layout.replicated:
        return [x.index_select(1, _index(how.own, x)) for x in xs]
    sent = [[_heads(x, parcel.heads) for x in xs] for parcel in how.leaving]
    received = _exchange(sent, how.arriving, how, group)
    once = how.arriving[0].heads
    found = []
    for i, x in enumerate(xs):
        out = x.new_empty((x.shape[0], len(once), how.pooled_length, x.shape[3]))
        for parcel, parts in zip(how.arriving, received, strict=True):
            _write_rows(out, how.pooled_rows(parcel.tokens), parts[i])
        found.append(_heads(out, [once.index(head) for head in how.own]))
    return found


def unpool(ys: Sequence[Tensor], how: Pooling, heads: int, group: str) -> list[Tensor]:
    """The transpose of `pool`: (B, H, L, D) of all `heads` heads, from the pooled tokens (B, h, n, D)."""
    if how.layout.replicated:
        return [_added([(y, how.own)], heads).to(y.dtype) for y in ys]
    wide = [_each_once(y, how.own) for y in ys] if how.adds else [*ys]
    sent = [[_rows(y, how.pooled_rows(parcel.tokens)) for y in wide] for parcel in how.arriving]
    received = _exchange(sent, how.leaving, how, group)
    found = []
    for i, y in enumerate(ys):
        parts = [(parts[i], parcel.heads) for parcel, parts in zip(how.leaving, received, strict=True)]
        found.append((_added(parts, heads) if how.adds else _placed(parts, heads)).to(y.dtype))
    return found


def _exchange(
    sent: Sequence[Sequence[Tensor]], parcels: Sequence[Parcel], how: Pooling, group: str
) -> list[list[Tensor]]:
    """What each of the group sends, as `parcels` say; `sent`: what each gets."""
    widths = [(x.shape[0], x.shape[3]) for x in sent[0]]
    shapes = [[(b, len(p.heads), size(p.tokens), width) for b, width in widths] for p in parcels]
    flat = torch.cat([part.reshape(-1, 1) for parts in sent for part in parts])
    sizes = [sum(map(math.prod, of)) for of in shapes]
    received = flat.new_empty(sum(sizes), 1)
    ours = [sum(part.numel() for part in parts) for parts in sent]
    before, after = [0] * how.neighbours.start, [0] * (how.world - how.neighbours.stop)
    splits = [*before, *sizes, *after], [*before, *ours, *after]
    collectives.run_collective(dist.all_to_all_single, sendable(received), sendable(flat), *splits, group=group)
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
    have = [head for _, of in parts for head in of]
    if have == list(range(heads)):
        return torch.cat([part for part, _ in parts], 1)
    return _added(parts, heads)
