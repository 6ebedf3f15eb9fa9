"""reuse: until when a buffer takes memory, as Inductor gives the memory of a dead one to a later one of its size.

    occupy(lives, alive(lives, steps, others))      # moves the `stop` of buffers whose memory waits to be given on

Rules, those of Inductor's memory planning (`codegen/wrapper.py: AllocateLine`):

- A buffer that its own code allocates, for a kernel or a product, takes the memory of the buffer of its size and dtype
  that died last.  From the death of the one to the start of the other nobody else can have it.
- Memory waits only where the peak stays what it is, by Inductor's own count: what is alive, without in-place writes and
  without what kernels allocate while they run.  So the steps before and after the peak fill up to its height.
- What may be unaligned is given to nobody: on a CPU, what operators make of inputs of the graph; messages are aligned.

Contract: `lives` are those of one graph, whose nodes are the steps; only `stop` changes, and never to an earlier step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Span = tuple[int, int, int]
"""First step, last step, bytes."""
UNCOUNTED = -1


@dataclass
class Life:
    """A buffer: `size` bytes from step `start` to step `stop`, both included.

    `kind`: one of `memory.KINDS`; `read`: the last step at which Inductor believes that it is there, UNCOUNTED: none,
    since it is not Inductor's to free; it is after `stop` where the buffer is overwritten in place; `dtype`: of its
    elements; `takes`, `gives`: whether it may take over memory, and its memory be taken over.
    """

    key: Any
    size: int
    kind: str
    start: int
    stop: int
    read: int
    dtype: torch.dtype | None = None
    takes: bool = False
    gives: bool = False


def alive(spans: Iterable[Span], steps: int) -> Tensor:
    """Bytes at each step."""
    change = [0] * (steps + 1)
    for start, stop, size in spans:
        change[start] += size
        change[stop + 1] -= size
    return torch.tensor(change, dtype=torch.int64).cumsum(0)[:-1]


def occupy(lives: Sequence[Life], counted: Tensor) -> None:
    """Extends the lives of buffers to where others take their memory; `counted`: bytes at each step by Inductor."""
    most = int(counted.max()) if counted.numel() else 0
    free: dict[tuple[torch.dtype | None, int], list[Life]] = defaultdict(list)
    dying = sorted((x for x in lives if x.gives and x.stop == x.read), key=lambda x: x.stop, reverse=True)
    for life in sorted((x for x in lives if x.takes), key=lambda x: x.start):
        while dying and dying[-1].stop < life.start:
            dead = dying.pop()
            free[dead.dtype, dead.size].append(dead)
        waiting = free[life.dtype, life.size]
        if not waiting:
            continue
        between = slice(waiting[-1].stop + 1, life.start)
        if between.start == between.stop or int(counted[between].max()) + life.size <= most:
            counted[between] += life.size
            waiting.pop().stop = life.start - 1
