"""The rules behind the memory of a report, each on its own."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.memory import _allocations
from ringpass.explain.scratch import BACKWARD, FORWARD, _workspace


@pytest.mark.parametrize("length", [32, 200, 800])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_workspace_of_the_cpu_kernel(length: int, backward: bool) -> None:
    q, k, v = (torch.randn(1, n, 2, 64).transpose(1, 2) for n in (length, 600, 600))  # rows first, as in tiles
    out, lse = FORWARD(q, k, v)
    func, args = (BACKWARD, (out, q, k, v, out, lse, 0.0, False)) if backward else (FORWARD, (q, k, v))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        results = func(*args)
    taken = sum(event.size for event in _allocations(profiler, "cpu") if event.size > 0)
    assert taken - sum(x.nbytes for x in results) == _workspace(func, args) > 0
