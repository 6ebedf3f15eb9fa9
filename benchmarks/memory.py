"""Peak memory of one training step, from the profiler's record of every allocation.

>>> peak_bytes(lambda: model(**batch).loss.backward(), kept=lambda: [p.grad for p in model.parameters()])
123456789

Counted: what the step allocates, at the moment when most of it is alive. Not counted: whatever was alive before the
step (parameters, optimiser state, older gradients), and the tensors named by ``kept`` from their allocation on
(gradients that the step makes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile


class Allocation(NamedTuple):
    """One event of an allocator: ``size`` bytes taken (> 0) or given back (< 0)."""

    time: int
    address: int
    size: int


def peak_bytes(
    step: Callable[[], object],
    kept: Callable[[], Iterable[torch.Tensor | None]] = tuple,
    device: str = "cpu",
) -> int:
    """Run ``step`` once (compile it before) and return the peak of its own live allocations on ``device``."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities, profile_memory=True) as profiler:
        step()
    events = sorted(_allocations(profiler, device))
    return _peak(events, {t.untyped_storage().data_ptr() for t in kept() if t is not None})


def _allocations(profiler: Any, device: str) -> Iterator[Allocation]:
    pending = list(profiler.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.tag == torch._C._profiler._EventType.Allocation:
            record = event.extra_fields
            if record.device.type == device:
                yield Allocation(event.start_time_ns, record.ptr, record.alloc_size)


def _peak(events: list[Allocation], kept: set[int]) -> int:
    """Peak of the bytes in ``own``.

    The profiler does not see a free on a thread of someone else's (a collective's); such memory counts until its
    address is given out again. So the peak may come out too high, never too low.
    """
    last = {event.address: i for i, event in enumerate(events) if event.address in kept and event.size > 0}
    own: dict[int, int] = {}
    live = peak = 0
    for i, event in enumerate(events):
        live -= own.pop(event.address, 0)
        if event.size > 0 and last.get(event.address) != i:  # the last allocation at its address is the kept tensor
            own[event.address] = event.size
            live += event.size
        peak = max(peak, live)
    return peak
