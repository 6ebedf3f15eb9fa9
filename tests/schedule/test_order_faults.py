"""Faults in the order of starts, waits, reads and frees are caught and named: early frees, and circles under NCCL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

import pytest

from ringpass.schedule.order import FREE, GRADIENTS, KEYS, READ, START, WAIT, Ends, Event, order
from ringpass.schedule.order_proof import check_events
from ringpass.schedule.program import program
from ringpass.schedule.proof import ends_of
from tests.support.faults import Attempt, caught_and_named
from tests.support.marks import slow
from tests.support.nccl import completes
from tests.support.random_plans import random_plan

Events = list[list[Event]]
EACH, MANY = 12, 200


# --- what a fault changes ---------------------------------------------------------------------------------------------


def executed(ranks: Sequence[Sequence[Ends]], events: Events) -> object:
    """(whether all exchanges end, what each rank reads of its buffers, whether more than two are in flight, what it
    never frees, whether it frees anything twice)."""
    starts = [[event for event in of_rank if event.action in (START, WAIT)] for of_rank in events]
    known = all(e.what in (KEYS, GRADIENTS) for of_rank in events for e in of_rank)
    ends = known and _each_once(starts) and completes(ranks, starts)
    return ends, [_reads(of_rank) for of_rank in events]


def _each_once(starts: Events) -> bool:
    flat = [(rank, event) for rank, of_rank in enumerate(starts) for event in of_rank]
    return len(flat) == len(set(flat))


def _reads(events: Sequence[Event]) -> tuple[object, ...]:
    state: dict[tuple[str, int], str] = {(KEYS, 0): "there"}
    reads, flying, most, twice = list[object](), set[tuple[str, int]](), 0, False
    for event in events:
        buffer = event.what, event.shift
        if event.action == START:
            state[buffer] = "being written"
            flying.add(buffer)
        elif event.action == WAIT:
            state[buffer] = "there" if state.get(buffer) == "being written" else "nothing"
            flying.discard(buffer)
        elif event.action == READ:
            reads.append((buffer, state.get(buffer, "nothing")))
        else:
            twice |= state.get(buffer) in (None, "free")
            reads += [(buffer, "written after its end")] if buffer in flying else []
            state[buffer] = "free"
        most = max(most, len(flying))
    alive = {buffer for buffer, what in state.items() if what != "free"}
    return sorted(map(str, reads)), most > 2, alive, twice


# --- faults -----------------------------------------------------------------------------------------------------------


def at(random: Random, events: Sequence[Event], action: str, least: int = 1) -> int | None:
    """The place of a random event of that action."""
    places = [i for i, event in enumerate(events) if event.action == action and event.shift >= least]
    return random.choice(places) if places else None


def _place(events: Sequence[Event], action: str, of: Event) -> int:
    return events.index(replace(of, action=action))


def moved(events: Sequence[Event], i: int, j: int) -> list[Event]:
    """Event i comes right before the one that stood at j."""
    out = [event for n, event in enumerate(events) if n != i]
    out.insert(j if j < i else j - 1, events[i])
    return out


def freed_before_it_is_read(random: Random, events: list[Event]) -> list[Event] | None:
    i = at(random, events, FREE)
    return None if i is None else moved(events, i, _place(events, READ, events[i]))


def freed_before_it_arrives(random: Random, events: list[Event]) -> list[Event] | None:
    i = at(random, events, FREE)
    return None if i is None else moved(events, i, _place(events, WAIT, events[i]))


def read_before_it_arrives(random: Random, events: list[Event]) -> list[Event] | None:
    i = at(random, events, READ)
    return None if i is None else moved(events, i, _place(events, WAIT, events[i]))


def never(action: str) -> Callable[[Random, list[Event]], list[Event] | None]:
    def fault(random: Random, events: list[Event]) -> list[Event] | None:
        i = at(random, events, action)
        return None if i is None else [*events[:i], *events[i + 1 :]]

    return fault


def twice(action: str) -> Callable[[Random, list[Event]], list[Event] | None]:
    def fault(random: Random, events: list[Event]) -> list[Event] | None:
        i = at(random, events, action)
        if i is None:
            return None
        j = random.randint(i + 1, len(events))
        return [*events[:j], events[i], *events[j:]]

    return fault


def of_another_step(random: Random, events: list[Event]) -> list[Event] | None:
    i, j = (at(random, events, action) for action in (READ, FREE))
    k = random.choice([x for x in (i, j) if x is not None]) if i is not None else None
    if k is None:
        return None
    out = [*events]
    out[k] = replace(events[k], shift=events[k].shift + random.choice((-1, 1)))
    return out


def swapped_starts(random: Random, events: list[Event]) -> list[Event] | None:
    places = [i for i, event in enumerate(events) if event.action == START]
    if len(places) < 2:
        return None
    i, j = random.sample(places, 2)
    out = [*events]
    out[i], out[j] = out[j], out[i]
    return out


def started_late(random: Random, events: list[Event]) -> list[Event] | None:
    """After the start that follows, where that is possible before its own wait."""
    places = [i for i, event in enumerate(events) if event.action == START]
    pairs = [(i, j) for i, j in zip(places, places[1:], strict=False) if j < _place(events, WAIT, events[i])]
    if not pairs:
        return None
    i, j = random.choice(pairs)
    return moved(events, i, j + 1)


def started_early(random: Random, events: list[Event]) -> list[Event] | None:
    """Before the start that comes before it: keys first, as a loop that thinks of itself alone would have it."""
    places = [i for i, event in enumerate(events) if event.action == START]
    if len(places) < 2:
        return None
    n = random.randrange(1, len(places))
    return moved(events, places[n], places[n - 1])


FAULTS: dict[str, Callable[[Random, list[Event]], list[Event] | None]] = {
    "freed before it is read": freed_before_it_is_read,
    "freed before it arrives": freed_before_it_arrives,
    "read before it arrives": read_before_it_arrives,
    "never started": never(START),
    "never waited for": never(WAIT),
    "never freed": never(FREE),
    "never read": never(READ),
    "started twice": twice(START),
    "freed twice": twice(FREE),
    "read after it is freed": twice(READ),
    "of another step": of_another_step,
    "swapped starts": swapped_starts,
    "started late": started_late,
    "started early": started_early,
}


@pytest.mark.parametrize("each", [EACH, slow(MANY)])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_changes_anything_is_caught_and_named(fault: str, each: int) -> None:
    def attempt(seed: int) -> Attempt | None:
        random = Random(seed)
        problem = random.choice(random_plan(seed % 500).problems)
        ranks = [ends_of(program(problem, rank)) for rank in range(problem.world)]
        backward, rank = random.random() < 0.7, random.randrange(problem.world)
        right = [list(order([ends.shift for ends in of_rank], backward)) for of_rank in ranks]
        changed = FAULTS[fault](random, right[rank])
        if changed is None:
            return None
        wrong = [changed if i == rank else events for i, events in enumerate(right)]
        check_events(ranks, right, backward)
        if executed(ranks, wrong) == executed(ranks, right):
            return None
        return Attempt(lambda: check_events(ranks, wrong, backward), r"rank \d+, step -?\d+", frozenset({rank}))

    caught_and_named(each, range(60 * each), attempt)
