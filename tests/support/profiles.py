"""Profiles as torch.profiler writes them, of ranks that never ran.

>>> [x["name"] for x in profile_of([Event(1, "tile", 0, 0.0, 2.0, "16 pairs")], rank=1)["traceEvents"]]
['site0 attention_step0_q0to4_k0to4']
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ringpass.page.timeline import Event

NAMES = {
    "tile": "site0 attention_step{step}_q0to4_k0to4",
    "transfer": "site0 receive_step{step}_from_rank9",
    "wait": "wait for site0 receive_step{step}_from_rank9",
}


def profile_of(events: Sequence[Event], rank: int) -> dict[str, Any]:
    """The profile of a rank that did what `events` plan, in seconds; starting a transfer takes no time."""
    mine = [x for x in events if x.rank == rank]
    waits = {x.step for x in mine if x.lane == "wait"}
    ranges = [
        {
            "ph": "X",
            "cat": "cpu_op",
            "pid": 1000 + rank,
            "tid": 1000,
            "name": NAMES[x.lane].format(step=x.step),
            "ts": 1e6 * x.start,
            "dur": 0.0 if x.lane == "transfer" and x.step in waits else 1e6 * (x.stop - x.start),
        }
        for x in mine
    ]
    return {"distributedInfo": {"backend": "gloo", "rank": rank}, "traceEvents": ranges}
