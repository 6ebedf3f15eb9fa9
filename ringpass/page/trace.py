"""Timelines as Chrome's trace format, which https://ui.perfetto.dev opens.

    >>> events = [Event(0, "tile", 0, 0.0, 2.0, "16 pairs")]
    >>> [x["ph"] for x in as_trace({"site 0": (events, "s")}, world=1)["traceEvents"]]
    ['M', 'M', 'M', 'X']

One process per rank; tiles and waits are in its thread "compute", transfers in its thread "transfer".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ringpass.page.timeline import Event, planned_of

THREADS = ("compute", "transfer")
MICROSECONDS = {"s": 1e6}  # of one unit of a timeline; a FLOP counts as a picosecond, as on a device of 1 TFLOP/s
FLOP = 1e-6


def as_trace(timelines: Mapping[str, tuple[Sequence[Event], str]], world: int) -> dict[str, Any]:
    """The timelines of several attentions, by name, one after the other on every rank, as `{"traceEvents": [..]}`."""
    out: list[dict[str, Any]] = []
    for rank in range(world):
        out.append(_named("process_name", rank, 0, f"rank {rank}"))
        out += [_named("thread_name", rank, thread, name) for thread, name in enumerate(THREADS)]
    first = 0.0
    for name, (events, unit) in timelines.items():
        scale = MICROSECONDS.get(unit, FLOP)
        for x in events:
            out.append(
                {
                    "ph": "X",
                    "pid": x.rank,
                    "tid": int(x.lane == "transfer"),
                    "name": f"{x.lane} step {x.step}",
                    "cat": x.lane,
                    "ts": first + x.start * scale,
                    "dur": (x.stop - x.start) * scale,
                    "args": {"attention": name, "detail": x.detail},
                }
            )
        first += max((x.stop for x in events), default=0.0) * scale
    return {"traceEvents": out, "displayTimeUnit": "ms"}


def graph_trace(graph: Mapping[str, Any], world: int) -> dict[str, Any]:
    """The planned timelines of a report's graph, one for each of its schedules."""
    schedules = graph["schedules"] or ()
    return as_trace({f"schedule {i}": planned_of(x) for i, x in enumerate(schedules)}, world)


def _named(what: str, rank: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": rank, "tid": thread, "name": what, "args": {"name": name}}
