"""Token ranges: which tokens of a sequence a block of rows holds, and which row holds a token.

>>> held = ((0, 3), (8, 10))        # rows 0 to 4 of a block hold tokens 0, 1, 2, 8, 9
>>> size(held), tokens(held, rows=(2, 4)), rows(((8, 9),), owned=held)
(5, ((2, 3), (8, 9)), ((3, 4),))
"""

from __future__ import annotations

import numpy as np

from ringpass.masks.constants import Array

Ranges = tuple[tuple[int, int], ...]
"""Half-open token ranges, ascending and disjoint."""


def size(ranges: Ranges) -> int:
    """Number of tokens in `ranges`."""
    return sum(stop - start for start, stop in ranges)


def tokens(ranges: Ranges, rows: tuple[int, int]) -> Ranges:
    """The tokens in `rows` of a block that holds `ranges`.

    >>> tokens(((0, 3), (8, 10)), rows=(2, 4))
    ((2, 3), (8, 9))
    """
    out, offset = [], 0
    for start, stop in ranges:
        low, high = max(rows[0] - offset, 0) + start, min(rows[1] - offset, stop - start) + start
        out += [(low, high)] if low < high else []
        offset += stop - start
    return tuple(out)


def rows(ranges: Ranges, owned: Ranges) -> Ranges:
    """The rows of the tokens `ranges` in a block that holds the tokens `owned`.

    >>> rows(((8, 9),), owned=((0, 3), (8, 10)))
    ((3, 4),)
    """
    out, offset = [], 0
    for start, stop in owned:
        for a, b in ranges:
            low, high = max(a, start), min(b, stop)
            if low < high:
                out.append((offset + low - start, offset + high - start))
        offset += stop - start
    assert size(tuple(out)) == size(ranges), (ranges, owned)
    return tuple(out)


def union(ranges: Ranges) -> Ranges:
    """The tokens that are in any of `ranges`, which may overlap and be in any order.

    >>> union(((5, 9), (0, 3), (2, 4), (9, 10)))
    ((0, 4), (5, 10))
    """
    out: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if out and start <= out[-1][1]:
            out[-1] = out[-1][0], max(out[-1][1], stop)
        else:
            out.append((start, stop))
    return tuple(out)


def clipped(ranges: Ranges, low: int, high: int, shift: int = 0) -> Ranges:
    """The part of `ranges` from token `low` to token `high`, shifted by `shift` tokens.

    >>> clipped(((0, 3), (8, 10)), 2, 9, shift=-2)
    ((0, 1), (6, 7))
    """
    parts = ((max(a, low), min(b, high)) for a, b in ranges)
    return tuple((a + shift, b + shift) for a, b in parts if a < b)


def contains(outer: Ranges, inner: Ranges) -> bool:
    """Whether each token of `inner` is in `outer`.

    >>> contains(((0, 3), (8, 10)), ((1, 2), (9, 10)))
    True
    """
    return sum(max(0, min(stop, b) - max(start, a)) for start, stop in inner for a, b in outer) == size(inner)


def spread(ranges: Ranges) -> Array:
    """The tokens in `ranges`, one by one, as a 1-D array."""
    return np.concatenate([np.arange(0), *(np.arange(start, stop) for start, stop in ranges)])
