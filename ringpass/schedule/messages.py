"""The lanes of a dilated site as one sequence of exchanges: numpy, no tensors, any P on one machine.

A *parcel* is key tokens of those K/V heads that are sent the same ones; a *message* is the parcels that one rank sends
to another in one exchange.  Each (token, K/V head) is in a message once, however many lanes and query heads read it.

Contract: `joints` of all ranks fit together where the programs of each lane do (`ringpass.schedule.proof`): a message
is a function of what its lanes transfer, which both ends know.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringpass.layouts.layout import Layout
from ringpass.layouts.ranges import Ranges
from ringpass.schedule.program import Step, Transfer
from ringpass.schedule.site import Site

Array = NDArray[np.int64]
Spans = tuple[int, ...]  # flat: start, stop, step, start, stop, step, ..


@dataclass(frozen=True, eq=False)
class Parcel:
    """`tokens`, ascending, of each of `heads`."""

    heads: tuple[int, ...]
    tokens: Array

    @property
    def rows(self) -> int:
        return len(self.heads) * len(self.tokens)


@dataclass(frozen=True, eq=False)
class Message:
    """What goes from rank `src` to rank `dst` in one exchange: parcel after parcel, in each head after head."""

    src: int
    dst: int
    parcels: tuple[Parcel, ...]

    @property
    def rows(self) -> int:
        """(token, K/V head) pairs."""
        return sum(parcel.rows for parcel in self.parcels)

    def find(self, heads: Sequence[int], tokens: Array) -> Spans:
        """Where `tokens` of each of `heads` are, head after head."""
        at, offset = {}, 0
        for parcel in self.parcels:
            for i, head in enumerate(parcel.heads):
                at[head] = offset + i * len(parcel.tokens) + np.searchsorted(parcel.tokens, tokens)
            offset += parcel.rows
        return runs(np.concatenate([at[head] for head in heads]))


@dataclass(frozen=True, eq=False)
class Joint:
    """One exchange of a bundle: the steps of its lanes, by number, and what travels for all of them together."""

    shift: int
    steps: tuple[tuple[int, Step], ...]
    receive: Message | None = None
    send: Message | None = None


@lru_cache(maxsize=64)
def joints(site: Site, heads: int, groups: int) -> tuple[Joint, ...]:
    """The exchanges of a dilated site's rank for `heads` query heads and `groups` K/V heads, the own keys first."""
    lanes = site.lanes(heads)
    by_shift: dict[int, list[tuple[int, Step]]] = {0: []}
    for lane in lanes:
        for step in lane.program.steps:
            by_shift.setdefault(step.shift, []).append((lane.number, step))
    out = []
    for shift, steps in sorted(by_shift.items()):
        received = [(lanes[i], step.receive) for i, step in steps if step.receive]
        sent = [(lanes[i], step.send) for i, step in steps if step.send]
        out.append(Joint(shift, tuple(steps), *(_message(moves, heads, groups) for moves in (received, sent))))
    return tuple(out)


def _message(moves: Sequence[tuple[Site, Transfer]], heads: int, groups: int) -> Message | None:
    if not moves:
        return None
    readers: dict[int, list[int]] = {}
    for i, (lane, _) in enumerate(moves):
        for head in dict.fromkeys(key_heads(lane, heads, groups)):
            readers.setdefault(head, []).append(i)
    alike: dict[tuple[int, ...], list[int]] = {}
    for head in sorted(readers):
        alike.setdefault(tuple(readers[head]), []).append(head)
    sent = [tokens_of(lane, transfer.tokens) for lane, transfer in moves]
    parcels = [Parcel(tuple(of), np.unique(np.concatenate([sent[i] for i in which]))) for which, of in alike.items()]
    return Message(moves[0][1].src, moves[0][1].dst, tuple(parcels))


def received(site: Site, heads: int, groups: int) -> int:
    """(token, K/V head) pairs that the rank receives."""
    return sum(joint.receive.rows for joint in joints(site, heads, groups) if joint.receive)


def key_heads(lane: Site, heads: int, groups: int) -> tuple[int, ...]:
    """The K/V heads that a lane's query heads read: one for each of them, or one for each equal number of them."""
    assert lane.lane is not None
    each = tuple(j // (heads // groups) for j in lane.lane.members)
    unique = tuple(dict.fromkeys(each))
    share = len(each) // len(unique)
    return unique if each == tuple(g for g in unique for _ in range(share)) else each


def tokens_of(lane: Site, ranges: Ranges) -> Array:
    """The tokens at rows `ranges` of a lane."""
    assert lane.lane is not None
    rows = [np.arange(a, b, dtype=np.int64) for a, b in ranges]
    return lane.lane.residue.at(np.concatenate([np.arange(0, dtype=np.int64), *rows]))


def rows_of(site: Site, tokens: Array) -> Spans:
    """Where `tokens`, which the rank owns, stand in its block of the whole site."""
    layout = Layout(site.key_layout, site.world)
    ranges = layout.whole.ranges(site.rank, layout.residue.tokens if layout.residue else site.keys)
    owned = np.array(ranges, dtype=np.int64).reshape(-1, 2)
    lengths = owned[:, 1] - owned[:, 0]
    before = np.cumsum(lengths) - lengths
    at = np.searchsorted(owned[:, 0], tokens, side="right") - 1
    return runs(tokens - owned[at, 0] + before[at])


def runs(numbers: Array) -> Spans:
    """Numbers as runs of equal steps.

    >>> runs(np.array([0, 2, 4, 5, 6, 20]))
    (0, 6, 2, 5, 7, 1, 20, 21, 1)
    """
    out: list[int] = []
    steps = np.diff(numbers)
    changes = np.flatnonzero(np.diff(steps)) + 1  # where another step begins
    start, n = 0, len(numbers)
    while start < n:
        after = changes[np.searchsorted(changes, start, side="right") :][:1]
        last = int(after[0]) if len(after) else n - 1
        step = int(steps[start]) if start + 1 < n else 1
        if step <= 0:
            last, step = start, 1
        out += [int(numbers[start]), int(numbers[last]) + step, step]
        start = last + 1
    return tuple(out)


def count(spans: Iterable[int]) -> int:
    """How many numbers `spans` hold."""
    flat: Any = list(spans)
    return sum(-((a - b) // s) for a, b, s in zip(flat[::3], flat[1::3], flat[2::3], strict=True))
