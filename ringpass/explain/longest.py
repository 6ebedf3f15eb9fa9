"""longest: the largest length that fits a device.

    peaks at S, 2 S and 4 S tokens      the call explained at three lengths
    peak(S) = a + b S + c S^2           through the three points
    the largest S that fits             explained once more, and made shorter by what is still too much; or, if it
                                        fits, longer, through the points of the three largest lengths

Contract: at most MOST more runs, and none is begun after BUDGET seconds.  A length that was not explained itself is
marked: `verified` is false.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ringpass.amounts import size
from ringpass.explain.data import ReportData
from ringpass.explain.request import Request

BUDGET = 120.0
MOST = 6
FACTORS = (1, 2, 4)
NEAR = 1.05  # of a length that fits: what is no longer than that is not tried


def longest(request: Request, report: ReportData, peak_of: Callable[[Request], int]) -> dict[str, Any] | None:
    """The largest length that fits `report`'s device; `tokens` is None where it cannot be told, and `why` says why.

    `peak_of`: explains a call, and returns the peak of a rank in bytes.
    """
    device = report.verdict.device
    axes = [axis.tokens for graph in report.graphs for axis in graph.axes]
    if device is None:
        return None
    told: dict[str, Any] = {"tokens": None, "device": device["name"], "verified": False}
    lengths = [n for n in dict.fromkeys(sorted(axes, reverse=True)) if _has_dim(request, n)]
    if not lengths:
        return {**told, "why": "no input has a dim of as many elements as an axis has tokens"}
    first, started = lengths[0], time.monotonic()
    peaks = {first: report.verdict.peak_bytes}
    try:
        for factor in FACTORS[1:]:
            if time.monotonic() - started > BUDGET:
                return {**told, "why": f"two more lengths take longer than {BUDGET:g} s"}
            peaks[factor * first] = peak_of(at_length(request, first, factor * first))
        found = _largest(peaks, device["bytes"], request.world)
        if not found:
            return {**told, "tokens": 0, "why": "what does not depend on the length is too much already"}
        fits = 0
        for _ in range(MOST - len(FACTORS) + 1):
            if time.monotonic() - started > BUDGET or found <= fits * NEAR:
                break
            peaks[found] = peak_of(at_length(request, first, found))
            if peaks[found] <= device["bytes"]:
                fits = found
                found = _largest(dict(sorted(peaks.items())[-3:]), device["bytes"], request.world)
            else:
                found = _shorter(found, peaks[found], device["bytes"], request.world)
        if fits:
            return {**told, "tokens": fits, "verified": True, "why": f"its peak is {size(peaks[fits])}"}
    except Exception as error:
        text = f"the model does not run at another length: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
        return {**told, "why": text}
    return {**told, "tokens": found, "why": f"from the peaks at {', '.join(map(str, sorted(peaks)))} tokens"}


def at_length(request: Request, old: int, new: int) -> Request:
    """The call with inputs whose dims of `old` elements have `new`, without data."""
    args, kwargs = pytree.tree_map_only(Tensor, lambda x: _resized(x, old, new), (request.args, dict(request.kwargs)))
    return replace(request, args=args, kwargs=kwargs)


def _resized(x: Tensor, old: int, new: int) -> Tensor:
    if old not in x.shape:
        return x
    made = torch.empty([new if n == old else n for n in x.shape], dtype=x.dtype, device="meta")
    return made.requires_grad_(x.requires_grad)


def _has_dim(request: Request, length: int) -> bool:
    leaves = pytree.tree_leaves((request.args, dict(request.kwargs)))
    return any(isinstance(x, Tensor) and length in x.shape for x in leaves)


def _largest(peaks: dict[int, int], limit: int, world: int) -> int:
    """The largest length whose peak, on the parabola through `peaks`, is at most `limit`; a multiple of 2 P.

    >>> _largest({8: 108, 16: 116, 32: 132}, limit=1_100, world=4)
    1000
    """
    at, values = np.array(list(peaks), dtype=float), np.array(list(peaks.values()), dtype=float)
    c, b, a = np.polyfit(at, values, 2)
    if abs(c) * at.max() ** 2 < 1e-3 * values.max():  # a straight line, but for rounding
        c, (b, a) = 0.0, np.polyfit(at, values, 1)
    room = limit - a
    if room <= 0 or b <= 0 and c <= 0:
        return 0
    found = room / b if c <= 0 else (math.sqrt(b * b + 4 * c * room) - b) / (2 * c)
    return int(found * (1 + 1e-9)) // (2 * world) * 2 * world


def _shorter(length: int, peak: int, limit: int, world: int) -> int:
    """A length that is shorter by the part of the peak that is too much."""
    return max(2 * world, int(length * limit / peak) // (2 * world) * 2 * world - 2 * world)
