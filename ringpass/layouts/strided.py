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

from ringpass.masks.constants import Array

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
        """Number of tokens in a complete segment."""
        return max(0, -((self.offset - self.segment) // self.rate))

    @property
    def length(self) -> int:
        """Number of tokens in all segments."""
        return self.before(self.tokens)

    @property
    def everything(self) -> bool:
        """Whether these are all tokens of the sequence."""
        return self.rate == 1

    def before(self, token: int) -> int:
        """Number of tokens of the segments that come before `token` of the sequence."""
        full, rest = divmod(token, self.segment)
        return full * self.width + min(self.width, max(0, -((self.offset - rest) // self.rate)))

    def spans(self, rows: tuple[int, int]) -> list[tuple[int, int, int]]:
        """The tokens of rows[0]:rows[1], as (start, stop, step); adjacent segments are joined if the step is kept."""
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

    def at(self, rows: Array) -> Array:
        """The token of each of `rows`, an array of row numbers."""
        skipped = self.segment - self.width * self.rate
        found: Array = rows * self.rate + self.offset + rows // max(1, self.width) * skipped
        return found

    def __str__(self) -> str:
        return f"{self.rate}/{self.offset} of {self.segment} of {self.tokens}"

    @staticmethod
    def parse(text: str) -> StridedSegments:
        """The strided segments whose `str` is `text`."""
        return _parsed(text)


@lru_cache(maxsize=1024)
def _parsed(text: str) -> StridedSegments:
    every, segment, tokens = text.split(" of ")
    rate, offset = every.split("/")
    return StridedSegments(int(tokens), int(segment), int(rate), int(offset))
