"""The exchanges of a dilated site, shared by all its head groups: numpy, no tensors, any P on one machine.

A *message* is what one rank sends another in one exchange.  Each of its *parts* holds the key tokens of all K/V heads
that need the same tokens.  Each (token, K/V head) is in a message once, however many head groups and query heads read
it.

Contract: the `exchanges` of all ranks match where the programs of each head group do (`ringpass.schedule.proof`): a
message is a function of what its head groups transfer, which both ends know.
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
StridedSpec = tuple[int, ...]  # flat: start, stop, step, start, stop, step, ..


@dataclass(frozen=True, eq=False)
class MessagePart:
    """`tokens`, ascending, of each of `heads`."""

    heads: tuple[int, ...]
    tokens: Array

    @property
    def rows(self) -> int:
        return len(self.heads) * len(self.tokens)


@dataclass(frozen=True, eq=False)
class Message:
    """What rank `src` sends rank `dst` in one exchange, ordered by part, then by head."""

    src: int
    dst: int
    parts: tuple[MessagePart, ...]

    @property
    def rows(self) -> int:
        """(token, K/V head) pairs."""
        return sum(part.rows for part in self.parts)

    def find(self, heads: Sequence[int], tokens: Array) -> StridedSpec:
        """The rows of `tokens` of each of `heads`, by head."""
        at, offset = {}, 0
        for part in self.parts:
            for i, head in enumerate(part.heads):
                at[head] = offset + i * len(part.tokens) + np.searchsorted(part.tokens, tokens)
            offset += part.rows
        return strided_ranges(np.concatenate([at[head] for head in heads]))


@dataclass(frozen=True, eq=False)
class Exchange:
    """One exchange of a dilated site: the steps of its head groups, by index, and the messages that they share."""

    shift: int
    steps: tuple[tuple[int, Step], ...]
    receive: Message | None = None
    send: Message | None = None


@lru_cache(maxsize=64)
def exchanges(site: Site, heads: int, groups: int) -> tuple[Exchange, ...]:
    """The exchanges of a rank of a dilated site with `heads` query heads and `groups` K/V heads, local keys first."""
    group_sites = site.per_head_group(heads)
    by_shift: dict[int, list[tuple[int, Step]]] = {0: []}
    for group_site in group_sites:
        for step in group_site.program.steps:
            by_shift.setdefault(step.shift, []).append((group_site.group_index, step))
    out = []
    for shift, steps in sorted(by_shift.items()):
        received = [(group_sites[i], step.receive) for i, step in steps if step.receive]
        sent = [(group_sites[i], step.send) for i, step in steps if step.send]
        out.append(Exchange(shift, tuple(steps), *(_message(moves, heads, groups) for moves in (received, sent))))
    return tuple(out)


def _message(moves: Sequence[tuple[Site, Transfer]], heads: int, groups: int) -> Message | None:
    if not moves:
        return None
    readers: dict[int, list[int]] = {}
    for i, (group_site, _) in enumerate(moves):
        for head in dict.fromkeys(key_heads(group_site, heads, groups)):
            readers.setdefault(head, []).append(i)
    alike: dict[tuple[int, ...], list[int]] = {}
    for head in sorted(readers):
        alike.setdefault(tuple(readers[head]), []).append(head)
    sent = [tokens_of(group_site, transfer.tokens) for group_site, transfer in moves]
    parts = [MessagePart(tuple(of), np.unique(np.concatenate([sent[i] for i in which]))) for which, of in alike.items()]
    return Message(moves[0][1].src, moves[0][1].dst, tuple(parts))


def received(site: Site, heads: int, groups: int) -> int:
    """(token, K/V head) pairs that the rank receives."""
    return sum(exchange.receive.rows for exchange in exchanges(site, heads, groups) if exchange.receive)


def key_heads(group_site: Site, heads: int, groups: int) -> tuple[int, ...]:
    """The K/V heads that a group's query heads read: one per query head, or one per equal number of query heads."""
    assert group_site.head_group is not None
    each = tuple(j // (heads // groups) for j in group_site.head_group.members)
    unique = tuple(dict.fromkeys(each))
    share = len(each) // len(unique)
    return unique if each == tuple(g for g in unique for _ in range(share)) else each


def tokens_of(group_site: Site, ranges: Ranges) -> Array:
    """The tokens at rows `ranges` of a head group."""
    assert group_site.head_group is not None
    rows = [np.arange(a, b, dtype=np.int64) for a, b in ranges]
    return group_site.head_group.strided.at(np.concatenate([np.arange(0, dtype=np.int64), *rows]))


def rows_of(site: Site, tokens: Array) -> StridedSpec:
    """The rows of `tokens`, which the rank holds, in its block of all tokens."""
    layout = Layout(site.key_layout, site.world)
    ranges = layout.unrestricted.ranges(site.rank, layout.strided.tokens if layout.strided else site.keys)
    owned = np.array(ranges, dtype=np.int64).reshape(-1, 2)
    lengths = owned[:, 1] - owned[:, 0]
    before = np.cumsum(lengths) - lengths
    at = np.searchsorted(owned[:, 0], tokens, side="right") - 1
    return strided_ranges(tokens - owned[at, 0] + before[at])


def strided_ranges(numbers: Array) -> StridedSpec:
    """Ascending numbers as ranges of constant step.

    >>> strided_ranges(np.array([0, 2, 4, 5, 6, 20]))
    (0, 6, 2, 5, 7, 1, 20, 21, 1)
    """
    out: list[int] = []
    steps = np.diff(numbers)
    changes = np.flatnonzero(np.diff(steps)) + 1  # where the step changes
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
