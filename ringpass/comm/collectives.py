"""Converts a tensor between replicated and sharded form: the eager bodies of the boundary operators.

The sequence dim of a tensor has size outer * S * inner, since the sequence may be merged with other dims, as by
`view(B * S, V)`.  The sharded tensor has outer * L * inner there, L the number of local tokens.  Torch's all-gather
needs equal sizes, so uneven shards are padded; no padded tensor leaves this file.

`move` sends each rank exactly the tokens that it wants and does not hold.

All functions are collective: every rank of the process group `group` calls them in the same order.  They raise
PeerError if a rank died or did not arrive within the time limit of the ring.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringpass.comm.lost import await_work, lost
from ringpass.comm.p2p import PendingExchange, process_group, sendable
from ringpass.comm.ring import RINGS
from ringpass.layouts.layout import Layout
from ringpass.layouts.ranges import Ranges, size
from ringpass.layouts.redistribution import Redistribution, among, between
from ringpass.metrics.recorder import moved
from ringpass.precision import accumulator
from ringpass.profiling import profiled
from ringpass.torch_features import gather_equal, sum_and_scatter


@dataclass(frozen=True)
class Shard:
    """Where the sequence is in a tensor, and which tokens of it this rank holds.

    `dim` has size outer * S * inner; `tokens` is S, maybe symbolic; `layout_name` and `world` say which tokens each
    rank holds, `rank` which rank this is.
    """

    dim: int
    outer: Any
    tokens: Any
    layout_name: str
    world: int
    rank: int

    @property
    def layout(self) -> Layout:
        """The token -> rank map."""
        return Layout(self.layout_name, self.world)

    @property
    def length(self) -> Any:
        """L, the number of local tokens."""
        return self.layout.length(self.rank, self.tokens)

    def resized(self, shape: Sequence[Any], old: Any, new: Any) -> list[Any]:
        """`shape` with `old` tokens in the sequence dim replaced by `new`; without tokens, a token has one row."""
        rows = self.outer * new if type(old) is int and old == 0 else shape[self.dim] // old * new
        return [*shape[: self.dim], rows, *shape[self.dim + 1 :]]

    def split(self, x: Tensor, tokens: Any) -> Tensor:
        """`x` as (before, tokens, after): `before` holds the leading dims and outer, `after` inner and the rest."""
        before = self.outer
        for n in x.shape[: self.dim]:
            before = before * n
        after = x.shape[self.dim] // (self.outer * tokens) if type(tokens) is not int or tokens else 1
        for n in x.shape[self.dim + 1 :]:
            after = after * n
        return x.reshape(before, tokens, after)


def take(x: Tensor, shard: Shard) -> Tensor:
    """The local tokens of the full-length `x`: (.., outer * S * inner, ..) to (.., outer * L * inner, ..)."""
    out = ranged(shard.split(x, shard.tokens), 1, shard.layout.ranges(shard.rank, shard.tokens))
    return out.reshape(shard.resized(x.shape, shard.tokens, shard.length)).clone(memory_format=torch.contiguous_format)


def gather(x: Tensor, shard: Shard, group: str) -> Tensor:
    """All tokens in original order, from the local `x` of all ranks: the inverse of `take`."""
    ranges = [shard.layout.ranges(rank, shard.tokens) for rank in range(shard.world)]
    longest = max(size(of_rank) for of_rank in ranges)
    local = shard.split(x, shard.length)
    padded = local.new_zeros((local.shape[0], longest, local.shape[2]))
    padded[:, : shard.length] = local
    everyone = padded.new_empty((shard.world, *padded.shape))
    run_collective(gather_equal(), sendable(everyone).view(-1), sendable(padded).view(-1), group=group, what="gather")
    full = assembled([of_rank.narrow(1, 0, size(r)) for of_rank, r in zip(everyone, ranges, strict=True)], ranges, 1)
    return full.reshape(shard.resized(x.shape, shard.length, shard.tokens))


def reduce_scatter(x: Tensor, shard: Shard, group: str) -> Tensor:
    """The local tokens of the sum over ranks of the full-length `x`."""
    longest = max(shard.layout.length(rank, shard.tokens) for rank in range(shard.world))
    full = shard.split(x, shard.tokens)
    padded = full.new_zeros((shard.world, full.shape[0], longest, full.shape[2]))
    for rank in range(shard.world):
        offset = 0
        for start, stop in shard.layout.ranges(rank, shard.tokens):
            padded[rank, :, offset : offset + stop - start] = full[:, start:stop]
            offset += stop - start
    mine = torch.empty_like(padded[0])
    run_collective(sum_and_scatter(), mine.view(-1), padded.view(-1), group=group, what="reduce-scatter")
    return mine[:, : shard.length].reshape(shard.resized(x.shape, shard.tokens, shard.length))


def move(x: Tensor, held: Sequence[Ranges], wanted: Sequence[Ranges], rank: int, group: str) -> Tensor:
    """(before, tokens, after) with the tokens `wanted[rank]`, from those of `held[rank]` on each rank, in that order.

    Wanted ranges may overlap, on one rank and between ranks; only tokens that a rank wants and does not hold are sent.
    """
    return carry(x, among(tuple(held), tuple(wanted), rank), group)


def move_back(grad: Tensor, held: Sequence[Ranges], wanted: Sequence[Ranges], rank: int, group: str) -> Tensor:
    """The transpose of `move`: the values of each token on all ranks, summed on the rank that holds it."""
    return carry_back(grad, among(tuple(held), tuple(wanted), rank), group)


def redistribute(x: Tensor, shard: Shard, other: str, group: str) -> Tensor:
    """The local tokens in layout `other` from those in the layout of `shard`, `x`."""
    plan = between(shard.layout_name, other, shard.world, shard.tokens, shard.rank)
    rows = carry(shard.split(x, shard.length), plan, group)
    return rows.reshape(shard.resized(x.shape, shard.length, rows.shape[1]))


def all_to_all(x: Tensor, held: Shard, wanted: Shard, group: str) -> Tensor:
    """All tokens of the dim of `held`, of which ranks have parts, for the local part of the dim of `wanted`.

    Each rank receives a part of what each other rank has: 1 / P of its tensor from every peer.
    """
    spread, first, second = _spread(x, (held, held.length), (wanted, wanted.tokens))
    ranks = range(held.world)
    ours = [ranged(spread, second, wanted.layout.ranges(r, wanted.tokens)) for r in ranks]
    theirs = [[*spread.shape[:first], held.layout.length(r, held.tokens), *spread.shape[first + 1 :]] for r in ranks]
    for shape in theirs:
        shape[second] = wanted.length
    sizes = [math.prod(shape) for shape in theirs]
    received = spread.new_empty(sum(sizes), 1)
    parts = [sendable(y) for y in (received, torch.cat([part.reshape(-1, 1) for part in ours]))]
    sent = [part.numel() for part in ours]
    run_collective(dist.all_to_all_single, *parts, sizes, sent, group=group, what="all-to-all")
    shards = [part.view(theirs[r]) for r, part in zip(ranks, received.split(sizes), strict=True)]
    full = assembled(shards, [held.layout.ranges(r, held.tokens) for r in ranks], first)
    shape = held.resized(wanted.resized(x.shape, wanted.tokens, wanted.length), held.length, held.tokens)
    return full.reshape(shape).contiguous()


def _spread(x: Tensor, one: tuple[Shard, int], other: tuple[Shard, int]) -> tuple[Tensor, int, int]:
    """`x` with the dims of two shards as (outer, tokens, inner) each, and the positions of their tokens."""
    shape: list[Any] = [*x.shape]
    at: dict[int, int] = {}
    for shard, tokens in sorted((one, other), key=lambda pair: -pair[0].dim):
        rows = shard.outer * tokens
        inner = shape[shard.dim] // rows if rows else 1
        shape[shard.dim : shard.dim + 1] = [shard.outer, tokens, inner]
        at = {position: where + 2 for position, where in at.items()} | {shard.dim: shard.dim + 1}
    return x.reshape(shape), at[one[0].dim], at[other[0].dim]


def ranged(x: Tensor, dim: int, ranges: Ranges) -> Tensor:
    """The elements of `ranges` along `dim`; a view of one range."""
    parts = [x.narrow(dim, a, b - a) for a, b in ranges] or [x.narrow(dim, 0, 0)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def assembled(shards: Sequence[Tensor], ranges: Sequence[Ranges], dim: int) -> Tensor:
    """All elements along `dim` in order, from the shard of each rank, which holds its `ranges`."""
    parts: dict[int, Tensor] = {}
    for shard, of_rank in zip(shards, ranges, strict=True):
        pieces = shard.split([b - a for a, b in of_rank], dim) if of_rank else ()
        parts |= {start: piece for (start, _), piece in zip(of_rank, pieces, strict=True)}
    return torch.cat([parts[start] for start in sorted(parts)], dim)


def halo(x: Tensor, shard: Shard, most: int, left: int, right: int, group: str) -> Tensor:
    """Each range of local tokens with `left` elements before it and `right` after it; zeros beyond the sequence.

    The sequence dim has S * each elements (`each` per token), and `left` and `right` count elements.  The result has
    room for `most` ranges: its sequence dim grows by most * (left + right).  At lengths with fewer ranges, zeros
    follow.
    """
    halo_ranges = HaloRanges(shard, x.shape[shard.dim] // shard.length, left, right)
    rows = move(shard.split(x, x.shape[shard.dim]), halo_ranges.held, halo_ranges.wanted, shard.rank, group)
    length = x.shape[shard.dim] + most * (left + right)
    out = rows.new_zeros((rows.shape[0], length, rows.shape[2]))
    inside = halo_ranges.inside
    for (start, stop), part in zip(inside, rows.split([b - a for a, b in inside], dim=1), strict=True):
        out[:, start:stop] = part
    return out.reshape(*x.shape[: shard.dim], length, *x.shape[shard.dim + 1 :])


def halo_back(grad: Tensor, shard: Shard, each: int, left: int, right: int, group: str) -> Tensor:
    """The transpose of `halo`: sums the cotangents of each element on the rank that holds it."""
    halo_ranges = HaloRanges(shard, each, left, right)
    full = shard.split(grad, grad.shape[shard.dim])
    rows = torch.cat([full[:, :0], *(full[:, start:stop] for start, stop in halo_ranges.inside)], dim=1)
    out = move_back(rows, halo_ranges.held, halo_ranges.wanted, shard.rank, group)
    return out.reshape(*grad.shape[: shard.dim], shard.length * each, *grad.shape[shard.dim + 1 :])


@dataclass(frozen=True)
class HaloRanges:
    """The elements that each rank holds and those that it wants: its ranges of tokens, extended on both sides."""

    shard: Shard
    each: int  # elements of a token
    left: int
    right: int

    @property
    def held(self) -> list[Ranges]:
        """The elements that each rank holds."""
        return [tuple((a * self.each, b * self.each) for a, b in self._ranges(r)) for r in range(self.shard.world)]

    @property
    def wanted(self) -> list[Ranges]:
        """The elements that each rank wants: those of its extended ranges that are in the sequence."""
        most = self.shard.tokens * self.each
        return [
            tuple((max(a, 0), min(b, most)) for a, b in self._wider(rank) if min(b, most) > max(a, 0))
            for rank in range(self.shard.world)
        ]

    @property
    def inside(self) -> Ranges:
        """The rows of `halo`'s result that hold elements of the sequence: those of `wanted`, in its order."""
        most, offset = self.shard.tokens * self.each, 0
        found = []
        for a, b in self._wider(self.shard.rank):
            if min(b, most) > max(a, 0):
                found.append((offset + max(a, 0) - a, offset + min(b, most) - a))
            offset += b - a
        return tuple(found)

    def _wider(self, rank: int) -> list[tuple[int, int]]:
        return [(a * self.each - self.left, b * self.each + self.right) for a, b in self._ranges(rank)]

    def _ranges(self, rank: int) -> Ranges:
        return self.shard.layout.ranges(rank, self.shard.tokens)


def carry(x: Tensor, plan: Redistribution, group: str) -> Tensor:
    """(before, wanted rows, after) from `x`, (before, held rows, after)."""
    rows = x.transpose(0, 1)
    received = _exchanged(rows.index_select(0, plan.row_index.tensor(x)), plan, False, group)
    found: Tensor = torch.cat([rows, received]).index_select(0, plan.found_index.tensor(x)).transpose(0, 1)
    return found.contiguous()


def carry_back(grad: Tensor, plan: Redistribution, group: str) -> Tensor:
    """The transpose of `carry`, added in float32 (float64)."""
    summed = accumulator(grad.dtype) if grad.is_floating_point() else grad.dtype
    shape = plan.held + sum(plan.received), grad.shape[0], grad.shape[2]
    rows: Tensor = grad.new_zeros(shape, dtype=summed)
    rows.index_add_(0, plan.found_index.tensor(grad), grad.transpose(0, 1).to(summed))
    mine, theirs = rows[: plan.held], rows[plan.held :]
    mine.index_add_(0, plan.row_index.tensor(grad), _exchanged(theirs, plan, True, group))
    return mine.to(grad.dtype).transpose(0, 1).contiguous()


def _exchanged(rows: Tensor, plan: Redistribution, back: bool, group: str) -> Tensor:
    """The rows that other ranks send: at most one message per pair of ranks and direction, none if the plan is idle."""
    sent, received = (plan.received, plan.sent) if back else (plan.sent, plan.received)
    out = rows.new_empty((sum(received), *rows.shape[1:]))
    if not plan.idle:
        parts = [sendable(x) for x in (out, rows.contiguous())]
        run_collective(dist.all_to_all_single, *parts, list(received), list(sent), group=group, what="redistribution")
    return out


def start_gather(sent: Tensor, received: Tensor, group: str) -> PendingExchange:
    """Starts to fill `received` with the `sent` of all ranks, 1-D and equally long, in their order.

    Raises PeerError if the process group is broken.
    """
    parts = [sendable(x) for x in (received, sent)]
    return PendingExchange(
        received, sent, [start_collective(gather_equal(), *parts, group=group)], (), group, kind="gather"
    )


def start_collective(
    collective: Callable[..., Any], into: Tensor, *args: object, group: str, what: str = ""
) -> dist.Work:
    """Starts a torch.distributed collective with the result `into`; `what` it is, for errors.

    Raises PeerError if the group is broken.
    """
    return _started(collective, into, *args, group=group, what=what)


def run_collective(collective: Callable[..., object], into: Tensor, *args: object, group: str, what: str = "") -> None:
    """Runs a torch.distributed collective, whose result is `into`; `what` it is, for errors.

    Raises PeerError if a rank is lost, or does not arrive within the limit of the ring.
    """
    with profiled(f"collective {collective.__name__}"):
        work = _started(collective, into, *args, group=group, what=what)
        try:
            await_work([work], RINGS.get(group), into.device)
        except RuntimeError as error:
            raise lost((), error, RINGS.get(group), what) from error


def _started(collective: Callable[..., Any], into: Tensor, *args: object, group: str, what: str) -> dist.Work:
    moved(collective.__name__, into.nbytes)
    try:
        work = collective(into, *args, group=process_group(group), async_op=True)
    except RuntimeError as error:
        raise lost((), error, RINGS.get(group), what) from error
    assert work is not None, "this rank is a member of its ring"
    started: dist.Work = work
    return started
