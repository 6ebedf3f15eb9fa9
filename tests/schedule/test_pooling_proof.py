"""The proof of all-to-alls passes what is planned, and names what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest

from ringpass.errors import ScheduleError
from ringpass.layouts.pooling import Parcel, Pooling, heads_text
from ringpass.schedule.head_shares import allowed_degrees, head_shares
from ringpass.schedule.pooling_proof import check_pooling, prove_pooling

Sides = list[list[list[Parcel]]]


def poolings(world: int, degree: int, heads: tuple[int, int] = (8, 2), tokens: int = 37) -> list[Pooling]:
    text = heads_text([share.key_heads for share in head_shares(*heads, degree)])
    return [Pooling(text, tokens, "zigzag", world, rank) for rank in range(world)]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8, 64])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (7, 7), (6, 3)], ids=str)
def test_what_is_planned_is_right(heads: tuple[int, int], world: int) -> None:
    for degree in allowed_degrees(world, heads[0]):
        shares = head_shares(*heads, degree)
        for read in ([share.heads for share in shares], [share.key_heads for share in shares]):
            for layout, tokens in (("zigzag", 200), ("contiguous", 211), ("striped", 1031)):
                prove_pooling(heads_text(read), tokens, layout, world)


def dropped(sides: Sides, random: Random) -> None:
    """On both sides, so that they still match."""
    rank = random.randrange(len(sides[1]))
    parcel = sides[1][rank].pop(random.randrange(len(sides[1][rank])))
    sides[0][parcel.src].remove(parcel)


def dropped_by_the_sender(sides: Sides, random: Random) -> None:
    rank = random.randrange(len(sides[0]))
    sides[0][rank].pop(random.randrange(len(sides[0][rank])))


def doubled(sides: Sides, random: Random) -> None:
    rank = random.randrange(len(sides[1]))
    parcel = random.choice(sides[1][rank])
    sides[1][rank].append(parcel)
    sides[0][parcel.src].append(parcel)


def changed(change: Callable[[Parcel, int], Parcel]) -> Callable[[Sides, Random], None]:
    def apply(sides: Sides, random: Random) -> None:
        rank = random.randrange(len(sides[1]))
        i = random.randrange(len(sides[1][rank]))
        old = sides[1][rank][i]
        new = change(old, len(sides[0]))
        sides[1][rank][i] = new
        sides[0][old.src].remove(old)
        sides[0][new.src].append(new)

    return apply


FAULTS = {
    "dropped": dropped,
    "dropped by the sender": dropped_by_the_sender,
    "doubled": doubled,
    "of another owner": changed(lambda p, world: replace(p, src=(p.src + 1) % world)),
    "misdirected": changed(lambda p, world: replace(p, dst=(p.dst + 1) % world)),
    "of another head": changed(lambda p, world: replace(p, heads=(p.heads[0] + 1, *p.heads[1:]))),
    "without a head": changed(lambda p, world: replace(p, heads=p.heads[1:])),
    "truncated": changed(lambda p, world: replace(p, tokens=((p.tokens[0][0], p.tokens[0][1] - 1), *p.tokens[1:]))),
    "shifted": changed(lambda p, world: replace(p, tokens=tuple((a + 1, b + 1) for a, b in p.tokens))),
}


@pytest.mark.parametrize(("world", "degree"), [(4, 2), (6, 3), (4, 4), (8, 4)])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_refused(fault: str, world: int, degree: int) -> None:
    ranks = poolings(world, degree, heads=(8, 4))
    for seed in range(10):
        sides = [[[*how.leaving] for how in ranks], [[*how.arriving] for how in ranks]]
        FAULTS[fault](sides, Random(seed))
        with pytest.raises(ScheduleError):
            check_pooling(ranks, *sides)
