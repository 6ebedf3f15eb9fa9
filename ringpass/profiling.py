"""Ranges that torch.profiler and its like show: each tile, exchange, wait and all-to-all, by site and step.

    with profiled("site0 attention_step1_q0to16_k0to8"):
        ...

Without a profiler a range costs well under a microsecond (`tests/test_profiling.py` prints the time), since nothing but
a look at whether somebody observes happens; `torch.profiler.record_function` costs twenty times as much.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch


def profiled(label: str) -> AbstractContextManager[None]:
    """A context that is the range `label` in the trace of a profiler, if one is active."""
    found: AbstractContextManager[None] = torch._C._profiler._RecordFunctionFast(label)
    return found


def site_label(index: int) -> str:
    """How the labels of ranges begin that belong to attention number `index` of the graph.

    >>> site_label(3)
    'site3'
    """
    return f"site{index}"
