"""The proof of the messages that head groups share, and of hand-overs: what is wrong is caught and named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

import pytest

from ringpass.schedule.dilation import GroupProblem
from ringpass.schedule.hand_over_proof import Made, Reading, Sent, check_hand_overs
from ringpass.schedule.messages import Exchange, Message, MessagePart, exchanges
from ringpass.schedule.messages_proof import check_messages
from tests.support.faults import Attempt, caught_and_named
from tests.support.marks import slow
from tests.support.random_plans import random_plan

EACH, MANY = 8, 100
Ranks = list[tuple[Exchange, ...]]
Groups = tuple[GroupProblem, ...]


def shared(seed: int) -> tuple[Groups, Ranks, int, int] | None:
    """The head groups of a random dilated attention, the exchanges of all ranks, the numbers of heads."""
    plan = random_plan(seed)
    share = Random(seed).choice(plan.shares)
    groups, heads = plan.groups(share), (len(share.heads), len(share.key_heads))
    if not groups:
        return None
    return groups, [exchanges(groups, rank, *heads) for rank in range(plan.problem.world)], *heads


def executed(groups: Groups, ranks: Ranks, heads: int, kv_heads: int) -> object:
    """What each head group of each rank reads in each step: (K/V head, token) as they were sent; and the rows sent."""
    sent = {}
    for of_rank in ranks:
        for x in of_rank:
            if x.send:
                sent[x.send.src, x.send.dst, x.shift] = [
                    (head, int(t)) for part in x.send.parts for head in part.heads for t in part.tokens
                ]
    found: list[object] = [sorted((key, len(rows)) for key, rows in sent.items())]
    for rank, of_rank in enumerate(ranks):
        for x in of_rank:
            rows = sent.get((x.receive.src, rank, x.shift)) if x.receive else []
            if rows is None or (x.receive and len(rows) != x.receive.rows):
                found.append((rank, x.shift, "fails"))
                continue
            for i, step in x.steps:
                if x.receive and step.receive:
                    group = groups[i].head_group
                    found.append(
                        (
                            rank,
                            x.shift,
                            i,
                            _read(x.receive, rows, group.key_heads(heads, kv_heads), group.tokens(step.tokens)),
                        )
                    )
                else:
                    found.append((rank, x.shift, i, bool(step.receive)))
    return found


def _read(message: Message, rows: list[tuple[int, int]], heads: Sequence[int], tokens: object) -> object:
    try:
        spec = message.find(heads, tokens)  # type: ignore[arg-type]
        return [rows[i] for a, b, s in zip(spec[::3], spec[1::3], spec[2::3], strict=True) for i in range(a, b, s)]
    except (KeyError, IndexError):
        return "fails"


def _in_a_part(change: Callable[[Random, MessagePart], list[MessagePart]]) -> Callable[[Random, Message], Message]:
    def fault(random: Random, message: Message) -> Message:
        i = random.randrange(len(message.parts))
        parts = [*message.parts[:i], *change(random, message.parts[i]), *message.parts[i + 1 :]]
        return replace(message, parts=tuple(parts))

    return fault


MESSAGE_FAULTS: dict[str, Callable[[Random, Message], Message | None]] = {
    "dropped": lambda random, message: None,
    "without a part": _in_a_part(lambda random, part: []),
    "with a part twice": _in_a_part(lambda random, part: [part, part]),
    "without a token": _in_a_part(lambda random, part: [replace(part, tokens=part.tokens[1:])]),
    "with other tokens": _in_a_part(lambda random, part: [replace(part, tokens=part.tokens + 1)]),
    "without a head": _in_a_part(lambda random, part: [replace(part, heads=part.heads[1:])]),
    "with another head": _in_a_part(lambda random, part: [replace(part, heads=(part.heads[0] + 1, *part.heads[1:]))]),
    "from another rank": lambda random, message: replace(message, src=message.src + 1),
    "to another rank": lambda random, message: replace(message, dst=message.dst + 1),
    "in another order": lambda random, message: replace(message, parts=message.parts[::-1]),
}


@pytest.mark.parametrize("each", [EACH, slow(MANY)])
@pytest.mark.parametrize("fault", MESSAGE_FAULTS)
def test_wrong_messages_are_caught_and_named(fault: str, each: int) -> None:
    def attempt(seed: int) -> Attempt | None:
        case, random = shared(seed), Random(seed)
        if case is None:
            return None
        groups, right, *heads = case
        places = [
            (rank, i, side)
            for rank, of_rank in enumerate(right)
            for i, x in enumerate(of_rank)
            for side in ("send", "receive")
            if getattr(x, side)
        ]
        if not places:
            return None
        rank, i, side = random.choice(places)
        x = right[rank][i]
        message = getattr(x, side)
        other = MESSAGE_FAULTS[fault](random, message)
        changed = replace(x, send=other) if side == "send" else replace(x, receive=other)
        wrong = [*right]
        wrong[rank] = (*right[rank][:i], changed, *right[rank][i + 1 :])
        check_messages(groups, right, *heads)
        if executed(groups, wrong, *heads) == executed(groups, right, *heads):
            return None
        says = rf"rank \d+, step {x.shift}: .*(message|token)"
        return Attempt(lambda: check_messages(groups, wrong, *heads), says, frozenset({message.src, message.dst}))

    caught_and_named(each, range(200 * each), attempt)


# --- hand-overs -------------------------------------------------------------------------------------------------------

Recurrence = tuple[dict[str, Made], list[Reading], list[Sent]]


def recurrence(seed: int) -> Recurrence:
    """Nodes in order, each on a rank, which read values made before; and the transfers that this needs."""
    random = Random(seed)
    world, n = random.randint(2, 5), random.randint(4, 14)
    made = {f"v{place}": Made(random.randrange(world), place) for place in range(n)}
    readings, handed, there = list[Reading](), list[Sent](), set[tuple[str, int]]()
    for place in range(1, n):
        rank = made[f"v{place}"].rank
        for value in random.sample(range(place), min(place, random.randint(1, 2))):
            readings.append(Reading(f"v{value}", place, rank))
            src = made[f"v{value}"].rank
            if src != rank and (f"v{value}", rank) not in there:
                there.add((f"v{value}", rank))
                handed.append(Sent(f"v{value}", src, rank, place))
    return made, readings, handed


def run(made: dict[str, Made], readings: list[Reading], handed: list[Sent]) -> object:
    """The ranks run their nodes and transfers, written node by node as `RecurrenceWriter` does; a transfer waits for
    its other side."""
    world = max(x.rank for x in made.values()) + 1
    todo: list[list[tuple[str, object]]] = [[] for _ in range(world)]
    queue = [*handed]
    for value, about in sorted(made.items(), key=lambda item: item[1].place):
        while queue and queue[0].place == about.place:
            sent = queue.pop(0)
            for rank in {sent.src, sent.dst} & {*range(world)}:
                todo[rank].append(("transfer", sent))
        todo[about.rank].append(("node", value))
    values: list[set[str]] = [set() for _ in range(world)]
    failures, count, moved = set[str](), 0, True
    while moved:
        moved = False
        for rank in range(world):
            if not todo[rank]:
                continue
            kind, what = todo[rank][0]
            if kind == "node":
                place = made[str(what)].place
                needed = {r.value for r in readings if (r.place, r.rank) == (place, rank)}
                failures |= {f"{rank} lacks {value}" for value in needed - values[rank]}
                values[rank].add(str(what))
                todo[rank].pop(0)
                moved = True
            elif isinstance(what, Sent):
                peer = what.dst if rank == what.src else what.src
                if peer == rank or not 0 <= peer < world or (todo[peer] and todo[peer][0][1] is what):
                    failures |= {f"{what.src} lacks {what.value}"} if what.value not in values[what.src] else set()
                    for one in {rank, peer} & {*range(world)}:
                        todo[one].pop(0)
                    values[what.dst].add(what.value)
                    count, moved = count + 1, True
    return sorted(failures), count, len(queue), [len(x) for x in todo]


def _changed(change: Callable[[Random, Sent, int], list[Sent]]) -> Callable[[Random, list[Sent], int], list[Sent]]:
    def fault(random: Random, handed: list[Sent], world: int) -> list[Sent]:
        i = random.randrange(len(handed))
        return [*handed[:i], *change(random, handed[i], world), *handed[i + 1 :]]

    return fault


HAND_OVER_FAULTS: dict[str, Callable[[Random, list[Sent], int], list[Sent]]] = {
    "dropped": _changed(lambda random, sent, world: []),
    "doubled": _changed(lambda random, sent, world: [sent, sent]),
    "to another rank": _changed(lambda random, sent, world: [replace(sent, dst=(sent.dst + 1) % world)]),
    "from another rank": _changed(lambda random, sent, world: [replace(sent, src=(sent.src + 1) % world)]),
    "of another value": _changed(lambda random, sent, world: [replace(sent, value=f"v{int(sent.value[1:]) + 1}")]),
    "too late": _changed(lambda random, sent, world: [replace(sent, place=sent.place + 1)]),
    "too early": _changed(lambda random, sent, world: [replace(sent, place=int(sent.value[1:]))]),
    "in another order": lambda random, handed, world: random.sample(handed, len(handed)),
}


@pytest.mark.parametrize("each", [EACH, slow(MANY)])
@pytest.mark.parametrize("fault", HAND_OVER_FAULTS)
def test_wrong_hand_overs_are_caught_and_named(fault: str, each: int) -> None:
    def attempt(seed: int) -> Attempt | None:
        made, readings, handed = recurrence(seed)
        check_hand_overs(made, readings, handed)
        if not handed:
            return None
        wrong = HAND_OVER_FAULTS[fault](Random(seed), handed, max(x.rank for x in made.values()) + 1)
        if run(made, readings, wrong) == run(made, readings, handed):
            return None
        says = r"hand-over of v\d+ from rank \d+ to rank \d+.* node \d+"
        return Attempt(lambda: check_hand_overs(made, readings, wrong), says)

    caught_and_named(each, range(100 * each), attempt)


@pytest.mark.parametrize("count", [200, slow(10_000)])
def test_right_hand_overs_pass(count: int) -> None:
    for seed in range(count):
        check_hand_overs(*recurrence(seed))
