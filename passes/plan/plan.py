"""plan: sites + sequence axes -> one layout per axis and one schedule problem per site.  No tensors.

    axes: the factor classes of the query and key dims of the sites, and of other slices of their sequences (`axes`)
    one rank: no axis, each site replicated
    of two axes of which one is in the batch of the other's attentions, the longer is held (`axes`)
    an axis of S <= 2P tokens stays replicated (for a symbolic S this guard comes first, the same on all ranks)
    layouts: the scheme of least estimated time, along the curve that `curve_order` finds; how each site runs over the
    ranks is chosen with it (`ways`)

Contract: depends on the graph, the options, the name of the CUDA device and P alone, never on the rank, on time or on a
measurement.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from ringpass.config import RingConfig
from ringpass.layouts.hilbert import Order
from ringpass.layouts.layout import Layout, following
from ringpass.masks.expr import TRUE, loads
from ringpass.nodes import hint_of
from ringpass.passes.detect.site import AttentionSite
from ringpass.passes.plan.axes import aligned_axes, held_axes, tokens_of
from ringpass.passes.plan.curve_order import find_order, in_curve_order, of_length
from ringpass.passes.plan.dilated_sites import dilations
from ringpass.passes.plan.units import slices_of_units, unit_factors
from ringpass.passes.plan.ways import Chosen, Sharded, Weighed, choose_ways, load_of
from ringpass.passes.propagate.axis import Axis
from ringpass.passes.propagate.factors import Factor, Sweep
from ringpass.precision import accumulator
from ringpass.schedule.attention_time import ALLGATHER, RING, Way, all_to_all_bytes
from ringpass.schedule.block_selection import TopBlocks
from ringpass.schedule.cost import PRICES, SiteChoice, refine
from ringpass.schedule.dilation import Dilation, GroupProblem, group_problems
from ringpass.schedule.head_shares import HeadShare, head_shares
from ringpass.schedule.messages import received
from ringpass.schedule.program import Program, program
from ringpass.schedule.tiles import TILE, Problem, tiling

SHOWN_RANKS = 64  # up to this many ranks, the plan's text says what each receives
FEW = 2  # queries move instead of keys if that is this many times fewer bytes
MAX_PRUNING_ELEMENTS = 2**24  # leaves of at most this many elements may prune the schedule of each call


@dataclass(frozen=True)
class SitePlan:
    """Where a site's queries and keys live.  None: replicated on every rank.

    `problem` None: the site runs replicated, as the model wrote it.  A site with a problem but no axis is computed by
    every rank alone, as a ring of one: because P = 1, or because an option changes what it attends to.  One with a key
    axis alone is split: each rank attends with all queries to its own keys, and the results are merged over ranks.
    """

    site: AttentionSite
    query_axis: Axis | None
    key_axis: Axis | None
    problem: Problem | None
    ordered: AttentionSite  # the site as it runs: its expressions over curve positions, where tokens are along a curve
    pruning: tuple[int, ...] = ()  # the leaves whose values prune the schedule of each call
    dilation: Dilation | None = None
    learned: tuple[int, ...] = ()  # the leaves that need a gradient
    unread: str = ""  # why the site runs as the model wrote it, though others like it are partitioned
    keyless: SitePlan | None = None  # of the rows that see no key; without a problem: they give the mean of all values
    degree: int = 1  # the Ulysses degree
    comm: str = RING  # how K and V of other ranks come: "ring" or "allgather"
    moves_queries: bool = False  # whether all ranks get the queries of the axis, which move less than keys would
    choice: SiteChoice | None = None  # how it might have run, with the estimated times; None: nothing was weighed
    refused: tuple[str, ...] = ()  # ways that were not weighed, and why

    @property
    def weighed(self) -> tuple[str, ...]:
        """How it might have run, for the plan's text: the chosen way first."""
        world = self.problem.world if self.problem else 1
        return (*(self.choice.describe(world) if self.choice else ()), *self.refused)

    @property
    def sharded(self) -> bool:
        """Whether the site runs over the ranks."""
        return self.query_axis is not None or self.key_axis is not None

    @property
    def split(self) -> bool:
        """Whether each rank attends to its own keys alone, with all queries."""
        return self.key_axis is not None and (self.query_axis is None or self.moves_queries)

    @property
    def shares(self) -> tuple[HeadShare, ...]:
        """The shares of the heads; rank r attends for share r mod U."""
        return head_shares(*self.site.heads, self.degree)

    def share(self, rank: int) -> HeadShare:
        """The share of `rank`."""
        return self.shares[rank % self.degree]

    def group_problems(self, share: HeadShare) -> tuple[GroupProblem, ...]:
        """The head groups of a dilated site, each with its problem, of one share of the heads."""
        if self.dilation is None or self.problem is None:
            return ()
        return group_problems(share.problem(self.problem), self.dilation, self.site.heads[0], share.heads)

    def problems(self, share: HeadShare) -> tuple[Problem, ...]:
        """What is scheduled for a share of the heads: the problem, or, if the site is dilated, those of head groups."""
        own: tuple[Problem, ...] = ()
        if self.problem:
            own = _problems(share.problem(self.problem), self.dilation, self.site.heads[0], share.heads)
        return own + (self.keyless.problems(share) if self.keyless else ())

    def programs(self, rank: int) -> tuple[Program, ...]:
        """The schedules on `rank`, at the lengths of this compilation."""
        return tuple(program(problem, rank if self.sharded else 0) for problem in self.problems(self.share(rank)))

    def received_bytes(self) -> tuple[Sequence[int], Sequence[int]]:
        """Bytes that each rank receives in a forward: keys and values, and by all-to-alls; rows without a key apart."""
        problem = self.problem
        if problem is None or self.query_axis is None or self.split:
            return (0,), (0,)
        load, world = load_of(self.site, problem, self.dilation), problem.world
        if self.comm == ALLGATHER and not problem.key_layout.replicated:
            longest = max(problem.key_layout.length(rank, problem.keys) for rank in range(world))
            return [int((world - 1) * longest * self.site.heads[1] * load.head_bytes)] * world, [0] * world
        pooled = all_to_all_bytes(load, self.degree, world).sum(2).reshape(-1)
        if self.dilation is not None:
            return [int(self.received(rank) * load.head_bytes) for rank in range(world)], pooled.tolist()
        tokens = [tiling(share.problem(problem)).received(world) for share in self.shares]
        heads = [len(share.key_heads) for share in self.shares]
        members = [rank % self.degree for rank in range(world)]
        return [int(tokens[m][r] * heads[m] * load.head_bytes) for r, m in enumerate(members)], pooled.tolist()

    def about_ranks(self) -> list[str]:
        """How a site runs over the ranks, what they receive, and how else it might have run, for the plan's text."""
        if self.problem is None or self.query_axis is None or self.split:
            return []
        ring = self.problem.world // self.degree
        heads = [f"ulysses degree {self.degree}: heads over {self.degree} neighbouring ranks"] * (self.degree > 1)
        how = f"ring of {ring} ranks" if self.comm == RING else f"all-gather over {ring} ranks"
        lines = ["  " + ", ".join([*heads, *[how] * (ring > 1)])]
        if self.problem.world <= SHOWN_RANKS:
            keys, pooled = map(max, self.received_bytes())
            lines.append(f"  receives at most {keys} bytes of keys and values, {pooled} by all-to-alls, in a forward")
        return [*lines, *(f"  {line}" for line in self.weighed)]

    def about_dilation(self) -> list[str]:
        """What a dilated site attends to and receives, for the plan's text."""
        if self.dilation is None or self.problem is None:
            return []
        share = self.dilation.share(self.problem.queries)
        lines = [f"  dilation {self.dilation}: {self.dilation.describe()}; {share:.4g} of all pairs"]
        if self.query_axis and self.problem.world <= SHOWN_RANKS:
            most = max(map(self.received, range(self.problem.world)))
            k, v = (x.meta["val"] for x in (self.site.k, self.site.v))
            each = hint_of(k.shape[0]) * hint_of(k.shape[-1] + v.shape[-1]) * k.element_size()
            lines.append(f"  receives at most {most} rows of K and V per rank, {most * each} bytes in a forward")
        return lines

    def received(self, rank: int) -> int:
        """(key token, K/V head) pairs that `rank` receives: what head groups share, once."""
        rank = rank if self.sharded else 0
        if self.dilation is None or self.problem is None:
            return len(self.share(rank).key_heads) * sum(one.received for one in self.programs(rank))
        share = self.share(rank)
        return received(self.group_problems(share), rank, len(share.heads), len(share.key_heads))


@dataclass(frozen=True)
class RingPlan:
    """The plan of one graph, the same on every rank."""

    world: int
    axes: tuple[Axis, ...]
    sites: tuple[SitePlan, ...]
    approximate: TopBlocks | None = None
    along_curve: bool = False  # whether the blocks of `approximate` are intervals of curve positions
    weighed: Weighed = Weighed()  # the machine, and the layouts weighed against each other, the chosen one first
    remarks: tuple[str, ...] = ()
    prove: str = "sample"  # which schedules that are made in calls are proved

    @property
    def partitioned(self) -> int:
        """How many attention calls of the graph run as ring attention; one that the model writes out is no call."""
        return sum(s.problem is not None and not s.site.handwritten for s in self.sites)

    def __str__(self) -> str:
        lines = [f"plan for {self.world} ranks", *map(str, self.axes)]
        lines += [f"approximate: {self.approximate}"] if self.approximate else []
        for site in self.sites:
            where = ", ".join(
                f"{n} {f'axis {a.index}' if a else 'replicated'}"
                for n, a in (("queries", site.query_axis), ("keys", site.key_axis))
            )
            pruned = f"; each call pruned by {', '.join(f'x{i}' for i in site.pruning)}" if site.pruning else ""
            order = site.problem and not site.sharded and site.problem.query_layout.order
            alone = "" if site.sharded else f"; runs replicated{f', along {order}' if order else ''}"
            moved = "with all queries " if site.moves_queries else ""
            alone = f"; split: each rank attends {moved}to its own keys, results are merged" if site.split else alone
            lines += [f"{site.site}", f"  {where}{alone}{pruned}", *site.about_ranks(), *site.about_dilation()]
        return "\n".join([*lines, *self.weighed.lines, *(f"remark: {r}" for r in self.remarks)])


def _problems(
    problem: Problem, dilation: Dilation | None, heads: int, share: range | None = None
) -> tuple[Problem, ...]:
    if dilation is None:
        return (problem,)
    return tuple(group.problem for group in group_problems(problem, dilation, heads, share))


def plan(
    sites: tuple[AttentionSite, ...],
    sweep: Sweep,
    world: int,
    config: RingConfig,
    tracked: Collection[Node] = frozenset(),
) -> RingPlan:
    """Chooses the layouts and states each site's schedule problem.  `tracked`: nodes that may need a gradient."""
    axes: dict[Factor, Axis] = {}
    remarks: list[str] = []
    order, dilated = find_order(sites, config), dilations(sites, config, remarks)
    planned = []
    unread = {site.index: _unread(site) for site in sites}
    fits = {index for index, why in unread.items() if world > 1 and not why}
    operands = [x for site in sites if site.index in fits for x in (site.q, site.k)]
    units = unit_factors(operands, sweep, world) if order is None else frozenset[Factor]()
    for site, dilation in zip(sites, dilated, strict=True):
        why = unread[site.index]
        remarks += [f"{site.node.name} runs as the model wrote it: {why}"] if why and world > 1 else []
        plain = site.index in fits
        pair = [_axis(axes, sweep, x, world, order, units, remarks) if plain else None for x in (site.q, site.k)]
        if pair[0] is None and (config.approximate or dilation):
            pair = [None, None]  # an option that needs all keys together
        alone = pair[0] is pair[1] is None
        orders = [_order(order, x, axis, alone) for x, axis in zip((site.q, site.k), pair, strict=True)]
        planned.append((site, in_curve_order(site, orders, config), orders, pair))
    held = held_axes(axes, [(site, pair[0] or pair[1]) for site, _, _, pair in planned], sweep)
    for i, (site, ordered, orders, pair) in enumerate(planned):
        along = pair[0] or pair[1]
        if along and along.factor not in held:
            remarks.append(f"{site.node.name}: attends along {along.tokens} tokens of each row of a divided batch")
            planned[i] = site, ordered, orders, [None, None]
    aligned = aligned_axes(held, sweep, world)
    aligned |= dict(slices_of_units(operands, units, aligned, sweep, world))
    planned = [
        (site, ordered, orders, [aligned[a.factor] if a else None for a in pair])
        for site, ordered, orders, pair in planned
    ]
    moving = [
        not (dilation or config.approximate or any(orders)) and _moves_queries(ordered, pair[0], pair[1], world)
        for (_, ordered, orders, pair), dilation in zip(planned, dilated, strict=True)
    ]
    ordered_pairs = [(x[1], how, x[3], moves) for x, how, moves in zip(planned, dilated, moving, strict=True)]
    chosen = _choose(ordered_pairs, tuple(aligned.values()), world, config, tracked)
    final = {a.index: replace(a, layout=a.layout.with_scheme(chosen.layout)) for a in aligned.values()}
    plans = []
    for (site, ordered, orders, pair), dilation, moves in zip(planned, dilated, moving, strict=True):
        query, key = (final[a.index] if a else None for a in pair)
        pruning = _pruning(site) if config.runtime_pruning or site.block_sparse else ()
        learned = tuple(i for i, leaf in enumerate(site.leaves) if leaf in tracked)
        about = (None if moves else query, key), orders, world, config, dilation, learned
        problem = _site_problem(ordered, *about)
        planned_site = SitePlan(
            site, query, key, problem, ordered, pruning, dilation, learned, unread[site.index],
            moves_queries=moves, choice=chosen.choices.get(site.index), refused=chosen.refused.get(site.index, ()),
            **vars(chosen.choices[site.index].way if site.index in chosen.choices else Way()),
        )  # fmt: skip
        if site.keyless and ordered.keyless and problem:
            uniform = _is_uniform(ordered.keyless, dilation, config)
            problem = None if uniform else _site_problem(ordered.keyless, *about)
            keyless = replace(planned_site, site=site.keyless, ordered=ordered.keyless, problem=problem)
            planned_site = replace(planned_site, keyless=keyless)
        plans.append(planned_site)
    how = config.approximate, config.along_curve
    return RingPlan(world, tuple(final.values()), tuple(plans), *how, chosen.weighed, tuple(remarks), config.prove)


def _moves_queries(site: AttentionSite, query: Axis | None, key: Axis | None, world: int) -> bool:
    """Whether the queries of another sequence than the keys, and their results, are far fewer bytes than the keys.

    Received by a rank: of queries, (P - 1) / P of them and the results of all others; of keys, by a ring, what it uses.
    """
    if query is None or key is None or query.factor is key.factor or query.sequence is not None:
        return False
    q, k, v = (x.meta["val"] for x in (site.q, site.k, site.v))
    heads, groups = site.heads
    wide = accumulator(q.dtype).itemsize
    queries = query.hint * heads * (world - 1) * (hint_of(q.shape[-1]) * q.element_size() / world)
    results = query.hint * heads * (world - 1) * (hint_of(v.shape[-1]) + 1) * wide
    keys = key.hint * groups * (world - 1) / world * hint_of(k.shape[-1] + v.shape[-1]) * k.element_size()
    return site.mask == TRUE and FEW * (queries + results) < keys


def _is_uniform(site: AttentionSite, dilation: Dilation | None, config: RingConfig) -> bool:
    """Whether each row of the site surely gives the mean of all values."""
    everything = site.mask == TRUE and dilation is None and not config.approximate
    return bool(site.uniform) and everything and not site.dropout


def _site_problem(
    site: AttentionSite,
    axes: tuple[Axis | None, Axis | None],
    orders: Sequence[Order | None],
    world: int,
    config: RingConfig,
    dilation: Dilation | None,
    learned: tuple[int, ...],
) -> Problem | None:
    """What is scheduled for a site; None: it runs as the model wrote it."""
    sharded = any(axes)
    problem = (
        _problem(site, *axes, world, config, dilation)
        if sharded
        else _single_rank_problem(site, orders, world, config, dilation)
    )
    return _with_learned_bias(problem, site, learned)


def _with_learned_bias(problem: Problem | None, site: AttentionSite, learned: tuple[int, ...]) -> Problem | None:
    """The problem, whose full tiles are split too where a learned bias makes kernels hold a tile's scores."""
    if problem is None or site.bias is None or not loads(site.bias) & {*learned}:
        return problem
    return replace(problem, cut_all=True)


def _order(order: Order | None, x: Any, axis: Axis | None, replicated: bool) -> Order | None:
    """The order of a site's queries or keys; those of a replicated site are permuted before it and back after it."""
    return axis.layout.order if axis else of_length(order, x) if replicated else None


def _single_rank_problem(
    site: AttentionSite, orders: Sequence[Order | None], world: int, config: RingConfig, dilation: Dilation | None
) -> Problem | None:
    """The problem of a site that every rank computes alone, of all tokens; None: it runs as the model wrote it."""
    if not (world == 1 or config.altering or any(orders)) or _unread(site):
        return None
    problem = _problem(site, None, None, 1, config, dilation)
    query, key = (Layout(following("contiguous", order), 1) for order in orders)
    return replace(problem, query_layout=query, key_layout=key)


def _pruning(site: AttentionSite) -> tuple[int, ...]:
    """The leaves of the mask that hold booleans or integers, and are small enough to be read in each call."""
    values = [leaf.meta["val"] for leaf in site.leaves]
    fit = {
        i
        for i, x in enumerate(values)
        if not x.is_floating_point() and x.ndim and hint_of(x.numel()) <= MAX_PRUNING_ELEMENTS
    }
    return tuple(sorted(fit & loads(site.mask)))


def _unread(site: AttentionSite) -> str:
    """Why the site runs as the model wrote it; empty: it was read, and q, k, v have the shapes that the ring takes.

    That is 2 to 4 dims, K/V heads that divide the query heads.
    """
    if site.unsupported:
        return site.unsupported
    q, k, v = (list(x.meta["val"].shape) for x in (site.q, site.k, site.v))
    fits = len(q) == len(k) == len(v) and 2 <= len(q) <= 4
    if fits and len(q) == 4:
        fits = k[1] == v[1] and q[1] % k[1] == 0
    if fits and len(q) > 2:
        fits = all(x[0] == q[0] or x[0] == 1 for x in (k, v))
    return "" if fits else f"its queries {q}, keys {k} and values {v} broadcast"


def _axis(
    axes: dict[Factor, Axis],
    sweep: Sweep,
    x: Any,
    world: int,
    order: Order | None,
    units: frozenset[Factor],
    remarks: list[str],
) -> Axis | None:
    """The axis of a site's queries or keys; None where it stays replicated."""
    factors, n = sweep.dims(x)[-2], x.meta["val"].shape[-2]
    if not units.isdisjoint(factors[:1]):
        factors = factors[:1]
        n = tokens_of(sweep, factors)
    if len(factors) > 1 and axes.keys().isdisjoint(factors):  # rows and columns of patches
        factors = (sweep.fuse(factors),)
    if len(factors) != 1:
        remarks.append(f"{x.name}: its sequence dim of {n} is {len(factors)} merged dims, and stays replicated")
        return None
    if factors[0] in axes:
        return axes[factors[0]]
    if n <= 2 * world:
        remarks.append(f"{x.name}: {n} tokens are not more than 2 per rank, and stay replicated")
        return None
    layout = Layout(following("contiguous", of_length(order, x)), world)
    return axes.setdefault(factors[0], Axis(len(axes), factors[0], n, layout))


def _problem(
    site: AttentionSite,
    query: Axis | None,
    key: Axis | None,
    world: int,
    config: RingConfig,
    dilation: Dilation | None,
) -> Problem:
    replicated = Layout("replicated" if query or key else "contiguous", world)
    lengths = [hint_of(x.meta["val"].shape[-2]) for x in (site.q, site.k)]
    layouts = [
        axis.layout.in_units(n // axis.hint) if axis else replicated
        for axis, n in zip((query, key), lengths, strict=True)
    ]
    cut_all = site.dropout > 0 or site.score is not None
    problem = Problem(str(site.mask), lengths[0], lengths[1], layouts[0], layouts[1], config.tile or TILE, cut_all)
    if config.tile:
        return problem
    device = site.q.meta["val"].device.type
    edge = refine(_problems(problem, dilation, site.heads[0]), device if device in PRICES else "cuda")
    return replace(problem, tile=min(config.approximate.block, edge) if config.approximate else edge)


def _choose(
    ordered: list[Any], axes: Sequence[Axis], world: int, config: RingConfig, tracked: Collection[Node]
) -> Chosen:
    """The layout, and how each site runs over the ranks."""
    sharded = [
        Sharded(site, _problem(site, None if moves else query, key, world, config, how), how, (query, key), moves)
        for site, how, (query, key), moves in ordered
        if (query or key) and world > 1
    ]
    return choose_ways(sharded, axes, world, config, tracked)
