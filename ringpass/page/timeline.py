"""The planned timeline of one attention: when each rank computes, transfers and waits, from its schedule and costs.

    step 0     a rank starts the exchange of step 1 and computes its local tiles
    step t     it waits for the exchange of step t, starts that of the next step, and computes the tiles of step t

An exchange starts when both ends have started it, and takes its bytes over the bandwidth.  Nothing else delays a rank:
no link is shared, kernels attain what they are said to.  The backward has the same steps in the same order.

    >>> steps = [{"step": 0, "tiles": [[0, 4, 0, 4, "full"]], "receive": None, "send": None}]
    >>> for event in planned([{"rank": 0, "steps": steps}], Costs(pair=2.0, byte=1.0)): print(event)
    Event(rank=0, lane='tile', step=0, start=0.0, stop=32.0, detail='16 pairs')
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ringpass.schedule.cost import FLOPS_PER_BYTE
from ringpass.schedule.tiles import TRIANGLES

LANES = ("tile", "transfer", "wait")


class Event(NamedTuple):
    """What a rank does from `start` to `stop`, in the unit of the costs."""

    rank: int
    lane: str
    step: int
    start: float
    stop: float
    detail: str


@dataclass(frozen=True)
class Costs:
    """What a (query, key) pair and a byte cost, in `unit`."""

    pair: float
    byte: float
    unit: str = "FLOPs"


def pairs(tile: Sequence[Any]) -> int:
    """(query, key) pairs of a tile [q0, q1, k0, k1, kind]; of a causal or mirrored one only its triangle counts."""
    rows, columns = tile[1] - tile[0], tile[3] - tile[2]
    return int(rows * (rows + 1) // 2 if tile[4] in TRIANGLES else rows * columns)


def planned(ranks: Sequence[Mapping[str, Any]], costs: Costs) -> list[Event]:
    """The events of all ranks of a schedule, in a forward."""
    steps = {rank["rank"]: {step["step"]: step for step in rank["steps"]} for rank in ranks}
    free = dict.fromkeys(steps, 0.0)  # when a rank has computed what it had
    begun = dict.fromkeys(steps, 0.0)  # when it began that, and started its next exchange
    events = []
    for shift in sorted({shift for of in steps.values() for shift in of}):
        present = [rank for rank, of in steps.items() if shift in of]
        started = {rank: begun[rank] for rank in present}
        for rank in present:
            step, arrival = steps[rank][shift], free[rank]
            if got := step.get("receive"):
                start = max(started[rank], started.get(got["from"], 0.0))
                stop = start + got["bytes"] * costs.byte
                events.append(Event(rank, "transfer", shift, start, stop, f"{got['bytes']} bytes from {got['from']}"))
                if stop > free[rank]:
                    events.append(Event(rank, "wait", shift, free[rank], stop, f"for rank {got['from']}"))
                arrival = max(stop, arrival)
            total = sum(map(pairs, step["tiles"]))
            begun[rank], free[rank] = arrival, arrival + total * costs.pair
            if total:
                events.append(Event(rank, "tile", shift, arrival, free[rank], f"{total} pairs"))
    return events


def planned_of(schedule: Mapping[str, Any]) -> tuple[list[Event], str]:
    """The planned events of a schedule of a report, and their unit: FLOPs, and as many per byte as plans assume."""
    costs = Costs(schedule["pair_flops"], FLOPS_PER_BYTE)
    return planned(schedule["ranks"], costs), costs.unit


def ends(events: Sequence[Event]) -> dict[int, dict[str, float]]:
    """For each rank, the time in each lane, and when it ends."""
    found: dict[int, dict[str, float]] = {}
    for event in events:
        of = found.setdefault(event.rank, {**dict.fromkeys(LANES, 0.0), "end": 0.0})
        of[event.lane] += event.stop - event.start
        of["end"] = max(of["end"], event.stop)
    return found


def slowest(events: Sequence[Event]) -> str:
    """The rank that ends last, and why, in words; empty if there are no events.

    >>> slowest([Event(0, "tile", 0, 0.0, 1.0, ""), Event(1, "tile", 0, 0.0, 3.0, "")])
    'Rank 1 ends last, at 1.50 times the mean of the ranks: it computes 1.50 times the mean.'
    """
    found = ends(events)
    if not found:
        return ""
    rank, mine = max(found.items(), key=lambda x: x[1]["end"])
    mean = {name: sum(of[name] for of in found.values()) / len(found) for name in mine}
    if mine["end"] <= 1.02 * min(of["end"] for of in found.values()):
        return "All ranks end within 2 % of each other."
    computes = mine["tile"] / mean["tile"] if mean["tile"] else 1.0
    why = [f"it computes {computes:.2f} times the mean"]
    if mine["wait"] > 0.02 * mine["end"]:
        why.append(f"it waits for keys {100 * mine['wait'] / mine['end']:.0f} % of its time")
    times = mine["end"] / mean["end"]
    return f"Rank {rank} ends last, at {times:.2f} times the mean of the ranks: {', and '.join(why)}."
