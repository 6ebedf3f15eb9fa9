"""The proof of all-to-alls passes what is planned, and names what is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

import pytest

from ringpass.errors import ScheduleError
from ringpass.layouts.pooling import Parcel, Pooling, heads_text
from ringpass.schedule.head_shares import HeadShare, allowed_degrees, head_shares
from ringpass.schedule.pooling_proof import check_pooling, prove_pooling
from ringpass.schedule.site_proof import check_shares

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


def dropped(sides: Sides, random: Random) -> set[int]:
    """On both sides, so that they still match."""
    rank = random.randrange(len(sides[1]))
    parcel = sides[1][rank].pop(random.randrange(len(sides[1][rank])))
    sides[0][parcel.src].remove(parcel)
    return {parcel.src, parcel.dst}


def dropped_by_the_sender(sides: Sides, random: Random) -> set[int]:
    rank = random.randrange(len(sides[0]))
    parcel = sides[0][rank].pop(random.randrange(len(sides[0][rank])))
    return {parcel.src, parcel.dst}


def doubled(sides: Sides, random: Random) -> set[int]:
    rank = random.randrange(len(sides[1]))
    parcel = random.choice(sides[1][rank])
    sides[1][rank].append(parcel)
    sides[0][parcel.src].append(parcel)
    return {parcel.src, parcel.dst}


def changed(change: Callable[[Parcel, int], Parcel]) -> Callable[[Sides, Random], set[int]]:
    def apply(sides: Sides, random: Random) -> set[int]:
        rank = random.randrange(len(sides[1]))
        i = random.randrange(len(sides[1][rank]))
        old = sides[1][rank][i]
        new = change(old, len(sides[0]))
        sides[1][rank][i] = new
        sides[0][old.src].remove(old)
        sides[0][new.src].append(new)
        return {old.src, old.dst, new.src, new.dst}

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
    right = executed(ranks, [list(how.leaving) for how in ranks], [list(how.arriving) for how in ranks])
    for seed in range(10):
        sides = [[[*how.leaving] for how in ranks], [[*how.arriving] for how in ranks]]
        touched = FAULTS[fault](sides, Random(seed))
        assert executed(ranks, *sides) != right
        with pytest.raises(ScheduleError, match="head|token") as error:
            check_pooling(ranks, *sides)
        assert touched & {int(x) for x in re.findall(r"rank (\d+)", str(error.value))}, error.value


def executed(ranks: list[Pooling], leaving: list[list[Parcel]], arriving: list[list[Parcel]]) -> list[object]:
    """What each rank ends up with, of the numbers of heads and tokens: by (head, token), or how it fails."""
    sent: dict[tuple[int, int], list[list[tuple[int, int]]]] = {}
    for rank, parcels in enumerate(leaving):
        for p in parcels:
            held = {t for a, b in ranks[rank].layout.ranges(rank, ranks[rank].tokens) for t in range(a, b)}
            pairs = [(head, t) if t in held else (-1, -1) for head in p.heads for a, b in p.tokens for t in range(a, b)]
            sent.setdefault((rank, p.dst), []).append(pairs)
    out: list[object] = []
    for rank, parcels in enumerate(arriving):
        found: list[object] = []
        for p in parcels:
            at = [(head, t) for head in p.heads for a, b in p.tokens for t in range(a, b)]
            box = sent.get((p.src, rank), [])
            found.append(sorted(zip(at, box.pop(0), strict=True)) if box and len(box[0]) == len(at) else "fails")
        out.append((sorted(map(str, found)), rank))
    return [out, sorted(key for key, box in sent.items() if box)]


SHARE_FAULTS: dict[str, Callable[[HeadShare], HeadShare]] = {
    "a head too few": lambda share: replace(share, heads=share.heads[:-1]),
    "a head too many": lambda share: replace(share, heads=range(share.heads.start, share.heads.stop + 1)),
    "heads of a neighbour": lambda share: replace(share, heads=range(share.heads.start + 1, share.heads.stop + 1)),
    "other K/V heads": lambda share: replace(share, key_heads=tuple(head + 1 for head in share.key_heads)),
    "a K/V head too few": lambda share: replace(share, key_heads=share.key_heads[1:]),
    "K/V heads in another order": lambda share: replace(share, key_heads=share.key_heads[::-1]),
    "of another member": lambda share: replace(share, member=share.member + 1),
}


@pytest.mark.parametrize("fault", SHARE_FAULTS)
def test_wrong_shares_are_refused(fault: str) -> None:
    """What each query head reads is found by itself: every head once, from the K/V head of its group."""
    caught = 0
    for heads, degree in (((8, 8), 2), ((8, 4), 2), ((8, 2), 4), ((7, 7), 3), ((6, 3), 2), ((12, 4), 3)):
        right = head_shares(*heads, degree)
        for member in range(degree):
            shares = [SHARE_FAULTS[fault](share) if share.member == member else share for share in right]
            if reading(shares, heads) == reading(right, heads):
                continue
            with pytest.raises(ScheduleError, match="head|members") as error:
                check_shares(shares, heads)
            named = {int(x) for x in re.findall(r"rank (\d+)", str(error.value))}
            assert named & {member, member + 1} or "members" in str(error.value), error.value
            caught += 1
    assert caught >= 6


def reading(shares: Sequence[HeadShare], heads: tuple[int, int]) -> list[object]:
    """(member, query head, the K/V head that it reads) as grouped attention has it."""
    out: list[object] = []
    for share in shares:
        n, m = len(share.heads), len(share.key_heads)
        out += [
            (share.member, h, share.key_heads[i * m // n] if m and n % m == 0 else None)
            for i, h in enumerate(share.heads)
        ]
    return out
