"""Ranges that profilers and `ringpass.metrics` see: each tile, exchange, wait and all-to-all, by site and step.

    with profiled("site0 attention_step1_q0to16_k0to8"):
        ...

Without a profiler a range costs well under a microsecond (`tests/test_profiling.py` prints the time), since nothing but
a look at whether somebody observes happens; `torch.profiler.record_function` costs twenty times as much.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from ringpass.metrics import recorder

P = ParamSpec("P")
R = TypeVar("R")


def profiled(label: str) -> AbstractContextManager[None]:
    """A context that is the range `label` of a profiler, if one is active, and is timed while metrics are on."""
    if recorder.active is not None:
        return recorder.Timed(recorder.active, label)
    found: AbstractContextManager[None] = torch._C._profiler._RecordFunctionFast(label)
    return found


def in_range(label: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a function: each of its calls is a range `label`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            with profiled(label):
                return function(*args, **kwargs)

        return call

    return decorate


def site_label(index: int) -> str:
    """How the labels of ranges begin that belong to attention number `index` of the graph.

    >>> site_label(3)
    'site3'
    """
    return f"site{index}"
