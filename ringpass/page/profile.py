"""Measured timelines: the ranges of this package (`ringpass.profiling`) in profiles of torch.profiler, one for a rank.

    >>> of = {"distributedInfo": {"rank": 1}}
    >>> start = {"ph": "X", "pid": 7, "name": "site0 receive_step1_from_rank0", "ts": 0.0, "dur": 5.0}
    >>> wait = {"ph": "X", "pid": 7, "name": "wait for site0 receive_step1_from_rank0", "ts": 8e6, "dur": 1e6}
    >>> for event in measured([{**of, "traceEvents": [start, wait]}]): print(event[:5])
    (1, 'transfer', 1, 0.0, 9.0)
    (1, 'wait', 1, 8.0, 9.0)

On a CPU a transfer lasts from the start of its range to the end of the wait for it.  Where a profile holds the ranges
of a GPU, these are taken: they last from the first kernel that was launched in a range to the end of the last one.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ringpass.page.timeline import Event

SITE = re.compile(r"site\d+ (?!send)")
TILE, WAIT, STEP = re.compile(r"site\d+ attention"), "wait for ", re.compile(r"_step(\d+)")
ON_GPU = "gpu_user_annotation"
"""The category of a range as the GPU ran it."""


def measured(profiles: Sequence[Mapping[str, Any]]) -> list[Event]:
    """The tiles, transfers and waits of profiles in Chrome's format, in seconds, by their starts.

    The rank of a profile is the one that torch.profiler wrote into it, or else its place in `profiles`.
    """
    found = [event for i, profile in enumerate(profiles) for event in _of_rank(profile, rank_of(profile, i))]
    return sorted(found, key=lambda event: event.start)


def rank_of(profile: Mapping[str, Any], default: int) -> int:
    """The rank that torch.profiler wrote into a profile of a run with a process group; `default` if it wrote none."""
    return int((profile.get("distributedInfo") or {}).get("rank", default))


def _of_rank(profile: Mapping[str, Any], rank: int) -> Iterator[Event]:
    ranges = [x for x in profile.get("traceEvents", ()) if x.get("ph") == "X" and _is_range(str(x.get("name", "")))]
    on_gpu = [x for x in ranges if x.get("cat") == ON_GPU]
    base = float(profile.get("baseTimeNanoseconds", 0)) / 1e9
    ordered = sorted(on_gpu or ranges, key=_start)
    ends = {} if on_gpu else _ends_of_waits(ordered)
    for x in ordered:
        name, start = str(x["name"]), base + _start(x)
        stop = base + _stop(x)
        lane = "wait" if name.startswith(WAIT) else "tile" if TILE.match(name) else "transfer"
        if lane == "transfer" and (waits := ends.get(name)):
            stop = base + waits.popleft()
        step = STEP.search(name)
        yield Event(rank, lane, int(step[1]) if step else 0, start, stop, name)


def _is_range(name: str) -> bool:
    return bool(SITE.match(name.removeprefix(WAIT)))


def _ends_of_waits(ranges: Iterable[Mapping[str, Any]]) -> dict[str, deque[float]]:
    """When the waits for each transfer end, in seconds: they come in the order of the transfers of that name."""
    ends: dict[str, deque[float]] = {}
    for x in ranges:
        if (name := str(x["name"])).startswith(WAIT):
            ends.setdefault(name.removeprefix(WAIT), deque()).append(_stop(x))
    return ends


def _start(event: Mapping[str, Any]) -> float:
    return float(event.get("ts", 0.0)) / 1e6


def _stop(event: Mapping[str, Any]) -> float:
    return _start(event) + float(event.get("dur", 0.0)) / 1e6
