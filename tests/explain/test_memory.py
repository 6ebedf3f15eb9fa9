"""The memory of a report beside what a step allocates, and the rules behind it on their own."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import peaks
from benchmarks.memory import _allocations
from benchmarks.paired import Case, on_ranks
from ringpass.explain.reuse import Life, alive, occupy
from ringpass.explain.scratch import BACKWARD, FORWARD, _workspace
from tests.support.marks import slow


@pytest.mark.parametrize(
    ("name", "ranks", "length"),
    [
        slow("llama", 2, 1024),
        slow("gpt2", 2, 1024),
        slow("vit", 2, 2048),
        slow("t5", 2, 1024),
        slow("llama", 2, 2048),
        slow("llama", 4, 1024),
        slow("vit", 4, 1024),
    ],
)
def test_a_rank_needs_what_the_report_says(name: str, ranks: int, length: int) -> None:
    """At sizes of the benchmark: in shorter sequences, gradients of parameters and other fixed sizes are most of it."""
    how = Namespace(models=[name], lengths=[length], width=128, compiler="inductor")
    (case,) = (found for found in on_ranks(ranks, peaks.job, how) if isinstance(found, Case))
    assert case.facts["ratio"] == pytest.approx([1.0] * ranks, abs=peaks.BOUND)


@pytest.mark.parametrize("length", [32, 200, 800])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_workspace_of_the_cpu_kernel(length: int, backward: bool) -> None:
    q, k, v = (torch.randn(1, n, 2, 64).transpose(1, 2) for n in (length, 600, 600))  # rows first, as in tiles
    out, lse = FORWARD(q, k, v)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the profiler does not see what other threads take
    func, args = (BACKWARD, (out, q, k, v, out, lse, 0.0, False)) if backward else (FORWARD, (q, k, v))
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            results = func(*args)
        taken = sum(event.size for event in _allocations(profiler, "cpu") if event.size > 0)
        assert taken - sum(x.nbytes for x in results) == _workspace(func, args) > 0
    finally:
        torch.set_num_threads(threads)


def life(start: int, stop: int, size: int = 4, **flags: Any) -> Life:
    return Life((start, stop), size, "temporary", start, stop, stop, torch.float32, **flags)


@pytest.mark.parametrize(
    ("others", "flags", "stop"),
    [
        ([life(4, 5, 8)], {}, 6),  # the peak is elsewhere: the memory waits for its next owner
        ([life(1, 1, 1), life(4, 4, 5)], {}, 1),  # waiting would raise the peak
        ([life(4, 5, 8)], {"gives": False}, 1),
    ],
)
def test_memory_waits_for_its_next_owner_below_the_peak(others: list[Life], flags: dict[str, bool], stop: int) -> None:
    first, second = life(0, 1, **{"gives": True} | flags), life(7, 8, takes=True, gives=True)
    most = [life(9, 9, 12 if others[0].start != 1 else 6)]
    lives = [first, second, *others, *most]
    occupy(lives, alive(((x.start, x.read, x.size) for x in lives), 10))
    assert (first.stop, second.stop) == (stop, 8)
