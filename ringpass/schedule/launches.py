"""Which tiles of a step one kernel call computes.  No tensors.

    >>> from ringpass.schedule.program import CAUSAL_TILE
    >>> def tiles(start):
    ...     q, after = (start, start + 8), (start + 2, start + 10)
    ...     return Tile(q, (0, 2), FULL), Tile(q, after, CAUSAL_TILE), Tile(q, (start + 20, start + 25), FULL)
    >>> for launch in launches([*tiles(0), *tiles(8), *tiles(16)]): print(launch)
    full q0:8 k0:2, full q0:8 k20:25, 3 times: q by 8, k by 0, 8
    causal q0:8 k2:10, 3 times: q by 8, k by 8

Thin full tiles of the same query rows share a call: their keys are taken one after the other.  Calls of one shape, each
on the query rows that follow those of the one before and on keys that are as much further each time, are a *stack*: one
call of so many times the batch.  Where the scores of a tile depend on its tokens, by a mask or a bias, it is no stack.

Contract: each tile is in one call, once; the query rows of a call are one range.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ringpass.layouts.ranges import Ranges
from ringpass.masks.intervals import FULL, PARTIAL
from ringpass.schedule.tiles import THIN, TILE, Tile

STACK = 2 * TILE  # query rows of a stack, at most: what it gives should stay in a CPU's cache


@dataclass(frozen=True)
class Launch:
    """`tiles` of the same query rows, and the same on the query rows that follow, `count` times in all.

    Each time the keys of each tile are so many rows further as `shifts` says.
    """

    tiles: tuple[Tile, ...]
    count: int
    shifts: tuple[int, ...]

    @property
    def kind(self) -> str:
        return self.tiles[0].kind

    @property
    def rows(self) -> int:
        """Query rows of each time."""
        return _length(self.tiles[0].q)

    @property
    def q(self) -> tuple[int, int]:
        """All its query rows."""
        return self.tiles[0].q[0], self.tiles[0].q[0] + self.count * self.rows

    @property
    def k(self) -> tuple[Ranges, ...]:
        """For each of `tiles`, the ranges of its key rows: one where they follow each other or are always the same."""
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


def launches(tiles: Sequence[Tile], most: int = TILE, stack: int = STACK) -> list[Launch]:
    """The kernel calls for `tiles`: joined to at most `most` keys, stacked to at most `stack` query rows (0: not)."""
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


def _longer(launch: Launch, tiles: tuple[Tile, ...]) -> Launch | None:
    """`launch` and, once more, `tiles`, which have its shape; None where they are not what it goes on to."""
    if launch.kind == PARTIAL or tiles[0].q[0] != launch.q[1]:
        return None
    moved = [new.k[0] - old.k[0] for new, old in zip(tiles, launch.tiles, strict=True)]
    shifts = tuple(moved) if launch.count == 1 else launch.shifts
    if min(shifts) < 0 or max(shifts) == 0 or moved != [launch.count * shift for shift in shifts]:
        return None
    return Launch(launch.tiles, launch.count + 1, shifts)


def _of_same_rows(tiles: Sequence[Tile], most: int) -> list[tuple[Tile, ...]]:
    """A thin full tile joins others of the same rows, to `most` keys in all."""
    out: list[tuple[Tile, ...]] = []
    latest: dict[tuple[int, int], int] = {}  # of full tiles, by their rows
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
