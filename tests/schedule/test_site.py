"""Planned sites: found again by key, the same in every process, and nothing is planned again when the operator runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ringpass import Dilation, ops
from ringpass.schedule.dilation import group_problems
from ringpass.schedule.site import SITES, lookup, register
from ringpass.schedule.tiles import tiling
from tests.support.sites import site

TOKENS, HEADS = 48, 4
DILATION = Dilation((16, 48), (1, 2))


def test_equal_sites_share_a_key() -> None:
    first, second = (site("k <= q", TOKENS, "zigzag", 1, 3, bias="-0.1 * (q - k)") for _ in range(2))
    assert register(first) == register(second)
    assert lookup(register(second), TOKENS, TOKENS) is SITES[register(first)]
    others = [replace(first, **change) for change in ({"rank": 2}, {"stream": 1}, {"learned": (0,)}, {"scale": 0.5})]
    assert len({register(x) for x in (first, *others)}) == 5


def test_a_key_begins_with_the_mask() -> None:
    assert register(site("k <= q", TOKENS)).startswith("k <= q #")
    long = " | ".join(f"k == {i}" for i in range(40))
    assert len(register(site(long, TOKENS))) < 64


def test_other_lengths_of_a_symbolic_call() -> None:
    """A call of another length gets the same decisions at that length."""
    planned = site("k <= q", TOKENS, "zigzag", 1, 2, scale=0.25, dilation=DILATION, heads=HEADS)
    found = lookup(register(planned), 20, 20)
    assert found == replace(planned, problem=replace(planned.problem, queries=20, keys=20))
    assert [g.problem.queries for g in found.groups] == [20, 10, 10]


def test_a_site_that_was_not_planned_here() -> None:
    with pytest.raises(LookupError, match="run torch.compile"):
        lookup("k <= q #0123", 4, 4)


def test_running_the_operator_plans_nothing() -> None:
    """What the plan computed is read: no head group is derived, no tile is classified."""
    planned = site("k <= q", TOKENS, scale=0.5, dilation=DILATION, heads=HEADS)
    key = register(planned)
    for group in planned.group_problems:
        tiling(group.problem)  # as the proof of the plan does
    q = torch.randn(1, HEADS, TOKENS, 8)
    caches = tiling, group_problems
    before = [cache.cache_info().misses for cache in caches]
    for _ in range(2):
        ops.ring_attention(q, q, q, [], None, key, TOKENS, TOKENS, 0, planned.group)
    assert [cache.cache_info().misses for cache in caches] == before
