"""Which tokens travel so that each rank, which holds some, has those that it wants.

    >>> move = redistribution(held=[[0, 1, 2], [3, 4]], wanted=[[0, 1, 2, 3], [2, 3, 4]], rank=1)
    >>> move.sent, move.received                      # rank 1 sends its row of token 3, and receives token 2
    ((1, 0), (1, 0))
    >>> move.rows, move.found                         # of the two rows held and the one received: token 2, 3, 4
    (array([0]), array([2, 0, 1]))

Contract: each token is held by one rank; a token travels to a rank at most once, however often it is wanted there, and
never to the rank that holds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ringpass.layouts.layout import Layout
from ringpass.layouts.ranges import Ranges, spread
from ringpass.masks.constants import Array


@dataclass(frozen=True, eq=False)
class Redistribution:
    """What one rank does.  `held`: number of its rows; `found`: the row of each wanted token, counted on from `held`
    for those received, which come in the order of ranks; `idle`: nothing travels between any two ranks."""

    held: int
    rows: Array  # of those it holds, what it sends, rank after rank
    sent: tuple[int, ...]  # how many to each rank
    received: tuple[int, ...]
    found: Array
    idle: bool


def redistribution(held: Sequence[Array], wanted: Sequence[Array], rank: int) -> Redistribution:
    """From the tokens of each rank, in the order of its rows, to those that each rank wants, in that order."""
    held, wanted = ([np.asarray(x, dtype=np.int64) for x in side] for side in (held, wanted))
    ranks = range(len(held))
    sent = [_travelling(held[rank], wanted[other]) if other != rank else _NONE for other in ranks]
    received = [_travelling(held[other], wanted[rank]) if other != rank else _NONE for other in ranks]
    travels = any(len(np.setdiff1d(wanted[i], held[i])) for i in ranks)
    rows, found = _rows(held[rank], np.concatenate(sent)), _rows(np.concatenate([held[rank], *received]), wanted[rank])
    return Redistribution(len(held[rank]), rows, tuple(map(len, sent)), tuple(map(len, received)), found, not travels)


@lru_cache(maxsize=256)
def among(held: tuple[Ranges, ...], wanted: tuple[Ranges, ...], rank: int) -> Redistribution:
    """`redistribution` of tokens given as ranges."""
    return redistribution([spread(x) for x in held], [spread(x) for x in wanted], rank)


@lru_cache(maxsize=256)
def between(layout: str, other: str, world: int, tokens: int, rank: int) -> Redistribution:
    """`redistribution` from one layout of `tokens` tokens to another."""
    held, wanted = ([held_by(Layout(x, world), i, tokens) for i in range(world)] for x in (layout, other))
    return redistribution(held, wanted, rank)


def held_by(layout: Layout, rank: int, tokens: int) -> Array:
    """The tokens of `rank` in the order of its rows, as positions in the sequence of `tokens` tokens."""
    places = spread(layout.ranges(rank, tokens))
    return layout.order.permutation.values[places] if layout.order else places


_NONE = np.empty(0, dtype=np.int64)


def _travelling(held: Array, wanted: Array) -> Array:
    return np.intersect1d(held, wanted)


def _rows(tokens: Array, chosen: Array) -> Array:
    """Where each of `chosen` is among `tokens`."""
    order = np.argsort(tokens, kind="stable")
    at = np.searchsorted(tokens, chosen, sorter=order)
    assert len(tokens) or not len(chosen), "nobody holds what is wanted"
    rows = order[np.minimum(at, len(tokens) - 1)]
    assert np.array_equal(tokens[rows], chosen), "nobody holds what is wanted"
    return rows
