"""schedules: who sends which tokens to whom, and which tiles use them, as data; for up to LISTED_RANKS ranks.

    {"site": 0, "share": None, "group": None, "queries": 64, "keys": 64, "pair_flops": 64, "ranks": [
        {"rank": 0, "queries": [[0, 8], [56, 64]], "empty": [[0, 8, 8, 64]], "steps": [
            {"step": 1, "keys": [[0, 8]], "receive": {"from": 3, "rows": 8, "bytes": 1024}, "send": {..},
             "tiles": [[0, 16, 0, 8, "full"]]}]}]}

A tile is [q0, q1, k0, k1, kind], in rows of the rank's queries and of the keys of its step.  Which tokens these rows
are, `queries` of the rank and `keys` of the step say, in the order of the layout; None above RUNS runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ringpass.explain.data import LISTED_RANKS
from ringpass.explain.sites import own_problems
from ringpass.layouts.ranges import Ranges
from ringpass.passes.plan.plan import SitePlan
from ringpass.passes.plan.ways import load_of
from ringpass.schedule.program import Program, Step, Transfer, program

RECTANGLES = 64  # empty rectangles of a rank that are listed
RUNS = 64  # runs of tokens of a rank that are listed


def schedule_reports(sites: Sequence[SitePlan], world: int) -> list[dict[str, Any]] | None:
    """The schedule of each site, share of its heads and head group; `sites`: one of each kind.

    None above LISTED_RANKS.
    """
    if world > LISTED_RANKS:
        return None
    return [found for i, site in enumerate(sites) if site.problem for found in _of_site(i, site, world)]


def _of_site(index: int, site: SitePlan, world: int) -> list[dict[str, Any]]:
    """One for each share of the heads, and each head group of a dilated site; equal keys of a group are sent once."""
    assert site.problem is not None
    load, out = load_of(site.site, site.problem, site.dilation), []
    for share in site.shares:
        groups = [x.head_group for x in site.group_problems(share)]
        ranks = range(share.member, world, site.degree) if site.sharded else range(1)
        for i, problem in enumerate(own_problems(site, share)):
            heads = len(groups[i].members) if groups else len(share.heads)
            key_heads = len({*groups[i].key_heads(*site.site.heads)}) if groups else len(share.key_heads)
            token_bytes = int(key_heads * load.head_bytes)
            out.append({
                "site": index,
                "share": str(share) if site.degree > 1 else None,
                "group": str(groups[i]) if groups else None,
                "queries": problem.queries,
                "keys": problem.keys,
                "pair_flops": int(heads * load.pair_flops),
                "ranks": [_of_rank(program(problem, rank), token_bytes) for rank in ranks],
            })  # fmt: skip
    return out


def _of_rank(found: Program, token_bytes: int) -> dict[str, Any]:
    return {
        "rank": found.rank,
        "queries": _runs(found.problem.query_layout.ranges(found.rank, found.problem.queries)),
        "steps": [_step(step, token_bytes) for step in found.steps],
        "empty": [[*q, *k] for q, k in found.empty[:RECTANGLES]],
    }


def _step(step: Step, token_bytes: int) -> dict[str, Any]:
    received, sent = step.receive, step.send
    return {
        "step": step.shift,
        "keys": _runs(step.tokens),
        "receive": _transfer("from", received.src, received, token_bytes) if received else None,
        "send": _transfer("to", sent.dst, sent, token_bytes) if sent else None,
        "tiles": [[*tile.q, *tile.k, tile.kind] for tile in step.tiles],
    }


def _runs(ranges: Ranges) -> list[list[int]] | None:
    return [[*run] for run in ranges] if len(ranges) <= RUNS else None


def _transfer(name: str, peer: int, transfer: Transfer, token_bytes: int) -> dict[str, int]:
    return {name: peer, "rows": transfer.size, "bytes": transfer.size * token_bytes}
