"""sites: the attentions of a plan as data, those that are alike once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ringpass.explain.data import SiteReport, WayReport, by_rank
from ringpass.explain.sources import source_of
from ringpass.explain.traffic import Move
from ringpass.masks.constants import Array
from ringpass.masks.evaluate import evaluate
from ringpass.masks.expr import loads
from ringpass.nodes import hint_of
from ringpass.passes.plan.plan import SitePlan
from ringpass.schedule.cost import SiteChoice
from ringpass.schedule.head_shares import HeadShare
from ringpass.schedule.tiles import TILE_KINDS, Problem, tiling

RANKS = 1024  # lists by rank are left out above
EVALUATED = 1 << 24  # pairs of a mask that are evaluated to find the keys that are needed
SitePlans = Sequence[SitePlan]
Received = Mapping[int, Mapping[str, int]]
"""Bytes by the number of an attention and by phase."""


def folded(sites: SitePlans, received: Received) -> list[SitePlans]:
    """The sites in groups that are alike but for their place in the model, in the order of their first ones.

    `received`: as `received_by_phase` finds; a frozen layer's attention may receive less in the backward.
    """
    alike: dict[Any, list[SitePlan]] = {}
    for site in sites:
        kind = _kind(site), tuple(received.get(site.site.index, {}).items())
        alike.setdefault(kind, []).append(site)
    return list(alike.values())


def _kind(site: SitePlan) -> Any:
    found = site.site
    shapes = tuple(tuple(map(str, x.meta["val"].shape)) for x in (found.q, found.k, found.v))
    texts = str(found.mask), str(found.bias), str(found.score), str(found.sink), found.dropout, found.unsupported
    how = site.degree, site.comm, site.split, site.sharded, site.unread, site.dilation, site.weighed
    axes = site.query_axis, site.key_axis
    return shapes, texts, how, axes, site.problem


def received_by_phase(sites: SitePlans, moves: Mapping[str, Sequence[Move]]) -> Received:
    """By attention, the bytes of K, V and their gradients that the rank receives in each phase."""
    found = {site.site.index: dict.fromkeys(moves, 0) for site in sites if site.problem is not None}
    for phase, of_phase in moves.items():
        for move in of_phase:
            if move.site is not None:
                found[move.site][phase] += move.bytes
    return found


def site_report(group: SitePlans, world: int, received: Received) -> SiteReport:
    """What is known of the sites of one group; `received`: of each, the bytes of the rank by phase."""
    site = group[0]
    found, problem = site.site, site.problem
    q, k, v = (x.meta["val"] for x in (found.q, found.k, found.v))
    source = source_of(found.node)
    keys, pooled = site.received_bytes()
    areas = pairs_of(site, world) if problem else np.zeros(world)
    every = hint_of(q.shape[-2]) * hint_of(k.shape[-2]) * found.heads[0]
    computed = areas.sum() if site.sharded else areas.max()
    lists = [by_rank(x if len(x) == world else [0] * world, world, RANKS) for x in (keys, pooled)]
    return SiteReport(
        indices=[one.site.index for one in group],
        name=found.node.name,
        path=found.path,
        source=source.source,
        line=source.line,
        heads=list(found.heads),
        head_width=[hint_of(q.shape[-1]), hint_of(v.shape[-1])],
        queries=hint_of(q.shape[-2]),
        keys=hint_of(k.shape[-2]),
        mask="not read" if found.unsupported else str(found.mask),
        density=float(computed / max(1, every)) if problem else None,
        degree=site.degree,
        comm=site.comm,
        split=site.split,
        partitioned=problem is not None,
        why=_why(site),
        tiles=_tiles(site) if problem else {},
        pairs=by_rank([int(x) for x in areas], world, RANKS) if problem else None,
        received_bytes=lists[0],
        needed_bytes=_needed_bytes(site, world),
        pooled_bytes=lists[1],
        balance=float(areas.max() / areas.mean()) if areas.max() else None,
        ways=ways(site.choice, world),
        rank_received_bytes=dict(received.get(site.site.index, {})),
    )


def _why(site: SitePlan) -> str:
    """Why a site runs as it does."""
    if site.unread:
        return f"runs as the model wrote it: {site.unread}"
    if site.problem is None or not site.sharded:
        return "every rank computes all of it: neither its queries nor its keys have an axis"
    if site.split:
        moved, there = "all queries, fewer bytes than the keys, go to all ranks", "its queries are on every rank"
        return f"each rank attends to its own keys, and results are merged: {moved if site.moves_queries else there}"
    if site.key_axis is None:
        return "its keys are on every rank: nothing is sent"
    if site.choice is not None and len(site.choice.weighed) > 1:
        return f"of {len(site.choice.weighed)} ways the one of least estimated time, or a ring within 2 % of it"
    if site.degree > 1:
        return f"heads over {site.degree} neighbouring ranks: the options leave no other choice"
    return "one ring over all ranks: no machine is described, or the options leave no choice"


def _tiles(site: SitePlan) -> dict[str, int]:
    """How many tiles of each kind all ranks compute; empty: pairs of ranks with nothing to compute between them."""
    counts: Counter[str] = Counter()
    for share in site.shares:
        for problem in own_problems(site, share):
            found = tiling(problem)
            of_kind = np.bincount(found.kind, minlength=len(TILE_KINDS))
            counts.update({name: int(n) for name, n in zip(TILE_KINDS, of_kind, strict=True)})
            met = len(np.unique(found.dst * problem.world + found.src))
            counts["empty"] += (problem.world // site.degree) ** 2 - met if site.sharded and not site.split else 0
    return {kind: counts.get(kind, 0) for kind in ("full", "causal", "mirrored", "partial", "empty")}


def pairs_of(site: SitePlan, world: int) -> Array:
    """(P,): the (query, key) pairs of each rank, over all heads that it attends for."""
    out = np.zeros(world)
    for share in site.shares:
        members = np.arange(world) % site.degree == share.member
        for heads, problem in _with_heads(site, share):
            areas = tiling(problem).areas(max(problem.world, 1))
            out += np.where(members, heads * (areas if site.sharded else np.full(world, areas.sum())), 0)
    return out


def own_problems(site: SitePlan, share: HeadShare) -> Sequence[Problem]:
    """What is scheduled for a share of the heads, without the rows that see no key."""
    problems = site.problems(share)
    return problems[: len(problems) - (len(site.keyless.problems(share)) if site.keyless else 0)]


def _with_heads(site: SitePlan, share: HeadShare) -> list[tuple[int, Problem]]:
    groups = site.group_problems(share)
    if groups:
        return [(len(group.head_group.members), group.problem) for group in groups]
    return [(len(share.heads), problem) for problem in own_problems(site, share)]


def _needed_bytes(site: SitePlan, world: int) -> list[int] | None:
    """Bytes of the distinct keys of other ranks that some query of each rank sees; None where that is not evaluated.

    Evaluated are masks without data, of at most EVALUATED pairs, of attentions that are not dilated.
    """
    problem, found = site.problem, site.site
    if world > RANKS:
        return None
    if problem is None or not site.sharded or site.split or problem.key_layout.replicated:
        return [0] * world
    if site.dilation is not None or site.degree > 1 or loads(problem.expr):
        return None
    if problem.queries * problem.keys > EVALUATED:
        return None
    k, v = (x.meta["val"] for x in (found.k, found.v))
    each = hint_of(k.shape[0]) * found.heads[1] * (hint_of(k.shape[-1]) + hint_of(v.shape[-1])) * k.element_size()
    at = {"q": torch.arange(problem.queries).view(1, 1, -1, 1), "k": torch.arange(problem.keys).view(1, 1, 1, -1)}
    at |= {name: torch.zeros(1, 1, 1, 1, dtype=torch.int64) for name in ("b", "h")}
    seen = evaluate(problem.expr, at, []).expand(1, 1, problem.queries, problem.keys)[0, 0]
    out = []
    for rank in range(world):
        rows, remote = torch.zeros(problem.keys, dtype=torch.bool), torch.ones(problem.keys, dtype=torch.bool)
        for start, stop in problem.query_layout.ranges(rank, problem.queries):
            rows |= seen[start:stop].any(0)
        for start, stop in problem.key_layout.ranges(rank, problem.keys):
            remote[start:stop] = False
        out.append(int((rows & remote).sum()) * each)
    return out


def ways(choice: SiteChoice | None, world: int) -> list[WayReport]:
    """The ways that were weighed, the chosen one first."""
    out = []
    for i, (way, times) in enumerate(choice.weighed if choice else ()):
        rank = int(times.total.argmax())
        named = {"compute": times.compute, "calls": times.calls, "merges": times.merges}
        named |= {"exposed": times.transfers, "all_to_all": times.all_to_alls}
        parts = {name: float(x[rank]) for name, x in named.items()}
        out.append(WayReport(way.name(world), way.degree, way.comm, i == 0, times.slowest, parts))
    return out
