"""Residue classes of tokens within segments: plain arithmetic, no tensors.

    >>> every_other = StridedSegments(tokens=10, segment=4, rate=2, offset=1)
    >>> every_other.spans((0, every_other.length))              # tokens 1, 3, 5, 7, 9
    [(1, 11, 2)]
    >>> every_other.before(5)
    2
    >>> StridedSegments.parse(str(every_other)) == every_other
    True

Of each segment of w tokens, every r-th from o on: n = ceil((w - o) / r) of them.  Counted 0, 1, 2 .. they are rows of
their own; row c is token r c + o + (w - n r) (c // n).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

StridedRanges = tuple[tuple[int, int, int], ...]  # (start, stop, step) of each


@dataclass(frozen=True)
class StridedSegments:
    """Every `rate`-th token from `offset` on, of each `segment` (at most all) of `tokens` tokens."""

    tokens: int
    segment: int
    rate: int
    offset: int

    @property
    def width(self) -> int:
        """Its tokens in a whole segment."""
        return max(0, -((self.offset - self.segment) // self.rate))

    @property
    def length(self) -> int:
        """All its tokens."""
        return self.before(self.tokens)

    @property
    def everything(self) -> bool:
        """Whether each token is in it."""
        return self.rate == 1

    def before(self, token: int) -> int:
        """How many of its tokens stand before `token`."""
        full, rest = divmod(token, self.segment)
        return full * self.width + min(self.width, max(0, -((self.offset - rest) // self.rate)))

    def spans(self, rows: tuple[int, int]) -> list[tuple[int, int, int]]:
        """The tokens of its `rows`, as (start, stop, step); segments that go on in step are joined."""
        out: list[tuple[int, int, int]] = []
        start, stop = rows
        while start < stop:
            segment, within = divmod(start, self.width)
            n = min(stop - start, self.width - within)
            first = segment * self.segment + self.offset + within * self.rate
            if out and out[-1][1] == first:
                first = out.pop()[0]
            last = segment * self.segment + self.offset + (within + n) * self.rate
            out.append((first, last, self.rate))
            start += n
        return out

    def at(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The tokens of `rows`."""
        skipped = self.segment - self.width * self.rate
        found: NDArray[np.int64] = rows * self.rate + self.offset + rows // max(1, self.width) * skipped
        return found

    def __str__(self) -> str:
        return f"{self.rate}/{self.offset} of {self.segment} of {self.tokens}"

    @staticmethod
    def parse(text: str) -> StridedSegments:
        """The class that `str` wrote."""
        return _parsed(text)


@lru_cache(maxsize=1024)
def _parsed(text: str) -> StridedSegments:
    every, segment, tokens = text.split(" of ")
    rate, offset = every.split("/")
    return StridedSegments(int(tokens), int(segment), int(rate), int(offset))
