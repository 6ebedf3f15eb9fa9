"""A plan as data: axes, sites and the schedules of all ranks, as `schedule.json` and the page hold them.

    {"axes": [..], "sites": [{"indices": [0, 1], "mask": "k <= q", ..}], "schedules": [{"site": 0, "ranks": [..]}]}

Equal sites are one entry.  A tile is [q0, q1, k0, k1, kind], in rows of the rank's queries and of the keys of its step;
which tokens these rows are, `queries` of the rank and `keys` of the step say, in the order of the layout.  Sizes are in
bytes, of a forward.  Schedules and ranges are listed up to LISTED_RANKS ranks, else None.

Contract: depends on the plan alone, so it is the same on all ranks.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from ringpass.layouts.hilbert import curve
from ringpass.nodes import hint_of, source_line
from ringpass.passes.plan.plan import RingPlan, SitePlan
from ringpass.passes.plan.ways import load_of
from ringpass.passes.propagate.axis import Axis
from ringpass.schedule.program import Program, Step, Transfer, program
from ringpass.schedule.tiles import TILE_KINDS, Problem, tiling

LISTED_RANKS = 64  # up to this many ranks, ranges and schedules are listed


def plan_data(plan: RingPlan) -> dict[str, Any]:
    """Axes, folded sites, and the schedules of all ranks."""
    groups = folded(plan.sites)
    listed = plan.world <= LISTED_RANKS
    schedules = [x for i, group in enumerate(groups) for x in _schedules(i, group[0], plan.world)] if listed else None
    return {
        "world": plan.world,
        "axes": [axis_data(axis) for axis in plan.axes],
        "sites": [site_data(group, plan.world) for group in groups],
        "schedules": schedules,
    }


def folded(sites: Sequence[SitePlan]) -> list[list[SitePlan]]:
    """Equal sites together: the same problem, heads, widths and way."""
    alike: dict[Any, list[SitePlan]] = {}
    for site in sites:
        shapes = tuple(str(list(x.meta["val"].shape)) for x in (site.site.q, site.site.k, site.site.v))
        texts = str(site.ordered.mask), str(site.site.bias), str(site.site.score), site.unread
        alike.setdefault((site.problem, site.dilation, site.degree, site.comm, shapes, texts), []).append(site)
    return list(alike.values())


def axis_data(axis: Axis) -> dict[str, Any]:
    """An axis: its tokens, and the runs of tokens of each rank."""
    layout, tokens = axis.layout, axis.hint
    runs = [[[*run] for run in layout.ranges(rank, tokens)] for rank in range(layout.world)]
    order = layout.order
    grid = {"grid": [*order.sizes], "prefix": order.prefix, "order": curve(order.sizes).tolist()} if order else None
    listed = layout.world <= LISTED_RANKS
    return {
        "index": axis.index,
        "tokens": tokens,
        "layout": layout.name,
        "ranks": runs if listed else None,
        "curve": grid,
    }


def site_data(group: Sequence[SitePlan], world: int) -> dict[str, Any]:
    """Equal sites as one entry."""
    first = group[0]
    site, problem = first.site, first.problem
    q, k, v = (x.meta["val"] for x in (site.q, site.k, site.v))
    source, line = where(source_line(site.node))
    data = {
        "indices": [x.site.index for x in group],
        "name": site.node.name,
        "path": site.path,
        "source": source,
        "line": line,
        "heads": [*site.heads],
        "head_width": [hint_of(k.shape[-1]), hint_of(v.shape[-1])],
        "queries": hint_of(q.shape[-2]),
        "keys": hint_of(k.shape[-2]),
        "mask": str(site.mask),
        "degree": first.degree,
        "comm": first.comm,
        "split": first.split,
        "partitioned": problem is not None and first.sharded,
        "why": first.unread or "; ".join(first.weighed[:1]),
    }
    return data | (_work(first, world) if problem is not None else {})


def where(text: str) -> tuple[str | None, str | None]:
    """(file:line, the line's text) of what `source_line` says; files of the working directory are relative to it.

    >>> where('File "/lib/model.py", line 3, in forward y = x + 1')
    ('/lib/model.py:3', 'y = x + 1')
    """
    source, _, line = text.partition(", in ")
    source = source.removeprefix('File "').replace('", line ', ":").removeprefix(os.getcwd() + os.sep)
    return source or None, line.partition(" ")[2] or None


def _work(site: SitePlan, world: int) -> dict[str, Any]:
    """Tiles by kind, pairs and bytes of each rank, and how evenly the pairs are divided."""
    assert site.problem is not None
    kinds, pairs, area = np.zeros(len(TILE_KINDS), int), np.zeros(world), 0.0
    for i, share in enumerate(site.shares):
        heads = [len(x.head_group.members) for x in site.group_problems(share)] or [len(share.heads)]
        for problem, n in zip(_own_problems(site, share), heads, strict=False):
            tiles = tiling(problem)
            kinds += np.bincount(tiles.kind, minlength=len(TILE_KINDS))
            pairs += (
                n * (tiles.areas(world) if site.sharded else tiles.areas(1)) * (np.arange(world) % site.degree == i)
            )
            area += n * float(tiles.area.sum())
    received, pooled = (np.broadcast_to(x, world).tolist() for x in site.received_bytes())
    total = site.problem.queries * site.problem.keys * site.site.heads[0]
    return {
        "density": area / total if total else 0.0,
        "tiles": {name: int(n) for name, n in zip(TILE_KINDS, kinds, strict=True)},
        "pairs": pairs.astype(int).tolist(),
        "received_bytes": received,
        "pooled_bytes": pooled,
        "balance": float(pairs.max() / pairs.mean()) if pairs.any() else 1.0,
    }


def _own_problems(site: SitePlan, share: Any) -> Sequence[Problem]:
    """Those of a share's heads, without the rows that see no key."""
    problems = site.problems(share)
    return problems[: len(problems) - (len(site.keyless.problems(share)) if site.keyless else 0)]


# --- schedules --------------------------------------------------------------------------------------------------------


def _schedules(index: int, site: SitePlan, world: int) -> list[dict[str, Any]]:
    """The schedules of a site: one for each share of the heads, and of a dilated one for each of its head groups.

    The messages of head groups may hold equal keys, which are sent once.
    """
    if site.problem is None or not site.sharded:
        return []
    each = load_of(site.site, site.problem, site.dilation).head_bytes
    out = []
    for share in site.shares:
        groups, members = site.group_problems(share), range(share.member, world, site.degree)
        for i, problem in enumerate(_own_problems(site, share)):
            heads = len({*groups[i].head_group.key_heads(*site.site.heads)}) if groups else len(share.key_heads)
            out.append(
                {
                    "site": index,
                    "share": str(share) if site.degree > 1 else None,
                    "group": str(groups[i].head_group) if groups else None,
                    "queries": problem.queries,
                    "keys": problem.keys,
                    "ranks": [_rank(program(problem, rank), heads * each) for rank in members],
                }
            )
    return out


def _rank(own: Program, row_bytes: float) -> dict[str, Any]:
    return {
        "rank": own.rank,
        "queries": [[*run] for run in own.problem.query_layout.ranges(own.rank, own.problem.queries)],
        "steps": [_step(step, row_bytes) for step in own.steps],
        "empty": [[*q, *k] for q, k in own.empty],
    }


def _step(step: Step, row_bytes: float) -> dict[str, Any]:
    return {
        "step": step.shift,
        "keys": [[*run] for run in step.tokens],
        "receive": _transfer(step.receive, "from", row_bytes),
        "send": _transfer(step.send, "to", row_bytes),
        "tiles": [[*tile.q, *tile.k, tile.kind] for tile in step.tiles],
    }


def _transfer(moved: Transfer | None, side: str, row_bytes: float) -> dict[str, Any] | None:
    if moved is None:
        return None
    peer = moved.src if side == "from" else moved.dst
    return {side: peer, "rows": moved.size, "bytes": int(moved.size * row_bytes)}
