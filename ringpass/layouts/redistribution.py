"""Which tokens ranks send each other so that each gets the tokens that it needs.

    >>> move = redistribution(held=[[0, 1, 2], [3, 4]], wanted=[[0, 1, 2, 3], [2, 3, 4]], rank=1)
    >>> move.sent, move.received                      # rank 1 sends the row of token 3, receives token 2
    ((1, 0), (1, 0))
    >>> move.rows, move.found                         # tokens 2, 3, 4: row 2 was received
    (array([0]), array([2, 0, 1]))

Contract: each token is held by one rank.  A token is sent to a rank at most once, however often that rank wants it, and
never to the rank that holds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from ringpass.layouts.layout import Layout
from ringpass.layouts.ranges import Ranges, spread
from ringpass.masks.constants import Array, DeviceCopies


@dataclass(frozen=True, eq=False)
class Redistribution:
    """What one rank sends and receives.

    `held`: the number of local rows; `found`: the row of each wanted token among the local rows followed by the
    received ones, in the order of ranks; `idle`: no two ranks exchange anything.
    """

    held: int
    rows: Array  # the local rows to send, by destination rank
    sent: tuple[int, ...]  # number of rows to each rank
    received: tuple[int, ...]  # number of rows from each rank
    found: Array
    idle: bool

    @cached_property
    def row_index(self) -> DeviceCopies:
        """`rows` on the devices that use them."""
        return DeviceCopies(self.rows)

    @cached_property
    def found_index(self) -> DeviceCopies:
        """`found` on the devices that use them."""
        return DeviceCopies(self.found)


def redistribution(held: Sequence[Array], wanted: Sequence[Array], rank: int) -> Redistribution:
    """What `rank` sends and receives so that each rank gets the tokens that it wants.

    `held`, `wanted`: for each rank, the tokens in the order of its rows.
    """
    held, wanted = ([np.asarray(x, dtype=np.int64) for x in side] for side in (held, wanted))
    ranks = range(len(held))
    sent = [_travelling(held[rank], wanted[other]) if other != rank else _NONE for other in ranks]
    received = [_travelling(held[other], wanted[rank]) if other != rank else _NONE for other in ranks]
    travels = any(len(np.setdiff1d(wanted[i], held[i])) for i in ranks)
    rows, found = _rows(held[rank], np.concatenate(sent)), _rows(np.concatenate([held[rank], *received]), wanted[rank])
    return Redistribution(len(held[rank]), rows, tuple(map(len, sent)), tuple(map(len, received)), found, not travels)


@lru_cache(maxsize=256)
def among(held: tuple[Ranges, ...], wanted: tuple[Ranges, ...], rank: int) -> Redistribution:
    """`redistribution` of tokens that are given as ranges, by rank."""
    return redistribution([spread(x) for x in held], [spread(x) for x in wanted], rank)


@lru_cache(maxsize=256)
def between(layout: str, other: str, world: int, tokens: int, rank: int) -> Redistribution:
    """`redistribution` from `layout` to the layout `other`, for a sequence of `tokens` tokens on `world` ranks."""
    held, wanted = ([held_by(Layout(x, world), i, tokens) for i in range(world)] for x in (layout, other))
    return redistribution(held, wanted, rank)


def held_by(layout: Layout, rank: int, tokens: int) -> Array:
    """The tokens of `rank` in the order of its rows, as positions in the sequence of `tokens` tokens."""
    positions = spread(layout.ranges(rank, tokens))
    return layout.order.permutation.values[positions] if layout.order else positions


_NONE = np.empty(0, dtype=np.int64)


def _travelling(held: Array, wanted: Array) -> Array:
    return np.intersect1d(held, wanted)


def _rows(tokens: Array, chosen: Array) -> Array:
    """The index of each of `chosen` in `tokens`."""
    order = np.argsort(tokens, kind="stable")
    at = np.searchsorted(tokens, chosen, sorter=order)
    assert len(tokens) or not len(chosen), "no rank holds a wanted token"
    rows = order[np.minimum(at, len(tokens) - 1)]
    assert np.array_equal(tokens[rows], chosen), "no rank holds a wanted token"
    return rows
