"""Proves the all-to-alls of an attention with a Ulysses degree for all ranks together, before anything is sent.

    >>> prove_pooling("0 1|2 3", tokens=10, layout="zigzag", world=4)

Contract: `check_pooling` returns only if the parcels of all ranks have all of these properties, and raises
ScheduleError for the first that they lack.

    matched   what a rank sends another is what that one expects: the same heads, the same tokens
    held      the sender holds the tokens, and both are of one group
    whole     each rank gets each (head, token) pair of its share once: its heads, the tokens of its whole group
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ringpass.errors import ScheduleError
from ringpass.layouts.layout import Layout
from ringpass.layouts.pooling import Parcel, Pooling
from ringpass.layouts.ranges import Ranges, contains, union

Parcels = Sequence[Sequence[Parcel]]
"""The parcels of ranks 0, 1, .."""


def prove_pooling(heads: str, tokens: int, layout: str, world: int) -> None:
    """Proves the parcels that `Pooling` gives.  Raises ScheduleError if they are wrong."""
    if not Layout(layout, world).replicated:
        ranks = [Pooling(heads, tokens, layout, world, rank) for rank in range(world)]
        check_pooling(ranks, [how.leaving for how in ranks], [how.arriving for how in ranks])


def check_pooling(ranks: Sequence[Pooling], leaving: Parcels, arriving: Parcels) -> None:
    """Proves the parcels that leave and arrive at each rank.  Raises ScheduleError if they are wrong."""
    sent = Counter(parcel for of_rank in leaving for parcel in of_rank)
    expected = Counter(parcel for of_rank in arriving for parcel in of_rank)
    for parcel in (sent - expected) + (expected - sent):
        side = "not expected there" if sent[parcel] > expected[parcel] else "not sent"
        raise ScheduleError(f"all-to-all of rank {parcel.src}: {parcel}: {side}")
    for how, parcels in zip(ranks, arriving, strict=True):
        _check_arriving(how, parcels)


def _check_arriving(how: Pooling, parcels: Sequence[Parcel]) -> None:
    found: dict[int, list[tuple[int, int]]] = {head: [] for head in how.own}
    for parcel in parcels:
        if parcel.dst != how.rank or parcel.src not in how.neighbours:
            raise ScheduleError(f"rank {how.rank} gets what is another group's: {parcel}")
        if not contains(how.layout.ranges(parcel.src, how.tokens), parcel.tokens):
            raise ScheduleError(f"rank {parcel.src} lacks some of the tokens: {parcel}")
        for head in parcel.heads:
            if head not in found:
                raise ScheduleError(f"rank {how.rank} gets a head of another share: {parcel}")
            found[head] += parcel.tokens
    wanted = how.pooled.ranges(how.rank, how.tokens)
    for head, spans in found.items():
        got: Ranges = union(tuple(spans))
        if sum(b - a for a, b in spans) != sum(b - a for a, b in got):
            raise ScheduleError(f"rank {how.rank} gets some tokens of head {head} twice")
        if got != union(wanted):
            raise ScheduleError(f"rank {how.rank} gets tokens {got} of head {head}, and its share needs {wanted}")
