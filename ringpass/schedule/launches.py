"""Groups the tiles of a step into kernel launches.  No tensors.

    >>> from ringpass.schedule.program import CAUSAL_TILE
    >>> def tiles(start):
    ...     q, after = (start, start + 8), (start + 2, start + 10)
    ...     return Tile(q, (0, 2), FULL), Tile(q, after, CAUSAL_TILE), Tile(q, (start + 20, start + 25), FULL)
    >>> for launch in launches([*tiles(0), *tiles(8), *tiles(16)]): print(launch)
    full q0:8 k0:2, full q0:8 k20:25, 3 times: q by 8, k by 0, 8
    causal q0:8 k2:10, 3 times: q by 8, k by 8

Thin full tiles of the same query rows share a launch: their keys are concatenated.  Launches of one shape whose query
rows follow each other, and whose keys advance by a constant number of rows, form a *stack*: one launch with a larger
batch.  Tiles whose scores depend on their tokens, by a mask or a bias, are not stacked.  Where a kernel takes a mask as
a function, all tiles of a step are one launch, a *whole step*.

Contract: each tile is in one launch, once; the query rows of a launch are one range.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ringpass.layouts.ranges import Ranges
from ringpass.masks.intervals import FULL, PARTIAL
from ringpass.schedule.program import Step
from ringpass.schedule.tiles import THIN, TILE, Tile

STACK = 2 * TILE  # most query rows of a stack: its results should stay in the cache of a CPU


@dataclass(frozen=True)
class Launch:
    """`tiles` of the same query rows, repeated on the query rows that follow, `count` times in all.

    On repeat i, the keys of tile t start shifts[t] * i rows later.  `whole`: its one tile is a whole step, under the
    site's mask.
    """

    tiles: tuple[Tile, ...]
    count: int
    shifts: tuple[int, ...]
    whole: bool = False

    @property
    def kind(self) -> str:
        """The kind of all its tiles, one of TILE_KINDS."""
        return self.tiles[0].kind

    @property
    def rows(self) -> int:
        """Number of query rows of one repeat."""
        return _length(self.tiles[0].q)

    @property
    def q(self) -> tuple[int, int]:
        """The query rows of all repeats."""
        return self.tiles[0].q[0], self.tiles[0].q[0] + self.count * self.rows

    @property
    def k(self) -> tuple[Ranges, ...]:
        """For each of `tiles`, the ranges of its key rows: a single one if repeats are adjacent or equal."""
        return tuple(self._ranges(tile.k, shift) for tile, shift in zip(self.tiles, self.shifts, strict=True))

    def _ranges(self, k: tuple[int, int], shift: int) -> Ranges:
        if shift in (0, _length(k)):
            return ((k[0], k[1] + (self.count - 1) * shift),)
        return tuple(_moved(k, i * shift) for i in range(self.count))

    def __str__(self) -> str:
        text = ", ".join(map(str, self.tiles))
        if self.count == 1:
            return text
        return f"{text}, {self.count} times: q by {self.rows}, k by {', '.join(map(str, self.shifts))}"


def whole_step(step: Step) -> Launch:
    """All tiles of a step as one: from the first to the last of their rows, over all keys of its block.

    The tiles leave out only what the mask does, so that under the mask both are the same pairs.

    >>> print(whole_step(Step(1, ((32, 48),), (Tile((8, 16), (0, 4), FULL), Tile((16, 24), (4, 12), PARTIAL)))))
    partial q8:24 k0:16
    """
    rows = min(tile.q[0] for tile in step.tiles), max(tile.q[1] for tile in step.tiles)
    keys = sum(stop - start for start, stop in step.tokens)
    return Launch((Tile(rows, (0, keys), PARTIAL),), 1, (0,), whole=True)


def launches(tiles: Sequence[Tile], most: int = TILE, stack: int = STACK) -> list[Launch]:
    """The launches for the `tiles` of a step: joined up to `most` keys, stacked up to `stack` query rows (0: never)."""
    out: list[Launch] = []
    latest: dict[tuple[str, int, tuple[int, ...]], int] = {}
    for some in _of_same_rows(tiles, most):
        shape = some[0].kind, _length(some[0].q), tuple(_length(tile.k) for tile in some)
        at = latest.get(shape, -1)
        longer = _longer(out[at], some) if at >= 0 else None
        if longer is not None and _length(longer.q) <= stack:
            out[at] = longer
        else:
            latest[shape] = len(out)
            out.append(Launch(some, 1, (0,) * len(some)))
    return out


def gives_each_key_once(some: Sequence[Launch]) -> bool:
    """Whether no key row is in two launches, or twice in one: each then gets its gradient from one kernel call."""
    repeated = any(launch.count > 1 and 0 in launch.shifts for launch in some)
    spans = sorted(span for launch in some for ranges in launch.k for span in ranges)
    return not repeated and all(before[1] <= after[0] for before, after in pairwise(spans))


def _longer(launch: Launch, tiles: tuple[Tile, ...]) -> Launch | None:
    """`launch` with one more repeat, `tiles`, which have its shape; None if they do not continue it."""
    if launch.kind == PARTIAL or tiles[0].q[0] != launch.q[1]:
        return None
    moved = [new.k[0] - old.k[0] for new, old in zip(tiles, launch.tiles, strict=True)]
    shifts = tuple(moved) if launch.count == 1 else launch.shifts
    if min(shifts) < 0 or max(shifts) == 0 or moved != [launch.count * shift for shift in shifts]:
        return None
    return Launch(launch.tiles, launch.count + 1, shifts)


def _of_same_rows(tiles: Sequence[Tile], most: int) -> list[tuple[Tile, ...]]:
    """Thin full tiles of the same rows joined, up to `most` keys in all."""
    out: list[tuple[Tile, ...]] = []
    latest: dict[tuple[int, int], int] = {}  # of full tiles, by rows
    for tile in tiles:
        at = latest.get(tile.q, -1) if tile.kind == FULL else -1
        widths = [sum(_length(t.k) for t in some) for some in ((tile,), out[at] if at >= 0 else ())]
        if at < 0 or min(widths) >= THIN or sum(widths) > most:
            at = len(out)
            out.append(())
        if tile.kind == FULL:
            latest[tile.q] = at
        out[at] = (*out[at], tile)
    return out


def _length(span: tuple[int, int]) -> int:
    return span[1] - span[0]


def _moved(span: tuple[int, int], by: int) -> tuple[int, int]:
    return span[0] + by, span[1] + by
