"""verify: proves the schedules of a plan before anything is sent."""

from __future__ import annotations

from ringpass.passes.plan.plan import RingPlan
from ringpass.schedule.proof import Proof, prove, prove_from
from ringpass.schedule.tiles import tiling

PROVED = 16_384  # tiles of a schedule whose programs on all ranks are written down and proved one by one


def prove_all(plan: RingPlan, rank: int) -> tuple[Proof, ...]:
    """Proves the schedule of each site of a plan, equal ones once.

    A schedule of more than PROVED tiles is proved as arrays, and the program of `rank` alone is compared with them.
    Raises ScheduleError for one that is wrong.
    """
    problems = dict.fromkeys(problem for site in plan.sites for problem in site.problems)
    return tuple(prove(p) if len(tiling(p)) <= PROVED else prove_from(p, rank) for p in problems)
