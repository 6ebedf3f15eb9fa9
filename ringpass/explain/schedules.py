"""schedules: who sends which tokens to whom, and which tiles use them, as data; for up to 64 ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ringpass.nodes import hint_of
from ringpass.passes.plan.plan import SitePlan
from ringpass.schedule.program import Program, Step, Transfer

RANKS = 64  # schedules of more ranks are left out
RECTANGLES = 64  # empty rectangles of a rank that are listed


def schedule_reports(sites: Sequence[SitePlan], world: int) -> list[dict[str, Any]] | None:
    """The schedule of each site, share of its heads and head group; `sites`: one of each kind.  None above RANKS."""
    if world > RANKS:
        return None
    return [found for i, site in enumerate(sites) if site.problem for found in _of_site(i, site, world)]


def _of_site(index: int, site: SitePlan, world: int) -> list[dict[str, Any]]:
    out = []
    for share in site.shares:
        groups = site.group_problems(share)
        ranks = range(share.member, world, site.degree) if site.sharded else range(1)
        programs = [site.programs(rank) for rank in ranks]
        for i in range(len(programs[0])):
            each = _token_bytes(site, len(groups[i].head_group.members) if groups else len(share.key_heads))
            out.append({
                "site": index,
                "share": str(share) if site.degree > 1 else None,
                "group": str(groups[i].head_group) if groups else None,
                "ranks": [_of_rank(rank, of[i], each) for rank, of in zip(ranks, programs, strict=True)],
            })  # fmt: skip
    return out


def _token_bytes(site: SitePlan, heads: int) -> int:
    """Bytes of K and V of one token, of `heads` K/V heads."""
    k, v = (x.meta["val"] for x in (site.site.k, site.site.v))
    batch = hint_of(k.shape[0]) if k.ndim > 2 else 1
    return int(batch * heads * (hint_of(k.shape[-1]) + hint_of(v.shape[-1])) * k.element_size())


def _of_rank(rank: int, program: Program, each: int) -> dict[str, Any]:
    empty = program.empty[:RECTANGLES]
    steps = [_step(step, each) for step in program.steps]
    return {"rank": rank, "steps": steps, "empty": [[*q, *k] for q, k in empty]}


def _step(step: Step, each: int) -> dict[str, Any]:
    received, sent = step.receive, step.send
    return {
        "step": step.shift,
        "receive": _transfer("from", received.src, received, each) if received else None,
        "send": _transfer("to", sent.dst, sent, each) if sent else None,
        "tiles": [[*tile.q, *tile.k, tile.kind] for tile in step.tiles],
    }


def _transfer(name: str, peer: int, transfer: Transfer, each: int) -> dict[str, int]:
    return {name: peer, "rows": transfer.size, "bytes": transfer.size * each}
