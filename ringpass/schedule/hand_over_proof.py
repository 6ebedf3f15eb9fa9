"""Proves the hand-overs of a recurrence: what passes from the owner of one chunk to that of another.

    >>> state = Reading("state", place=3, rank=1)      # node 3, which runs on rank 1, reads `state`
    >>> check_hand_overs({"state": Made(rank=0, place=1)}, [state], [Sent("state", src=0, dst=1, place=3)])

Contract: `check_hand_overs` returns only if the transfers have all of these properties, and raises ScheduleError, with
the value and the ranks, for the first that they lack.

    owner    a value is sent by the rank that has it, to another one that reads it
    whole    each value that another rank reads is sent to it, once, after it is made and before the first node that
             reads it there
    order    transfers stand in the order of their readers, in which every rank runs them: none waits in a circle
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ringpass.errors import ScheduleError


@dataclass(frozen=True)
class Made:
    """A value that the node at `place` of the program makes, on `rank`."""

    rank: int
    place: int


@dataclass(frozen=True)
class Reading:
    """The node at `place` of the program runs on `rank`, and reads `value`."""

    value: str
    place: int
    rank: int


@dataclass(frozen=True)
class Sent:
    """`value` goes from rank `src` to rank `dst` before the node at `place`."""

    value: str
    src: int
    dst: int
    place: int

    def __str__(self) -> str:
        return f"{self.value} from rank {self.src} to rank {self.dst} before node {self.place}"


def check_hand_overs(made: Mapping[str, Made], readings: Sequence[Reading], handed: Sequence[Sent]) -> None:
    """Proves the transfers of one recurrence.  `made`: where each value is computed.

    Raises ScheduleError if they are wrong.
    """
    first: dict[tuple[str, int], int] = {}
    for reading in readings:
        if made[reading.value].rank != reading.rank:
            at = reading.value, reading.rank
            first[at] = min(first.get(at, reading.place), reading.place)
    seen: set[tuple[str, int]] = set()
    reached = -1
    for sent in handed:
        key = sent.value, sent.dst
        source = made.get(sent.value)
        if source is None or source.rank != sent.src:
            raise ScheduleError(f"hand-over of {sent}: rank {source.rank if source else None} has that value")
        if sent.place <= source.place:
            raise ScheduleError(f"hand-over of {sent}: node {source.place} makes it later")
        if key not in first:
            raise ScheduleError(f"hand-over of {sent}: nothing reads it there")
        if key in seen:
            raise ScheduleError(f"hand-over of {sent}: for the second time")
        if sent.place > first[key]:
            raise ScheduleError(f"hand-over of {sent}: node {first[key]} reads it before")
        if sent.place < reached:
            raise ScheduleError(f"hand-over of {sent}: after one before node {reached}")
        seen.add(key)
        reached = sent.place
    for (value, rank), place in first.items():
        if (value, rank) not in seen:
            raise ScheduleError(
                f"no hand-over of {value} from rank {made[value].rank} to rank {rank}, node {place} reads it"
            )
