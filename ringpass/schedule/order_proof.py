"""Proves that the exchanges of all ranks complete, and that no rank reads or frees a buffer too early.

    >>> prove_order([[Ends(1, dst=1, src=None)], [Ends(1, dst=None, src=0)]])

Contract: `prove_order` returns only if the events of all ranks have all of these properties, forward and backward, and
raises ScheduleError for the first that they lack.

    buffers   each exchange is started, waited for, read and freed, in this order, each once; at most IN_FLIGHT of them
              are between start and wait
    gloo      nothing waits in a circle where a wait ends once both ends have started the exchange, whatever else they
              have started
    NCCL      nor where the exchanges of a rank run one after the other, in the order of their starts, and one that has
              its turn ends once it has its turn on both ends; nothing is buffered
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import networkx as nx

from ringpass.errors import ScheduleError
from ringpass.schedule.order import FREE, GRADIENTS, KEYS, READ, START, WAIT, Ends, Event, order

IN_FLIGHT = 2  # exchanges of a rank between their start and their wait
Issue = Callable[[Sequence[int], bool], Iterable[Event]]
"""(shifts of a rank, whether backward) -> its events in order."""
Ranks = Sequence[Sequence[Ends]]
"""The exchanges of ranks 0, 1, .."""


def prove_order(ranks: Ranks, issue: Issue = order) -> None:
    """Proves the order in which each rank starts, awaits, reads and frees its exchanges, which `issue` gives.

    Raises ScheduleError with the rank and the step, or with the circle of waits.
    """
    for backward in (False, True):
        events = [list(issue([ends.shift for ends in of_rank], backward)) for of_rank in ranks]
        check_events(ranks, events, backward)


def check_events(ranks: Ranks, events: Sequence[Sequence[Event]], backward: bool) -> None:
    """Proves the events of all ranks in one direction.  Raises ScheduleError if they are wrong."""
    for rank, (exchanges, of_rank) in enumerate(zip(ranks, events, strict=True)):
        check_buffers(rank, [ends.shift for ends in exchanges], of_rank, backward)
    check_circles(ranks, events, backward)


def check_circles(ranks: Ranks, events: Sequence[Sequence[Event]], backward: bool) -> None:
    """Proves that nothing waits in a circle.  Raises ScheduleError with the circle."""
    for engine, graph in (("gloo", _matched_by_tag), ("NCCL", _one_after_the_other)):
        _refuse_circle(graph(ranks, events), engine, "backward" if backward else "forward")


# --- buffers ----------------------------------------------------------------------------------------------------------

BEFORE = {START: None, WAIT: START, READ: WAIT, FREE: READ}
"""What must have happened to a buffer before; a buffer that is freed has nothing left to happen to it."""
Buffer = tuple[str, int]  # keys or gradients, shift


def check_buffers(rank: int, shifts: Sequence[int], events: Sequence[Event], backward: bool) -> None:
    """Proves the events of one rank, whose exchanges have these shifts.  Raises ScheduleError if they are wrong."""
    direction = "backward" if backward else "forward"
    wanted = [(KEYS, shift) for shift in shifts]
    wanted += [(GRADIENTS, shift) for shift in shifts] if backward else []
    happened: dict[Buffer, list[str]] = {buffer: [] for buffer in wanted}
    flying: list[Buffer] = []
    for event in events:
        if (event.what, event.shift) == (KEYS, 0) and event.action == READ:
            continue  # the local keys
        past = happened.get((event.what, event.shift))
        if past is None:
            raise _wrong(rank, event, direction, "it has no such exchange")
        if FREE in past:
            raise _wrong(rank, event, direction, "its buffer is free")
        if event.action in past:
            raise _wrong(rank, event, direction, "for the second time")
        if (before := BEFORE[event.action]) is not None and before not in past:
            raise _wrong(rank, event, direction, f"before it {_past(before)}")
        past.append(event.action)
        if event.action == START:
            flying.append((event.what, event.shift))
        elif event.action == WAIT:
            flying.remove((event.what, event.shift))
        if len(flying) > IN_FLIGHT:
            text = " and ".join(f"{what} {shift}" for what, shift in flying)
            raise _wrong(rank, event, direction, f"while {text} are in flight, more than {IN_FLIGHT}")
    for (what, shift), past in happened.items():
        for action in (START, WAIT, READ, FREE):
            if action not in past:
                raise ScheduleError(f"rank {rank}, step {shift}: its {direction} does not {_infinitive(action)} {what}")


def _wrong(rank: int, event: Event, direction: str, why: str) -> ScheduleError:
    action = {START: "starts", WAIT: "waits for", READ: "reads", FREE: "frees"}[event.action]
    return ScheduleError(f"rank {rank}, step {event.shift}: its {direction} {action} {event.what}: {why}")


def _past(action: str) -> str:
    return {START: "starts them", WAIT: "has waited for them", READ: "has read them"}[action]


def _infinitive(action: str) -> str:
    return "wait for" if action == WAIT else action


# --- circles ----------------------------------------------------------------------------------------------------------

Moment = tuple[int, str, str, int]  # (rank, what happens, to keys or gradients, shift)


def _matched_by_tag(ranks: Ranks, events: Sequence[Sequence[Event]]) -> nx.DiGraph[Moment]:
    """What happens, with edges forward in time."""
    graph: nx.DiGraph[Moment] = nx.DiGraph()
    for rank, (exchanges, of_rank) in enumerate(zip(ranks, _exchanged(events), strict=True)):
        nx.add_path(graph, [(rank, event.action, event.what, event.shift) for event in of_rank])
        peers = {ends.shift: ends.peers - {rank} for ends in exchanges}
        for event in of_rank:
            if event.action == WAIT:
                for peer in peers[event.shift]:
                    graph.add_edge((peer, START, event.what, event.shift), (rank, WAIT, event.what, event.shift))
    return graph


def _one_after_the_other(ranks: Ranks, events: Sequence[Sequence[Event]]) -> nx.DiGraph[Moment]:
    """The same where an exchange has its turn, and ends."""
    graph: nx.DiGraph[Moment] = nx.DiGraph()
    for rank, (exchanges, of_rank) in enumerate(zip(ranks, _exchanged(events), strict=True)):
        peers = {ends.shift: ends.peers - {rank} for ends in exchanges}
        before: list[Moment] = []  # what must have ended: the exchange that was started last, and what was waited for
        for event in of_rank:
            turn, end = ((rank, what, event.what, event.shift) for what in ("turn", "end"))
            if event.action == WAIT:
                before.append(end)
                continue
            graph.add_edge(turn, end)
            graph.add_edges_from((moment, turn) for moment in before)
            graph.add_edges_from(((peer, "turn", event.what, event.shift), end) for peer in peers[event.shift])
            before = [end]
    return graph


def _exchanged(events: Sequence[Sequence[Event]]) -> list[list[Event]]:
    """The starts and waits alone."""
    return [[event for event in of_rank if event.action in (START, WAIT)] for of_rank in events]


def _refuse_circle(graph: nx.DiGraph[Moment], engine: str, direction: str) -> None:
    if not nx.is_directed_acyclic_graph(graph):
        circle = [edge[0] for edge in nx.find_cycle(graph)]
        text = " -> ".join(f"rank {r}: {happens} {what} {shift}" for r, happens, what, shift in [*circle, circle[0]])
        raise ScheduleError(
            f"rank {circle[0][0]}, step {circle[0][3]}: with {engine}, its {direction} waits in a circle: {text}"
        )
