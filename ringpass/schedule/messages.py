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

from ringpass.schedule.dilation import GroupProblem, HeadGroup
from ringpass.schedule.order import Ends
from ringpass.schedule.program import Step, Transfer, program
from ringpass.schedule.tiles import Problem

Array = NDArray[np.int64]
StridedSpec = tuple[int, ...]  # flat: start, stop, step, start, stop, step, ..


@dataclass(frozen=True, eq=False)
class MessagePart:
    """`tokens`, ascending, of each of `heads`."""

    heads: tuple[int, ...]
    tokens: Array

    @property
    def rows(self) -> int:
        """(token, K/V head) pairs."""
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

    @property
    def ends(self) -> Ends:
        """With whom the rank exchanges."""
        return Ends(self.shift, self.send.dst if self.send else None, self.receive.src if self.receive else None)


@lru_cache(maxsize=64)
def exchanges(groups: tuple[GroupProblem, ...], rank: int, heads: int, kv_heads: int) -> tuple[Exchange, ...]:
    """The exchanges of `rank` for these head groups, of `heads` query heads and `kv_heads` K/V heads, local keys
    first."""
    by_shift: dict[int, list[tuple[int, Step]]] = {0: []}
    for i, group in enumerate(groups):
        for step in program(group.problem, rank).steps:
            by_shift.setdefault(step.shift, []).append((i, step))
    out = []
    for shift, steps in sorted(by_shift.items()):
        received = [(groups[i].head_group, step.receive) for i, step in steps if step.receive]
        sent = [(groups[i].head_group, step.send) for i, step in steps if step.send]
        out.append(Exchange(shift, tuple(steps), *(_message(moves, heads, kv_heads) for moves in (received, sent))))
    return tuple(out)


def _message(moves: Sequence[tuple[HeadGroup, Transfer]], heads: int, kv_heads: int) -> Message | None:
    if not moves:
        return None
    readers: dict[int, list[int]] = {}
    for i, (head_group, _) in enumerate(moves):
        for head in dict.fromkeys(head_group.key_heads(heads, kv_heads)):
            readers.setdefault(head, []).append(i)
    alike: dict[tuple[int, ...], list[int]] = {}
    for head in sorted(readers):
        alike.setdefault(tuple(readers[head]), []).append(head)
    sent = [head_group.tokens(transfer.tokens) for head_group, transfer in moves]
    parts = [MessagePart(tuple(of), np.unique(np.concatenate([sent[i] for i in which]))) for which, of in alike.items()]
    return Message(moves[0][1].src, moves[0][1].dst, tuple(parts))


def received(groups: tuple[GroupProblem, ...], rank: int, heads: int, kv_heads: int) -> int:
    """(token, K/V head) pairs that `rank` receives."""
    found = exchanges(groups, rank, heads, kv_heads)
    return sum(exchange.receive.rows for exchange in found if exchange.receive)


def rows_of(problem: Problem, rank: int, tokens: Array) -> StridedSpec:
    """The rows of key `tokens`, which `rank` holds, in its block of all tokens; of a head group's problem too."""
    layout = problem.key_layout
    ranges = layout.unrestricted.ranges(rank, layout.strided.tokens if layout.strided else problem.keys)
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
