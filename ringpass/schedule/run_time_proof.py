"""Proves schedules that are made in a call, since data prune them or a length is symbolic: some of them, or all.

    >>> [number for number in range(1000) if sampled(number)]
    [0, 1, 2, 3, 256, 512, 768]

A schedule that the plan proved is not proved again.  Of the others, by the option `prove`:

    sample   those of a site's first FIRST calls, and of each EVERY-th after: the cost of a run is bounded by one proof
             in EVERY calls
    all      those of every call

Ranks make the same calls in the same order, so all prove the same ones.  Equal schedules, such as those of layers with
one mask, are proved once.  The backward of a call runs the schedule of its forward, and its proof holds for both.
"""

from __future__ import annotations

from functools import lru_cache

from ringpass.schedule.dilation import GroupProblem
from ringpass.schedule.site import Site
from ringpass.schedule.site_proof import prove_groups, prove_problems
from ringpass.schedule.tiles import Problem

SAMPLE, ALL = "sample", "all"
FIRST, EVERY = 4, 256
CALLS: dict[str, int] = {}
"""How many calls of each site, by key, made a schedule of their own."""


def sampled(number: int) -> bool:
    """Whether the schedule of call `number`, from 0, of a site is among those that are proved."""
    return number < FIRST or number % EVERY == 0


def prove_call(key: str, planned: Site, site: Site, kv_heads: int) -> bool:
    """Proves what a forward of `site` runs, if it is not what was `planned`, and it is its turn; whether it is proved.

    `key`: the site's; `kv_heads`: the K/V heads that it reads.  Raises ScheduleError where the schedule is wrong.
    """
    if site.problem == planned.problem:
        return False
    number = CALLS[key] = CALLS.get(key, -1) + 1
    if site.prove != ALL and not sampled(number):
        return False
    groups = site.group_problems
    _prove(tuple(group.problem for group in groups) or (site.problem,), groups, site.own_heads, kv_heads, site.rank)
    return True


@lru_cache(maxsize=64)
def _prove(
    problems: tuple[Problem, ...], groups: tuple[GroupProblem, ...], heads: int, kv_heads: int, rank: int
) -> None:
    prove_problems(problems, rank)
    prove_groups(groups, heads, kv_heads)
