"""prove: proves the schedules of a plan before anything is sent."""

from __future__ import annotations

from ringpass.passes.plan.plan import RingPlan
from ringpass.schedule.proof import Proof
from ringpass.schedule.site_proof import prove_groups, prove_problems, prove_shares


def prove_all(plan: RingPlan, rank: int) -> tuple[Proof, ...]:
    """Proves the schedule of each site of a plan, equal ones once, with gloo's and with NCCL's order of exchanges.

    Raises ScheduleError for one that is wrong.
    """
    proofs = prove_problems((p for site in plan.sites for share in site.shares for p in site.problems(share)), rank)
    for site in plan.sites:
        if site.problem is None:
            continue
        if site.degree > 1:
            prove_shares(site.shares, site.site.heads, site.problem)
        for share in site.shares if site.query_axis else ():
            prove_groups(site.group_problems(share), len(share.heads), len(share.key_heads))
    return tuple(proofs.values())
