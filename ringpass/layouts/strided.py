"""Strided segments: of each segment of a sequence, every r-th token.  Plain arithmetic, no tensors.

    >>> every_other = StridedSegments(tokens=10, segment=4, rate=2, offset=1)
    >>> every_other.spans((0, every_other.length))              # tokens 1, 3, 5, 7, 9
    [(1, 11, 2)]
    >>> every_other.before(5)
    2
    >>> StridedSegments.parse(str(every_other)) == every_other
    True

Each segment of w tokens contributes every r-th token from offset o on, n = ceil((w - o) / r) tokens in all.  They are
numbered 0, 1, 2 .. as rows; row c is token r c + o + (w - n r) (c // n).
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
        """Number of its tokens in a complete segment."""
        return max(0, -((self.offset - self.segment) // self.rate))

    @property
    def length(self) -> int:
        """Number of its tokens."""
        return self.before(self.tokens)

    @property
    def everything(self) -> bool:
        """Whether it holds every token."""
        return self.rate == 1

    def before(self, token: int) -> int:
        """Number of its tokens before `token`."""
        full, rest = divmod(token, self.segment)
        return full * self.width + min(self.width, max(0, -((self.offset - rest) // self.rate)))

    def spans(self, rows: tuple[int, int]) -> list[tuple[int, int, int]]:
        """The tokens of `rows`, as (start, stop, step); consecutive segments with a constant step are joined."""
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
        """The strided segments that `str` wrote."""
        return _parsed(text)


@lru_cache(maxsize=1024)
def _parsed(text: str) -> StridedSegments:
    every, segment, tokens = text.split(" of ")
    rate, offset = every.split("/")
    return StridedSegments(int(tokens), int(segment), int(rate), int(offset))
