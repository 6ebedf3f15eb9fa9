"""Chooses the layout of a model, how each site runs over the ranks, and the tile sizes, by estimated time.  No tensors.

    time of a rank    of each site as `ringpass.schedule.attention_time` says; where no machine is described, the larger
                      of its FLOPs and FLOPS_PER_BYTE for each byte that it receives
    way of a site     the fastest of its Ulysses degrees, by ring or all-gather; but the ring over all ranks, or else a
                      ring, if its time is within GOOD of that
    time of a layout  all sites together, each in its way: that of the slowest rank
    candidates        the `automatic` ones of `ringpass.layouts.layout.LAYOUTS`; where that leaves a rank with more than
                      GOOD times the mean, chunks assigned to ranks one by one: the costliest first, to the least loaded
                      rank (longest processing time first, Graham 1969)
    choice            the first candidate whose time is within GOOD of the best: simple layouts move least

A model has one layout, so layers that attend differently, such as sliding and full ones, are balanced together.

Contract: depends on masks, shapes, P and the description of the machine alone, so all ranks choose alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ringpass.amounts import milliseconds, size
from ringpass.layouts.layout import CONTIGUOUS, LAYOUTS, STRIPES, assigned
from ringpass.masks.constants import Array
from ringpass.masks.expr import Expr, parts
from ringpass.masks.intervals import FULL_CODE, PARTIAL_CODE
from ringpass.schedule.attention_time import RING, Load, Times, Traffic, Way
from ringpass.schedule.machine import UNDESCRIBED, Machine
from ringpass.schedule.tiles import CAUSAL_CODE, FINEST, MIRRORED_CODE, THIN, TILE, Problem, Tiling, tiling

CANDIDATES = {name: scheme for name, scheme in LAYOUTS.items() if scheme.automatic}
FLOPS_PER_BYTE = 100.0  # of a machine that is not described: some 50 on a CPU core, thousands on a GPU
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
class SiteChoice:
    """How an attention runs, and the estimated times of all ways on a described machine, the chosen one first."""

    way: Way
    weighed: tuple[tuple[Way, Times], ...] = ()

    def describe(self, world: int) -> list[str]:
        """A line for the chosen way, and for each one that was rejected; none where there was no choice."""
        if len(self.weighed) < 2:
            return []
        verdicts = ["chosen", *["rejected"] * (len(self.weighed) - 1)]
        lines = zip(verdicts, self.weighed, strict=True)
        return [f"{verdict}: {way.name(world)}, {times}" for verdict, (way, times) in lines]


@dataclass(frozen=True)
class Estimate:
    """What a layout costs, all attentions together, each in the best way for it.

    `flops`: of the busiest rank in a forward; `mean_flops`: of the mean rank; `bytes`: received in a forward by the
    rank that receives most; `time`: estimated, of the slowest rank, in seconds on a described machine, else in FLOPs;
    `described`: whether the machine is.
    """

    layout: str
    flops: float
    mean_flops: float
    bytes: float
    time: float
    choices: tuple[SiteChoice, ...] = ()
    described: bool = False

    @property
    def imbalance(self) -> float:
        """FLOPs of the busiest rank over those of the mean one; 1 is perfect balance."""
        return self.flops / self.mean_flops if self.mean_flops else 1.0

    def __str__(self) -> str:
        received = f"{size(self.bytes)} received at most"
        estimated = f", {milliseconds(self.time)} ms estimated" if self.described else ""
        return f"{self.layout}: {self.imbalance:.3f} x the mean work at most, {received}{estimated}"


def choose(
    loads: Sequence[Load],
    world: int,
    fixed: bool,
    machine: Machine = UNDESCRIBED,
    ways: Sequence[Sequence[Way]] | None = None,
    layouts: Sequence[str] = (),
) -> list[Estimate]:
    """Estimates of the layouts tried for `loads` on `world` ranks, the chosen one first.

    `fixed`: all calls have the lengths of `loads`.  At other lengths, chunks that are assigned one by one could leave a
    rank without tokens.  `ways`: those that are weighed for each load; None: a ring over all ranks.  `layouts`: those
    that are tried; none: all that fit.
    """
    allowed = [tuple(of) for of in ways] if ways is not None else [(Way(),)] * len(loads)
    if layouts:
        tried = [estimate(loads, name, world, machine, allowed) for name in layouts]
    else:
        tried = _tried(loads, world, fixed, machine, allowed)
    chosen = _first_good(tried)
    return [chosen, *(t for t in tried if t is not chosen)]


def _tried(
    loads: Sequence[Load], world: int, fixed: bool, machine: Machine, ways: Sequence[tuple[Way, ...]]
) -> list[Estimate]:
    shortest = min((n for load in loads for n in (load.problem.queries, load.problem.keys)), default=0)
    chunks = STRIPES * world
    fine = chunks <= MOST_CHUNKS and shortest >= SHORTEST * chunks
    names = [name for name, scheme in CANDIDATES.items() if fine or not scheme.fine]
    tried = [estimate(loads, name, world, machine, ways) for name in names]
    if fine and fixed and _first_good(tried).imbalance > GOOD:
        tried.append(estimate(loads, solve(loads, world), world, machine, ways))
    return tried


def _first_good(tried: Sequence[Estimate]) -> Estimate:
    best = min(t.time for t in tried)
    return next(t for t in tried if t.time <= GOOD * best)


def estimate(
    loads: Sequence[Load],
    layout: str,
    world: int,
    machine: Machine = UNDESCRIBED,
    ways: Sequence[tuple[Way, ...]] | None = None,
) -> Estimate:
    """The cost of all attentions under one layout; those that are alike are weighed once."""
    flops, received, seconds = np.zeros(world), np.zeros(world), np.zeros(world)
    known: dict[tuple[Load, tuple[Way, ...]], tuple[SiteChoice, Array, Array]] = {}
    choices = []
    for load, allowed in zip(loads, ways or [(Way(),)] * len(loads), strict=True):
        if (load, allowed) not in known:
            traffic = Traffic(in_layout(load, layout, world), world)
            choice = _choose_way(traffic, allowed, machine)
            known[load, allowed] = choice, traffic.flops(choice.way.degree), traffic.received(choice.way)
        choice, of_flops, of_bytes = known[load, allowed]
        flops, received = flops + of_flops, received + of_bytes
        seconds = seconds + (choice.weighed[0][1].total if choice.weighed else 0)
        choices.append(choice)
    if machine is UNDESCRIBED:
        seconds = np.maximum(flops, received * FLOPS_PER_BYTE)
    totals = float(flops.max()), float(flops.mean()), float(received.max()), float(seconds.max())
    return Estimate(layout, *totals, tuple(choices), machine is not UNDESCRIBED)


def _choose_way(traffic: Traffic, ways: Sequence[Way], machine: Machine) -> SiteChoice:
    """The first way, or else the fastest ring, or else the fastest way: whichever first is within GOOD of the best."""
    if machine is UNDESCRIBED:
        (way,) = ways
        return SiteChoice(way)
    found = [(way, traffic.times(way, machine)) for way in ways]
    fastest, *others = sorted(found, key=lambda x: x[1].slowest)
    rings = [x for x in (fastest, *others) if x[0].comm == RING]
    chosen = next(x for x in (found[0], *rings, fastest) if x[1].slowest <= GOOD * fastest[1].slowest)
    return SiteChoice(chosen[0], (chosen, *(x for x in (fastest, *others) if x is not chosen)))


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


def in_layout(load: Load, layout: str, world: int) -> Load:
    """`load` with the sharded sides of its problems in `layout`."""
    groups = tuple(replace(group, problem=with_layout(group.problem, layout, world)) for group in load.groups)
    return replace(load, problem=with_layout(load.problem, layout, world), groups=groups)


def solve(loads: Sequence[Load], world: int) -> str:
    """The name of a layout with STRIPES chunks per rank that gives all ranks about equal FLOPs."""
    chunks = STRIPES * world
    cost: Array = np.zeros(chunks)
    for part, flops in [(part, load.pair_flops * part.heads) for load in loads for part in load.parts]:
        cost += flops * tiling(with_layout(part.problem, CONTIGUOUS, chunks)).areas(chunks)
    owners, sums, counts = [0] * chunks, [0.0] * world, [0] * world
    for chunk in np.argsort(-cost, kind="stable").tolist():
        rank = min((r for r in range(world) if counts[r] < STRIPES), key=lambda r: (sums[r], r))
        owners[chunk] = rank
        sums[rank] += float(cost[chunk])
        counts[rank] += 1
    return assigned(owners)
