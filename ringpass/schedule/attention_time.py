"""The estimated time of one attention on all ranks, from the tiles of its schedule and a machine.  No tensors.

    time of a rank = compute       FLOPs of its tiles over the FLOP/s that tiles of their size attain
                   + calls         one for each step, one for each tile whose mask is evaluated
                   + merges        results of each step but the local one, read and written in the accumulator's dtype
                   + transfers     of each step, what the tiles that are computed meanwhile do not hide
                   + all-to-alls   of a Ulysses degree above 1: of queries, of keys and values, of the result

A *way* is a Ulysses degree, and how keys and values reach the ranks of a ring.  All-gather is hidden by the local tiles
alone; the keys of all other ranks are then one block.  A backward, where the graph has one, computes 2.5 times the
FLOPs in twice the calls, and moves besides keys and values their gradients, in the accumulator's dtype.

Contract: depends on its arguments alone, so all ranks find the same times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ringpass.amounts import milliseconds
from ringpass.masks.constants import Array
from ringpass.masks.intervals import PARTIAL_CODE, IntervalArrays
from ringpass.schedule.head_shares import head_shares
from ringpass.schedule.machine import Machine
from ringpass.schedule.tiles import Problem, Tiling, tiling

RING, ALLGATHER = "ring", "allgather"
REMOTE_CALLS = 2  # of the tiles of all gathered keys that need no mask, at most
BACKWARD_FLOPS, BACKWARD_CALLS, BACKWARD_MERGES = 2.5, 2, 1.5  # of a backward, over those of a forward


@dataclass(frozen=True)
class Group:
    """A head group of a dilated attention: its problem, its query heads, the K/V heads that these read."""

    problem: Problem
    heads: int
    key_heads: int


@dataclass(frozen=True)
class Load:
    """What the cost of an attention depends on.

    `widths`: of a head of keys and of values; `itemsize`: bytes per element; `backward`: whether it has one; `groups`:
    the head groups of a dilated one.
    """

    problem: Problem
    heads: int
    key_heads: int
    widths: tuple[int, int]
    itemsize: int
    batch: int = 1
    backward: bool = False
    groups: tuple[Group, ...] = ()

    @property
    def parts(self) -> tuple[Group, ...]:
        """The head groups; of an attention that is not dilated, one of all heads."""
        return self.groups or (Group(self.problem, self.heads, self.key_heads),)

    @property
    def pair_flops(self) -> float:
        """FLOPs of a forward per (query, key) pair and head."""
        return 2.0 * sum(self.widths) * self.batch

    @property
    def head_bytes(self) -> float:
        """Bytes of a key and a value of one head, of all samples."""
        return float(sum(self.widths) * self.itemsize * self.batch)

    @property
    def key_bytes(self) -> float:
        """Bytes of all keys and values."""
        return self.problem.keys * self.key_heads * self.head_bytes

    @property
    def sum_size(self) -> int:
        """Bytes per element of the accumulator."""
        return max(4, self.itemsize)


@dataclass(frozen=True)
class Way:
    """How an attention runs over the ranks: its Ulysses degree, and how K and V come ("ring" or "allgather")."""

    degree: int = 1
    comm: str = RING

    def name(self, world: int) -> str:
        """For people, on `world` ranks."""
        if self.degree == world > 1:
            return f"ulysses degree {self.degree}"
        return f"ulysses degree {self.degree}, {'all-gather' if self.comm == ALLGATHER else 'ring'}"


@dataclass(frozen=True, eq=False)
class Times:
    """Seconds of each rank, (P,) each."""

    compute: Array
    calls: Array
    merges: Array
    transfers: Array
    all_to_alls: Array

    @cached_property
    def total(self) -> Array:
        """In all."""
        found: Array = self.compute + self.calls + self.merges + self.transfers + self.all_to_alls
        return found

    @property
    def slowest(self) -> float:
        """Of the slowest rank."""
        return float(self.total.max())

    def __str__(self) -> str:
        rank = int(self.total.argmax())
        named = {"compute": self.compute, "calls": self.calls, "merges": self.merges}
        named |= {"exposed transfers": self.transfers, "all-to-alls": self.all_to_alls}
        parts = ", ".join(f"{name} {milliseconds(x[rank])}" for name, x in named.items() if x[rank] > 0)
        return f"{milliseconds(self.slowest)} ms ({parts})"


# --- what each rank computes and receives -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Covered:
    """Intervals of tokens, by the number of a pair of ranks: sorted, and none touches another one of its pair."""

    pair: Array
    start: Array
    stop: Array

    @staticmethod
    def of(pair: Array, spans: IntervalArrays) -> Covered:
        """The unions of `spans`, pair by pair."""
        width = int(spans[1].max(initial=0)) + 1
        order = np.argsort(pair * width + spans[0], kind="stable")
        pair, start, stop = pair[order], spans[0][order], spans[1][order]
        offset = pair * width  # keeps the pairs apart in one running maximum
        reached = np.maximum.accumulate(stop + offset)
        begins = np.concatenate([[True], (start + offset)[1:] > reached[:-1]])[: len(pair)]
        ends = np.concatenate([begins[1:], [True]])[: len(pair)]
        return Covered(pair[begins], start[begins], (reached - offset)[ends])

    def pooled(self, world: int, degree: int) -> Covered:
        """The unions over groups of `degree` neighbouring ranks."""
        dst, src = self.pair // world // degree, self.pair % world // degree
        return Covered.of(dst * (world // degree) + src, (self.start, self.stop))

    def tokens(self, world: int) -> Array:
        """(world, world): the numbers of tokens of each pair."""
        return np.bincount(self.pair, self.stop - self.start, world * world).reshape(world, world)

    def of_others(self, world: int) -> Array:
        """(world,): the numbers of tokens of each rank that pairs with other ranks have, each token once."""
        remote = self.pair // world != self.pair % world
        found = Covered.of(self.pair[remote] // world, (self.start[remote], self.stop[remote]))
        return np.bincount(found.pair, found.stop - found.start, world)


@dataclass(frozen=True, eq=False)
class Pairs:
    """What each rank computes with the keys of each rank: (world, world) arrays by [rank of queries, rank of keys].

    `whole`, `partial`: (query, key) pairs in tiles without and with an evaluated mask; `masked`: how many of the
    latter; `queries`, `keys`: the tokens that the tiles cover.
    """

    world: int
    whole: Array
    partial: Array
    masked: Array
    queries: Covered
    keys: Covered

    @property
    def counts(self) -> tuple[Array, ...]:
        """Those of tiles."""
        return self.whole, self.partial, self.masked

    @staticmethod
    def of(tiles: Tiling, world: int) -> Pairs:
        """Those of all tiles."""
        pair, masked = tiles.dst * world + tiles.src, tiles.kind == PARTIAL_CODE

        def total(x: Array) -> Array:
            return np.bincount(pair, x, world * world).reshape(world, world)

        counted = total(np.where(masked, 0, tiles.area)), total(np.where(masked, tiles.area, 0)), total(masked * 1.0)
        return Pairs(world, *counted, Covered.of(pair, tiles.q), Covered.of(pair, tiles.k))

    def pooled(self, degree: int) -> Pairs:
        """With the tokens of each `degree` neighbouring ranks on one of them."""
        if degree == 1:
            return self
        n = self.world // degree
        covered = (x.pooled(self.world, degree) for x in (self.queries, self.keys))
        counted = (x.reshape(n, degree, n, degree).sum((1, 3)) for x in self.counts)
        return Pairs(n, *counted, *covered)


class Traffic:
    """The `Pairs` of each part of a load, for each degree."""

    def __init__(self, load: Load, world: int) -> None:
        self.load, self.world = load, world
        self.tilings = [tiling(part.problem) for part in load.parts]
        self.found: dict[int, list[Pairs]] = {}

    def of(self, degree: int) -> list[Pairs]:
        """Made from those of the largest degree so far that divides `degree`."""
        if not self.found:
            self.found[1] = [Pairs.of(tiles, self.world) for tiles in self.tilings]
        if degree not in self.found:
            base = max(d for d in self.found if degree % d == 0)
            self.found[degree] = [pairs.pooled(degree // base) for pairs in self.found[base]]
        return self.found[degree]

    def flops(self, degree: int) -> Array:
        """(P,): FLOPs of each rank in a forward: ranks that pool their tokens share those of all of them."""
        parts = zip(self.load.parts, self.tilings, strict=True)
        found = np.zeros(self.world)
        for part, tiles in parts:
            found += self.load.pair_flops * part.heads * tiles.areas(self.world)
        return np.repeat(found.reshape(-1, degree).mean(1), degree)

    def received(self, way: Way) -> Array:
        """(P,): bytes that each rank receives in a forward: keys and values, and by all-to-alls."""
        load, world = self.load, self.world
        if way.comm == ALLGATHER:
            return np.full(world, load.key_bytes * (world - 1) / world)
        if way.degree == 1:
            found = np.zeros(world)
            for part, tiles in zip(load.parts, self.tilings, strict=True):
                found += load.head_bytes * part.key_heads * tiles.received(world)
            return found
        pooled = all_to_all_bytes(load, way.degree, world).sum(2).reshape(-1)
        return np.asarray(np.repeat(self._keys(way.degree).sum(1), way.degree) + pooled)

    def _keys(self, degree: int) -> Array:
        """(P / U, P / U): bytes of keys and values that a member of one group receives from one of another one."""
        found = np.zeros((self.world // degree,) * 2)
        shares = head_shares(self.load.heads, self.load.key_heads, degree)
        most = max(len(share.key_heads) for share in shares)
        for part, pairs in zip(self.load.parts, self.of(degree), strict=True):
            heads = most if part.heads == self.load.heads else max(1, part.key_heads / degree)
            found += heads * self.load.head_bytes * pairs.keys.tokens(len(found))
        np.fill_diagonal(found, 0)
        return found

    # --- seconds ----------------------------------------------------------------------------------------------------

    def times(self, way: Way, machine: Machine) -> Times:
        """Seconds of each rank."""
        if way.comm == ALLGATHER:
            return self._gathered_times(machine)
        load, n = self.load, self.world // way.degree
        compute, calls, merges = (np.zeros((n, n)) for _ in range(3))
        for part, pairs in zip(load.parts, self.of(way.degree), strict=True):
            heads = -(-part.heads // way.degree)
            compute += load.pair_flops * heads * _seconds_per_flop(pairs.counts, part.problem.tile, machine)
            calls += (pairs.whole > 0) + pairs.masked
            merges += heads * self._merged_bytes * pairs.queries.tokens(n)
        np.fill_diagonal(merges, 0)
        received, transfers = self._keys(way.degree), np.zeros(n)
        for flops, more in self._phases:
            transfers += _exposed(compute * flops, received * more, way, machine)
        of_groups = (compute.sum(1), calls.sum(1), merges.sum(1), transfers)
        spread = [np.repeat(x, way.degree) for x in of_groups]
        return self._times(spread, _all_to_all_seconds(load, way.degree, self.world, machine), machine)

    @property
    def _phases(self) -> list[tuple[float, float]]:
        """(FLOPs, bytes of keys, values and their gradients) of the forward and the backward, over the forward's."""
        load = self.load
        return [(1.0, 1.0)] + [(BACKWARD_FLOPS, 1 + load.sum_size / load.itemsize)] * load.backward

    @property
    def _merged_bytes(self) -> int:
        """Bytes read and written when a query's result of one head is merged into that of other keys."""
        load = self.load
        return load.batch * load.widths[1] * (2 * load.sum_size + load.itemsize)

    def _times(self, of_forward: Sequence[Array], all_to_alls: Array, machine: Machine) -> Times:
        """Those of forward and backward, from seconds, calls and merged bytes of a forward, and all transfers."""
        (compute, calls, merges, transfers), backward = of_forward, int(self.load.backward)
        return Times(
            compute * (1 + BACKWARD_FLOPS * backward),
            calls * machine.call_seconds * (1 + BACKWARD_CALLS * backward),
            merges / machine.memory_bandwidth * (1 + BACKWARD_MERGES * backward),
            transfers,
            all_to_alls,
        )

    def _gathered_times(self, machine: Machine) -> Times:
        """Seconds where all keys are gathered beside the local tiles, and those of other ranks are one block."""
        load, n = self.load, self.world
        local, remote, calls, merges = (np.zeros(n) for _ in range(4))
        for part, pairs in zip(load.parts, self.of(1), strict=True):
            own = tuple(np.diagonal(x) for x in pairs.counts)
            others = tuple(x.sum(1) - np.diagonal(x) for x in pairs.counts)
            flops = load.pair_flops * part.heads
            local += flops * _seconds_per_flop(own, part.problem.tile, machine)
            remote += flops * _seconds_per_flop(others, part.problem.tile, machine)
            calls += (own[0] > 0) + own[2] + REMOTE_CALLS * (others[0] > 0) + others[2]
            merges += part.heads * self._merged_bytes * pairs.queries.of_others(n)
        link = machine.dimensions[int(machine.dimension_between(0, n - 1))]
        moved, latency = load.key_bytes * (n - 1) / n / link.bandwidth, link.collective_seconds
        transfers = np.maximum(moved + latency - local, 0)
        if load.backward:  # keys again, then the sums of the gradients of K and of V
            returned = moved * load.sum_size / load.itemsize + 2 * latency
            transfers += np.maximum(moved + latency - BACKWARD_FLOPS * local, 0) + returned
        return self._times((local + remote, calls, merges, transfers), np.zeros(n), machine)


def _seconds_per_flop(counts: tuple[Array, ...], tile: int, machine: Machine) -> Array:
    """(query, key) pairs over the FLOP/s that tiles of their size attain; `counts`: as those of `Pairs`."""
    whole, partial, masked = counts
    each = np.minimum(tile, np.sqrt(partial / np.maximum(masked, 1)))
    found: Array = whole / machine.rate(np.sqrt(whole)) + partial / machine.rate(each)
    return found


def _exposed(compute: Array, received: Array, way: Way, machine: Machine) -> Array:
    """Seconds of each rank in which transfers run and no tile does: the tiles of the step before hide a transfer."""
    n = len(compute)
    rank, step = np.arange(n)[:, None], np.arange(n)[None, :]
    source = (rank - step) % n
    compute, received = (np.take_along_axis(x, source, 1) for x in (compute, received))
    members = (0, way.degree - 1)
    joined = [machine.dimension_between(rank * way.degree + m, source * way.degree + m) for m in members]
    dimension = np.maximum(*joined)
    bandwidth = np.array([x.bandwidth for x in machine.dimensions])[dimension]
    latency = np.array([x.p2p_seconds for x in machine.dimensions])[dimension]
    transfer = np.where(received > 0, received / bandwidth + latency, 0)
    active = np.where((compute > 0) | (step == 0), step, 0)
    before = np.concatenate([np.zeros((n, 1), int), np.maximum.accumulate(active, 1)[:, :-1]], 1)
    beside = np.take_along_axis(compute, before, 1)
    found: Array = np.maximum(transfer - beside, 0).sum(1)
    return found


# --- all-to-alls ------------------------------------------------------------------------------------------------------


def all_to_all_bytes(load: Load, degree: int, world: int, backward: bool = False) -> Array:
    """(P / U, U, U): bytes that a member of each group receives from each other one, by [group, member, other].

    In a forward, the all-to-alls before the attention bring the other's tokens of the member's share of the heads, the
    one after it the member's own tokens of the other's share.  In a backward the gradients go the other way; those of
    K/V heads that several members read are summed in the accumulator's dtype.
    """
    problem, shape = load.problem, (world // degree, degree)
    sides = (problem.query_layout, problem.queries), (problem.key_layout, problem.keys)
    queries, keys = (
        np.array([0 if layout.replicated else layout.length(rank, tokens) for rank in range(world)]).reshape(shape)
        for layout, tokens in sides
    )
    shares = head_shares(load.heads, load.key_heads, degree)
    heads = np.array([len(share.heads) for share in shares])
    key_heads = np.array([len({*share.key_heads}) for share in shares])
    read = [head for share in shares for head in share.key_heads]
    summed = load.sum_size if len({*read}) < len(read) else load.itemsize
    q, v = load.widths
    if not backward:
        arriving = queries[:, None, :] * heads[:, None] * q + keys[:, None, :] * key_heads[:, None] * (q + v)
        found = load.itemsize * (arriving + queries[:, :, None] * heads * v)
    else:
        arriving = queries[:, None, :] * heads[:, None] * v + queries[:, :, None] * heads * q
        found = load.itemsize * arriving + summed * keys[:, :, None] * key_heads * (q + v)
    found = found * load.batch * (1 - np.eye(degree, dtype=int))
    return np.asarray(found)


def _all_to_all_seconds(load: Load, degree: int, world: int, machine: Machine) -> Array:
    """(P,): seconds of the three all-to-alls of a forward, and of the three of a backward."""
    if degree == 1:
        return np.zeros(world)
    rank = np.arange(world).reshape(-1, degree)
    dimension = machine.dimension_between(rank[:, :, None], rank[:, None, :])
    crossed = np.array([x.collective_seconds for x in machine.dimensions])[dimension.max((1, 2))]
    out = np.zeros(rank.shape)
    for backward in (False, True)[: 1 + load.backward]:
        moved = all_to_all_bytes(load, degree, world, backward)
        each = [np.where(dimension == i, moved, 0).sum(2) / x.bandwidth for i, x in enumerate(machine.dimensions)]
        out += np.maximum.reduce(each) + 3 * crossed[:, None]
    return out.reshape(-1)
