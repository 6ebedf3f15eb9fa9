"""A recorded timeline of one ring: what each rank computes, sends and waits for, in seconds of one clock.

>>> with Recording() as recording: run()
>>> events = together(recording.events)                 # of all ranks
>>> json.dump(as_trace({"forward": events}), file)      # opens in https://ui.perfetto.dev
>>> print(picture(events))

Recorded from outside, by wrapping what ringpass calls: its kernels, `p2p.PendingExchange.wait`, and torch's
`batch_isend_irecv`. gloo does not tell when a message has arrived other than by `wait`, so a thread watches the last
element of each receive buffer, marked with a NaN before the exchange starts: bytes arrive in order.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest.mock import patch

import torch.distributed as dist

LANES = {"tile": "#", "transfer": "=", "wait": "w"}
COLUMNS = 120
GLANCE = 5e-4  # seconds between two looks at the receive buffers


class Event(NamedTuple):
    """From `start` to `stop`, in seconds of the clock that all processes share."""

    rank: int
    lane: str
    name: str
    start: float
    stop: float


class Recording:
    """Records this rank's events while it is entered."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._arriving: list[tuple[Any, float]] = []  # (last element of the buffer, start of the exchange)
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._stack = ExitStack()

    def __enter__(self) -> Recording:
        from ringpass.comm import p2p
        from ringpass.kernels import table as kernels

        lanes = [(kernels, "forward", "tile"), (kernels, "backward", "tile"), (p2p.PendingExchange, "wait", "wait")]
        for owner, name, lane in lanes:
            self._stack.enter_context(patch.object(owner, name, self._timed(getattr(owner, name), lane)))
        self._stack.enter_context(patch.object(dist, "batch_isend_irecv", self._starting(dist.batch_isend_irecv)))
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._over.set()
        self._watcher.join()
        self._look()

    def _timed(self, function: Callable[..., Any], lane: str) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            result = function(*args)
            if lane == "wait":
                self._look()  # what was waited for is there
            self.events.append(Event(dist.get_rank(), lane, lane, start, time.perf_counter()))
            return result

        return timed

    def _starting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def starting(ops: list[dist.P2POp]) -> Any:
            lasts = [op.tensor[-1:] for op in ops if op.op is dist.irecv and op.tensor.numel()]
            for last in lasts:
                last.fill_(math.nan)
            start = time.perf_counter()
            works = function(ops)
            with self._lock:
                self._arriving += [(last.numpy(), start) for last in lasts]
            return works

        return starting

    def _watch(self) -> None:
        while not self._over.wait(GLANCE):
            self._look()

    def _look(self) -> None:
        with self._lock:
            for last, start in [entry for entry in self._arriving if not math.isnan(entry[0][0])]:
                self.events.append(Event(dist.get_rank(), "transfer", "transfer", start, time.perf_counter()))
                self._arriving = [entry for entry in self._arriving if entry[0] is not last]


def together(events: Sequence[Event]) -> list[tuple[Any, ...]]:
    """The events of all ranks, in order of time, the first starting at 0."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [tuple(event) for event in events])
    found = sorted((Event(*event) for mine in everyone for event in mine), key=lambda e: e.start)
    zero = found[0].start
    return [tuple(e._replace(start=e.start - zero, stop=e.stop - zero)) for e in found]


def covered(events: Sequence[Event], by: Sequence[Event]) -> float:
    """Seconds of `events` during which one of `by` is under way; those of `by` do not overlap."""
    return sum(max(0.0, min(a.stop, b.stop) - max(a.start, b.start)) for a in events for b in by)


def as_trace(timelines: dict[str, list[Event]]) -> dict[str, Any]:
    """In the Chrome trace format: a process per timeline and rank, a thread per lane, microseconds."""
    entries: list[dict[str, Any]] = []
    for number, (name, events) in enumerate(timelines.items()):
        for rank in sorted({event.rank for event in events}):
            pid = 100 * number + rank
            entries.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": f"{name}, rank {rank}"}})
            for tid, lane in enumerate(LANES):
                entries.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": lane}})
        for e in events:
            where = {"pid": 100 * number + e.rank, "tid": list(LANES).index(e.lane)}
            times = {"ts": 1e6 * e.start, "dur": 1e6 * (e.stop - e.start)}
            entries.append({"ph": "X", "name": e.name, "cat": e.lane, **where, **times})
    return {"traceEvents": entries, "displayTimeUnit": "ms"}


def picture(events: Sequence[Event]) -> str:
    """A line per rank and lane; an event takes at least one column."""
    end = max(event.stop for event in events)
    lines = []
    for rank in sorted({event.rank for event in events}):
        for lane, mark in LANES.items():
            row = [" "] * COLUMNS
            for e in events:
                if (e.rank, e.lane) == (rank, lane):
                    first = min(COLUMNS - 1, int(e.start / end * COLUMNS))
                    row[first : max(first + 1, round(e.stop / end * COLUMNS))] = mark * max(
                        1, round(e.stop / end * COLUMNS) - first
                    )
            lines.append(f"rank {rank} {lane:8} |{''.join(row)}|")
    return "\n".join([*lines, f"{'':16}0{end:>{COLUMNS}.3f} s"])
