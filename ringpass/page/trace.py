"""Timelines as Chrome's trace format, which https://ui.perfetto.dev opens; and the other way.

    >>> events = [Event(0, "tile", 0, 0.0, 2.0, "16 pairs")]
    >>> [x["ph"] for x in as_trace({"site 0": (events, "s")}, world=1)["traceEvents"]]
    ['M', 'M', 'M', 'X']
    >>> measured(as_trace({"site 0": (events, "s")}, world=1)) == events
    True

One process per rank; tiles and waits are in its thread "compute", transfers in its thread "transfer".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ringpass.page.timeline import Event, planned_of

THREADS = ("compute", "transfer")
MICROSECONDS = {"s": 1e6}  # of one unit of a timeline; a FLOP counts as a picosecond, as on a device of 1 TFLOP/s
FLOP = 1e-6
LANES = (
    ("wait", re.compile(r"\bwait", re.I)),
    ("transfer", re.compile(r"\b(transfer|exchange|receive|send)", re.I)),
    ("tile", re.compile(r"\b(tile|attention_tile)", re.I)),
)
"""By what words in an event's name its lane is told."""
STEP, RANK = re.compile(r"step\D?(\d+)"), re.compile(r"rank\D?(\d+)")


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


def measured(trace: Mapping[str, Any]) -> list[Event]:
    """The tiles, transfers and waits of a trace in Chrome's format, in seconds; other events are left out.

    The rank of an event is that of its process: the number in the process's name, or else its id, as numbered here.
    """
    events = [x for x in trace.get("traceEvents", ()) if x.get("ph") == "X" and _lane(x)]
    names = {x["pid"]: str(x["args"].get("name", "")) for x in trace.get("traceEvents", ()) if _names_process(x)}
    processes = sorted({x["pid"] for x in events}, key=str)
    ranks = {pid: int(m[1]) if (m := RANK.search(names.get(pid, ""))) else i for i, pid in enumerate(processes)}
    out = []
    for x in events:
        step = STEP.search(x["name"])
        start, stop = float(x["ts"]) / 1e6, (float(x["ts"]) + float(x.get("dur", 0.0))) / 1e6
        detail = str((x.get("args") or {}).get("detail", x["name"]))
        out.append(Event(ranks[x["pid"]], str(_lane(x)), int(step[1]) if step else 0, start, stop, detail))
    return out


def _lane(event: Mapping[str, Any]) -> str | None:
    return next((lane for lane, words in LANES if words.search(str(event.get("name", "")))), None)


def _names_process(event: Mapping[str, Any]) -> bool:
    return event.get("ph") == "M" and event.get("name") == "process_name"


def _named(what: str, rank: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": rank, "tid": thread, "name": what, "args": {"name": name}}
