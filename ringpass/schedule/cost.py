"""Chooses the layout of a model and the tile sizes of its sites by estimated time.  No tensors.

    time of a rank    the larger of its tiles' FLOPs and BALANCE FLOPs for each byte of keys and values that it receives
    time of a layout  that of its slowest rank
    candidates        the `automatic` ones of `ringpass.layouts.layout.LAYOUTS`; where that leaves a rank with more than
                      GOOD times the mean, chunks assigned to ranks one by one: the costliest first, to the least loaded
                      rank (longest processing time first, Graham 1969)
    choice            the first candidate whose time is within GOOD of the best: simple layouts move least

A model has one layout, so layers that attend differently, such as sliding and full ones, are balanced together.

Contract: depends on masks, shapes and P alone, so all ranks choose alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ringpass.layouts.layout import CONTIGUOUS, LAYOUTS, STRIPES, assigned
from ringpass.masks.constants import Array
from ringpass.masks.expr import Expr, parts
from ringpass.masks.intervals import FULL_CODE, PARTIAL_CODE
from ringpass.schedule.tiles import CAUSAL_CODE, FINEST, MIRRORED_CODE, THIN, TILE, Problem, Tiling, tiling

CANDIDATES = {name: scheme for name, scheme in LAYOUTS.items() if scheme.automatic}
BALANCE = 100.0  # FLOPs that a device computes while it receives a byte: some 50 on a CPU core, thousands on a GPU
SPARED = 0.05  # relative difference in price that larger tiles may cost
MANY = 1 << 13  # with at least this many tiles of a site, all partial, no finer ones are tried
GOOD = 1.02  # largest over mean FLOPs of a rank
MOST_CHUNKS, SHORTEST = 1024, 8  # layouts of more chunks, or of chunks of fewer tokens, are not tried


@dataclass(frozen=True)
class Price:
    """What a tile costs on a device, in (query, key) pairs of a large full tile.

    In a triangle, about half of `skip` keys that a row does not see are computed for it all the same.  A pair whose
    mask is evaluated costs `mask`.  `few` holds (rows, factor) pairs: a pair in a tile with fewer query rows costs
    `factor`.  Each query row costs `row` (for its merge), each kernel launch `launch`, and each operation of a mask
    `operation` in each tile where the mask is evaluated.
    """

    skip: int
    mask: float
    few: tuple[tuple[int, float], ...]
    row: float
    launch: float
    operation: float

    def of(self, tiles: Tiling, mask: Expr) -> float:
        """The price of all `tiles` of `mask`, in (query, key) pairs of a large full tile."""
        n, m, partial = tiles.q[1] - tiles.q[0], tiles.k[1] - tiles.k[0], tiles.kind == PARTIAL_CODE
        seen = np.where(np.isin(tiles.kind, [CAUSAL_CODE, MIRRORED_CODE]), (m + self.skip) / 2, m)
        pair = np.where(partial, self.mask, 1.0)
        for rows, factor in self.few:
            pair = np.where(n < rows, np.maximum(pair, factor), pair)
        launches = (self.row * n + self.launch) * _begins_launch(tiles)
        evaluated = self.operation * _operations(mask) * partial
        return float((n * np.minimum(seen, m) * pair + launches + evaluated).sum())


def _operations(expr: Expr) -> int:
    return 1 + sum(map(_operations, parts(expr)))


def _begins_launch(tiles: Tiling) -> Array:
    """Whether a tile is the first of its launch: thin full ones of the same rows share launches of TILE keys."""
    width = tiles.k[1] - tiles.k[0]
    thin = np.flatnonzero((tiles.kind == FULL_CODE) & (width < THIN))
    rows = np.stack([x[thin] for x in (tiles.dst, tiles.src, *tiles.q)])
    other = np.concatenate([[True], (np.diff(rows) != 0).any(0)])[: len(thin)]
    before = np.cumsum(width[thin]) - width[thin]
    launch = (before - np.maximum.accumulate(np.where(other, before, 0))) // TILE
    out = np.ones(len(tiles), dtype=bool)
    out[thin] = other | np.concatenate([[True], np.diff(launch) != 0])[: len(thin)]
    return out


PRICES = {
    "cpu": Price(skip=170, mask=1.2, few=((768, 1.08), (192, 1.25)), row=12.0, launch=4e3, operation=2e2),
    "cuda": Price(skip=128, mask=1.5, few=(), row=7.0, launch=2e5, operation=2e5),
}
"""CPU: measured with torch's flash op (forward and backward, 8 heads of width 64).  CUDA: a guess, not measured."""


@dataclass(frozen=True)
class Load:
    """What the cost of a site depends on: its problem, FLOPs per (query, key) pair, bytes sent per key token."""

    problem: Problem
    flops: float
    bytes: float


@dataclass(frozen=True)
class Estimate:
    """What a layout costs, all sites together.

    `flops`: of the busiest rank; `mean_flops`: of the mean rank; `bytes`: received by the rank that receives most;
    `time`: estimated, of the slowest rank, in FLOPs of a device.
    """

    layout: str
    flops: float
    mean_flops: float
    bytes: float
    time: float

    @property
    def imbalance(self) -> float:
        """FLOPs of the busiest rank over those of the mean one; 1 is perfect balance."""
        return self.flops / self.mean_flops if self.mean_flops else 1.0

    def __str__(self) -> str:
        received = f"{self.bytes / 2**20:.4g} MiB received at most"
        return f"{self.layout}: {self.imbalance:.3f} x the mean work at most, {received}"


def choose(loads: Sequence[Load], world: int, fixed: bool) -> list[Estimate]:
    """Estimates of the layouts tried for `loads` on `world` ranks, the chosen one first.

    `fixed`: all calls have the lengths of `loads`.  At other lengths, chunks that are assigned one by one could leave a
    rank without tokens.
    """
    shortest = min((n for load in loads for n in (load.problem.queries, load.problem.keys)), default=0)
    chunks = STRIPES * world
    fine = chunks <= MOST_CHUNKS and shortest >= SHORTEST * chunks
    tried = [estimate(loads, name, world) for name, scheme in CANDIDATES.items() if fine or not scheme.fine]
    if fine and fixed and _first_good(tried).imbalance > GOOD:
        tried.append(estimate(loads, solve(loads, world), world))
    chosen = _first_good(tried)
    return [chosen, *(t for t in tried if t is not chosen)]


def _first_good(tried: Sequence[Estimate]) -> Estimate:
    best = min(t.time for t in tried)
    return next(t for t in tried if t.time <= GOOD * best)


def estimate(loads: Sequence[Load], layout: str, world: int) -> Estimate:
    """The cost of all sites under one layout."""
    flops, received = np.zeros(world), np.zeros(world)
    for load in loads:
        tiles = tiling(with_layout(load.problem, layout, world))
        flops += load.flops * tiles.areas(world)
        received += load.bytes * tiles.received(world)
    time = float(np.maximum(flops, BALANCE * received).max())
    return Estimate(layout, float(flops.max()), float(flops.mean()), float(received.max()), time)


def refine(problems: Sequence[Problem], device: str) -> int:
    """The largest tile edge, in tokens, whose price on `device` ("cpu" or "cuda") is within SPARED of the best.

    `problems`: one per head group of a site.

    A partial tile is computed in full, so small tiles waste less on a narrow mask; but kernels run them slower, and
    each costs a launch and a merge.  The edge is halved, starting from the default, until the tiles are many and their
    number multiplies: then the mask is partial everywhere, and smaller tiles gain nothing.
    """
    flat = [with_layout(problem, CONTIGUOUS, problem.world) for problem in problems]
    edges, counts, paid = [TILE], list[int](), list[float]()
    while True:
        found = [tiling(replace(problem, tile=edges[-1])) for problem in flat]
        counts.append(sum(map(len, found)))
        paid.append(sum(PRICES[device].of(x, p.expr) for x, p in zip(found, flat, strict=True)))
        multiply = len(counts) > 1 and counts[-1] >= max(3 * counts[-2], MANY)
        if edges[-1] <= FINEST or multiply:
            return next(e for e, p in zip(edges, paid, strict=True) if p <= (1 + SPARED) * min(paid))
        edges.append(edges[-1] // 2)


def with_layout(problem: Problem, layout: str, world: int) -> Problem:
    """`problem` with its sharded sides in `layout`."""
    sides = (problem.query_layout, problem.key_layout)
    query, key = (side if side.replicated else replace(side.with_scheme(layout), world=world) for side in sides)
    return replace(problem, query_layout=query, key_layout=key)


def solve(loads: Sequence[Load], world: int) -> str:
    """The name of a layout with STRIPES chunks per rank that gives all ranks about equal FLOPs."""
    chunks = STRIPES * world
    cost: Array = np.zeros(chunks)
    for load in loads:
        cost += load.flops * tiling(with_layout(load.problem, CONTIGUOUS, chunks)).areas(chunks)
    owners, sums, counts = [0] * chunks, [0.0] * world, [0] * world
    for chunk in np.argsort(-cost, kind="stable").tolist():
        rank = min((r for r in range(world) if counts[r] < STRIPES), key=lambda r: (sums[r], r))
        owners[chunk] = rank
        sums[rank] += float(cost[chunk])
        counts[rank] += 1
    return assigned(owners)
