"""The proof of redistributions and halos passes what is made, and names what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

import numpy as np
import pytest

from ringpass.layouts.layout import Layout
from ringpass.layouts.ranges import spread
from ringpass.layouts.redistribution import Redistribution, held_by, redistribution
from ringpass.layouts.redistribution_proof import check_redistribution
from ringpass.masks.constants import Array
from tests.support.faults import Attempt, caught_and_named
from tests.support.marks import slow

Moves = list[Redistribution]
Case = tuple[list[Array], list[Array], Moves]
EACH, MANY, VALID = 8, 200, 100
LAYOUTS = ("contiguous", "zigzag", "striped", "zigzag cut 5", "chunked")


def random_case(seed: int) -> Case:
    """What ranks hold and want, and their moves: from one layout to another, or halos."""
    random = Random(seed)
    world, tokens = random.randint(2, 8), random.randint(20, 60)
    one, other = (Layout(name, world) for name in random.sample(LAYOUTS, 2))
    held = [held_by(one, rank, tokens) for rank in range(world)]
    if random.random() < 0.5:
        wanted = [held_by(other, rank, tokens) for rank in range(world)]
    else:
        left, right = random.randint(0, 3), random.randint(0, 3)
        wanted = [
            spread(tuple((max(a - left, 0), min(b + right, tokens)) for a, b in one.ranges(rank, tokens)))
            for rank in range(world)
        ]
    return held, wanted, [redistribution(held, wanted, rank) for rank in range(world)]


def executed(held: list[Array], moves: Moves) -> list[object]:
    """What each rank ends up with: the tokens, or how it fails."""
    out: list[object] = []
    for rank, move in enumerate(moves):
        try:
            if move.idle != moves[0].idle:
                raise IndexError("waits in vain")
            parts = [held[rank]]
            for src, other in enumerate(moves):
                cuts = np.cumsum((0, *other.sent))
                part = held[src][other.rows][cuts[rank] : cuts[rank + 1]]
                if len(part) != move.received[src] or len(other.rows) != cuts[-1]:
                    raise IndexError("another length")
                parts.append(part if not move.idle else part[:0])
            reach = np.concatenate(parts)
            out.append((reach[move.found].tolist(), sum(move.received)))
        except IndexError as error:
            out.append(type(error).__name__)
    return out


Fault = Callable[[Random, Moves, int], Redistribution | None]


def _sent(random: Random, moves: Moves, rank: int, by: int) -> Redistribution | None:
    some = [i for i, n in enumerate(moves[rank].sent) if n]
    if not some:
        return None
    sent = [*moves[rank].sent]
    sent[random.choice(some)] += by
    return replace(moves[rank], sent=tuple(sent))


def _received(random: Random, moves: Moves, rank: int, by: int) -> Redistribution | None:
    some = [i for i, n in enumerate(moves[rank].received) if n]
    if not some:
        return None
    received = [*moves[rank].received]
    received[random.choice(some)] += by
    return replace(moves[rank], received=tuple(received))


def _swapped(random: Random, counts: tuple[int, ...]) -> tuple[int, ...]:
    i, j = random.sample(range(len(counts)), 2)
    out = [*counts]
    out[i], out[j] = out[j], out[i]
    return tuple(out)


def _other(random: Random, rows: Array, by: int) -> Array:
    out = rows.copy()
    out[random.randrange(len(out))] += by
    return out


FAULTS: dict[str, Fault] = {
    "dropped row": lambda random, moves, rank: (
        replace(moves[rank], rows=moves[rank].rows[1:]) if len(moves[rank].rows) else None
    ),
    "row dropped and said": lambda random, moves, rank: (
        replace(found, rows=moves[rank].rows[:-1]) if (found := _sent(random, moves, rank, -1)) else None
    ),
    "other row": lambda random, moves, rank: (
        replace(moves[rank], rows=_other(random, moves[rank].rows, random.choice((-1, 1))))
        if len(moves[rank].rows)
        else None
    ),
    "rows in another order": lambda random, moves, rank: replace(moves[rank], rows=moves[rank].rows[::-1].copy()),
    "to another rank": lambda random, moves, rank: replace(moves[rank], sent=_swapped(random, moves[rank].sent)),
    "from another rank": lambda random, moves, rank: replace(
        moves[rank], received=_swapped(random, moves[rank].received)
    ),
    "one too many expected": lambda random, moves, rank: _received(random, moves, rank, 1),
    "one too few expected": lambda random, moves, rank: _received(random, moves, rank, -1),
    "found elsewhere": lambda random, moves, rank: (
        replace(moves[rank], found=_other(random, moves[rank].found, random.choice((-1, 1))))
        if len(moves[rank].found)
        else None
    ),
    "nothing found at the end": lambda random, moves, rank: replace(moves[rank], found=moves[rank].found[:-1]),
    "said to be idle": lambda random, moves, rank: replace(moves[rank], idle=not moves[rank].idle),
}


@pytest.mark.parametrize("each", [EACH, slow(MANY)])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_changes_anything_is_caught_and_named(fault: str, each: int) -> None:
    def attempt(seed: int) -> Attempt | None:
        held, wanted, right = random_case(seed)
        random = Random(seed)
        rank = random.randrange(len(right))
        changed = FAULTS[fault](random, right, rank)
        if changed is None:
            return None
        wrong = [changed if i == rank else move for i, move in enumerate(right)]
        if executed(held, wrong) == executed(held, right):
            return None
        return Attempt(lambda: check_redistribution(held, wanted, wrong), r"token|rows|idle", frozenset({rank}))

    caught_and_named(each, range(40 * each), attempt)


@pytest.mark.parametrize("count", [VALID, slow(10_000)])
def test_what_is_made_is_proved(count: int) -> None:
    for seed in range(count):
        check_redistribution(*random_case(seed))
