"""Timelines and exchange graphs: what a schedule says, in the formats that other tools read."""

from __future__ import annotations

from functools import cache
from typing import Any

import networkx as nx
import pytest

from ringpass.layouts.layout import Layout
from ringpass.page.exchange_graph import as_dot, exchange_graph
from ringpass.page.profile import measured
from ringpass.page.timeline import Costs, Event, ends, planned, slowest
from ringpass.page.trace import as_trace
from ringpass.schedule.program import program
from ringpass.schedule.tiles import Problem
from tests.support.profiles import profile_of


@cache
def ranks(world: int, layout: str, tokens: int = 256) -> list[dict[str, Any]]:
    """The schedule of a causal attention, 8 bytes a row."""
    of = Layout(layout, world)
    problem = Problem("k <= q", tokens, tokens, of, of)
    out = []
    for rank in range(world):
        steps = []
        for step in program(problem, rank).steps:
            got = (
                {"from": step.receive.src, "rows": step.receive.size, "bytes": 8 * step.receive.size}
                if step.receive
                else None
            )
            tiles = [[*tile.q, *tile.k, tile.kind] for tile in step.tiles]
            steps.append({"step": step.shift, "receive": got, "send": None, "tiles": tiles})
        out.append({"rank": rank, "steps": steps})
    return out


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("byte", [0.0, 3.0, 1e4])
def test_what_is_planned(layout: str, byte: float) -> None:
    """Each rank computes all its pairs, one tile after the other; it waits as long as keys take and no longer."""
    of = Layout(layout, 4)
    events = planned(ranks(4, layout), Costs(1.0, byte))
    for rank, times in ends(events).items():
        mine = sorted((x for x in events if x.rank == rank and x.lane != "transfer"), key=lambda x: x.start)
        assert times["tile"] == program(Problem("k <= q", 256, 256, of, of), rank).area
        assert all(a.stop <= b.start for a, b in zip(mine, mine[1:], strict=False))
        assert times["end"] == pytest.approx(times["tile"] + times["wait"])
        assert byte or not times["wait"]


def test_the_slowest_rank_is_named() -> None:
    assert "within 2 %" in slowest(planned(ranks(4, "zigzag"), Costs(1.0, 0.0)))
    said = slowest(planned(ranks(4, "contiguous"), Costs(1.0, 0.0)))
    assert said.startswith("Rank 3 ends last") and "computes 1.7" in said


def test_an_exchange_starts_when_both_ends_have() -> None:
    """Rank 0 receives late what rank 1, which computes long, starts to send late."""
    of = [
        {"rank": 0, "steps": [step(0, 1, None), step(1, 1, None), step(2, 1, 1)]},
        {"rank": 1, "steps": [step(0, 1, None), step(1, 9, None), step(2, 1, None)]},
    ]
    events = planned(of, Costs(1.0, 1.0))
    assert Event(0, "transfer", 2, 1.0, 9.0, "8 bytes from 1") in events
    assert Event(0, "wait", 2, 2.0, 9.0, "for rank 1") in events


def step(shift: int, pairs: int, source: int | None) -> dict[str, Any]:
    got = None if source is None else {"from": source, "rows": 1, "bytes": 8}
    return {"step": shift, "receive": got, "send": None, "tiles": [[0, pairs, 0, 1, "full"]]}


def test_traces_have_the_format_of_chrome() -> None:
    """The keys and types that the format asks for; tiles and transfers that overlap are in different threads."""
    events = planned(ranks(4, "contiguous"), Costs(1e-9, 1e-9, "s"))
    trace = as_trace({"layer 0": (events, "s"), "layer 1": (events, "s")}, 4)
    assert set(trace) == {"traceEvents", "displayTimeUnit"}
    for event in trace["traceEvents"]:
        assert event["ph"] in "MX" and isinstance(event["pid"], int) and isinstance(event["tid"], int)
        assert isinstance(event["name"], str) and isinstance(event["args"], dict)
        if event["ph"] == "X":
            assert event["ts"] >= 0 and event["dur"] >= 0 and isinstance(event["cat"], str)
    for pid in range(4):
        for tid in (0, 1):
            mine = sorted(
                (x["ts"], x["dur"])
                for x in trace["traceEvents"]
                if x["ph"] == "X" and (x["pid"], x["tid"]) == (pid, tid)
            )
            assert all(a + d <= b + 1e-9 for (a, d), (b, _) in zip(mine, mine[1:], strict=False))
    assert len([x for x in trace["traceEvents"] if x["ph"] == "X"]) == 2 * len(events)


def test_profiles_are_read_as_they_were_planned() -> None:
    """Ranges of every rank, a transfer from its start to the end of its wait; in the order of their starts."""
    events = planned(ranks(4, "contiguous"), Costs(1e-9, 1e-3, "s"))
    found = measured([profile_of(events, rank) for rank in range(4)])
    kept = sorted((x.start, x.rank, x.lane, x.step, x.stop) for x in events)
    assert [x.start for x in found] == sorted(x.start for x in found)
    assert sorted((round(x.start, 9), x.rank, x.lane, x.step) for x in found) == [
        (round(start, 9), rank, lane, number) for start, rank, lane, number, _ in kept
    ]
    assert sum(x.stop for x in found) == pytest.approx(sum(stop for *_, stop in kept))


def test_ranks_without_a_process_group_are_counted() -> None:
    """What is no range of the package is left out, the names of its ops too."""
    tile = {"ph": "X", "pid": 77, "name": "site0 attention_backward_step2_q0to4_k0to4", "ts": 10.0, "dur": 5.0}
    others = [
        {**tile, "name": name} for name in ("ringpass::attention_tile", "aten::mm", "ringpass::wait", "site 0", "")
    ] + [{**tile, "ph": "M"}, {**tile, "name": "site0 send_step1_to_rank1"}]
    found = measured([{"traceEvents": others}, {"traceEvents": [*others, tile], "baseTimeNanoseconds": 10**9}])
    assert [x[:3] for x in found] == [(1, "tile", 2)]
    assert found[0].start == pytest.approx(1 + 1e-5)


def test_ranges_of_a_gpu_are_taken_where_there_are_any() -> None:
    launch = {"ph": "X", "cat": "user_annotation", "name": "site0 attention_step1_q0to4_k0to4", "ts": 1.0, "dur": 1.0}
    run = {**launch, "cat": "gpu_user_annotation", "ts": 5.0, "dur": 40.0}
    (found,) = measured([{"traceEvents": [launch, run]}])
    assert (found.start, found.stop) == pytest.approx((5e-6, 45e-6))


def test_the_exchange_graph() -> None:
    """In a ring, every rank sends once in each step, and each step is a matching."""
    graph = exchange_graph(ranks(5, "zigzag"))
    assert isinstance(graph, nx.MultiDiGraph) and set(graph) == set(range(5))
    for shift in range(1, 5):
        ends_of = [(a, b) for a, b, about in graph.edges(data=True) if about["step"] == shift]
        assert len({a for a, _ in ends_of}) == len({b for _, b in ends_of}) == len(ends_of) == 5
    lines = as_dot(graph).splitlines()
    assert lines[0] == "digraph exchanges {" and lines[-1] == "}" and len(lines) == 2 + 5 + graph.number_of_edges()
