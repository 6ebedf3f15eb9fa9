"""prove: proves the schedules of a plan before anything is sent."""

from __future__ import annotations

from ringpass.errors import ScheduleError
from ringpass.layouts.pooling import heads_text
from ringpass.passes.plan.plan import RingPlan, SitePlan
from ringpass.schedule.head_shares import HeadShare
from ringpass.schedule.messages import exchanges
from ringpass.schedule.pooling_proof import prove_pooling
from ringpass.schedule.proof import Proof, prove, prove_from, prove_order
from ringpass.schedule.tiles import tiling

PROVED = 16_384  # tiles of a schedule whose programs on all ranks are written down and proved one by one


def prove_all(plan: RingPlan, rank: int) -> tuple[Proof, ...]:
    """Proves the schedule of each site of a plan, equal ones once, with gloo's and with NCCL's order of exchanges.

    A schedule of more than PROVED tiles is proved as arrays, and the program of `rank` alone is compared with them.
    Raises ScheduleError for one that is wrong.
    """
    problems = dict.fromkeys(p for site in plan.sites for share in site.shares for p in site.problems(share))
    proofs = tuple(prove(p) if len(tiling(p)) <= PROVED else prove_from(p, rank) for p in problems)
    for site in plan.sites:
        _prove_shares(site)
        for share in site.shares:
            _prove_shared_exchanges(site, share)
    return proofs


def _prove_shares(site: SitePlan) -> None:
    """Each query head is in one share, with the K/V heads that it reads; the all-to-alls bring what shares need."""
    if site.degree == 1 or site.problem is None:
        return
    heads, kv_heads = site.site.heads
    if [head for share in site.shares for head in share.heads] != list(range(heads)):
        raise ScheduleError(f"the shares of site {site.site.index} do not divide its {heads} heads")
    for share in site.shares:
        each = len(share.heads) // len(share.key_heads)
        read = [share.key_heads[i // each] for i in range(len(share.heads))]
        if read != [head // (heads // kv_heads) for head in share.heads]:
            raise ScheduleError(f"{share} read K/V heads {share.key_heads}")
    for side, tokens, layout in (
        ([share.heads for share in site.shares], site.problem.queries, site.problem.query_layout),
        ([share.key_heads for share in site.shares], site.problem.keys, site.problem.key_layout),
    ):
        prove_pooling(heads_text(side), tokens, layout.name, layout.world)


def _prove_shared_exchanges(site: SitePlan, share: HeadShare) -> None:
    """The head groups of a dilated site share exchanges, whose order is not that of any one group."""
    groups = site.group_problems(share)
    if site.query_axis and groups and sum(len(tiling(p)) for p in site.problems(share)) <= PROVED:
        ranks, heads = range(groups[0].problem.world), (len(share.heads), len(share.key_heads))
        prove_order([[x.ends for x in exchanges(groups, r, *heads)[1:]] for r in ranks])
