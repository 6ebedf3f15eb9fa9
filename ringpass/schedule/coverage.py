"""Proves by intervals that the tiles of a site compute every pair that its mask allows, exactly once.

    >>> from ringpass.layouts.layout import Layout
    >>> from ringpass.schedule.program import Problem, tiling
    >>> problem = Problem("k <= q", 8, 8, Layout("zigzag", 2), Layout("zigzag", 2))
    >>> cover(problem, 1, tiling(problem).of(1))

Contract: `cover` returns only if the tiles of one rank have all of these properties, and raises ScheduleError for the
first that they lack.

    owned      queries lie in the ranges of the rank, keys in one range of their owner: the rank itself where each rank
               attends to its own keys alone, so that all ranks together meet all keys
    once       no two tiles share a pair; what no tile covers is empty, by the mask's intervals
    kinds      full tiles are full, triangles are one diagonal of the mask and nothing else
    thrift     no tile is provably empty; none whose mask is evaluated is larger than the problem's tile

Pairs are counted on the grid of all tile boundaries, in a difference table: a tile changes its four corners.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ringpass.errors import ScheduleError
from ringpass.masks.constants import Array
from ringpass.masks.expr import Expr
from ringpass.masks.intervals import (
    EMPTY,
    EMPTY_CODE,
    FULL,
    FULL_CODE,
    KINDS,
    PARTIAL_CODE,
    IntervalArrays,
    classify_all,
    selected,
)
from ringpass.schedule.splitting import LOWER, UPPER, triangle
from ringpass.schedule.tiles import CAUSAL_TILE, MIRRORED, TILE_KINDS, Problem, Tiling, chunks


def cover(problem: Problem, rank: int, tiles: Tiling) -> None:
    """Proves `tiles`, which must be all those of the queries of `rank`.  Raises ScheduleError if they are wrong."""
    _owned(problem, rank, tiles)
    _once(problem, rank, tiles)
    _kinds(problem, rank, tiles)


def proved(expr: Expr, q: IntervalArrays, k: IntervalArrays, kind: str) -> Array:
    """(n,) bools: whether the mask is `kind` in all of each rectangle q x k, halved until each part is classified."""
    out = np.ones(len(q[0]), dtype=bool)
    which = np.arange(len(q[0]))
    while len(which):
        found = classify_all(expr, q, k)
        settled = (found != PARTIAL_CODE) | (np.maximum(q[1] - q[0], k[1] - k[0]) <= 1)
        out[which[settled & (found != KINDS.index(kind))]] = False
        which = np.concatenate([which[~settled], which[~settled]])
        q, k = halves(selected(q, ~settled), selected(k, ~settled))
    return out


def _refuse(bad: Array, rank: int, tiles: Tiling, complaint: str) -> None:
    if bad.any():
        i = int(bad.argmax())
        q, k = ((int(x[0][i]), int(x[1][i])) for x in (tiles.q, tiles.k))
        tile = f"{TILE_KINDS[tiles.kind[i]]} queries {q[0]}:{q[1]} keys {k[0]}:{k[1]} of rank {int(tiles.src[i])}"
        raise ScheduleError(f"rank {rank}: {complaint.format(tile)}")


def _owned(problem: Problem, rank: int, tiles: Tiling) -> None:
    _refuse(tiles.dst != rank, rank, tiles, "tile {} is another rank's")
    queries = np.array(problem.query_layout.ranges(rank, problem.queries)).reshape(-1, 2)
    _refuse(~_within(tiles.q, (queries[:, 0], queries[:, 1])), rank, tiles, "tile {}: the rank lacks some queries")
    owner, *keys = _key_chunks(problem, rank if problem.key_layout.replicated else 0)
    holds = _within(tiles.k, (keys[0], keys[1]))
    _refuse(~holds, rank, tiles, "tile {}: no rank holds its keys together")
    at = np.searchsorted(keys[0], tiles.k[0], side="right") - 1
    _refuse(owner[at] != tiles.src, rank, tiles, "tile {}: its sender lacks some keys")


@lru_cache(maxsize=4)
def _key_chunks(problem: Problem, rank: int) -> tuple[Array, Array, Array]:
    """(rank, start, stop) of the ranges of keys, ascending; replicated keys are local."""
    owner, start, stop = chunks(problem.key_layout, problem.keys)
    if problem.key_layout.replicated:
        return owner[rank : rank + 1], start[:1], stop[:1]
    order = np.argsort(start)
    return owner[order], start[order], stop[order]


def _within(inner: IntervalArrays, outer: IntervalArrays) -> Array:
    """Whether each interval of `inner` (not empty) lies in one interval of `outer` (ascending)."""
    if not len(outer[0]):
        return np.zeros(len(inner[0]), dtype=bool)
    at = np.searchsorted(outer[0], inner[0], side="right") - 1
    return (at >= 0) & (inner[0] < inner[1]) & (inner[1] <= outer[1][at])


def _once(problem: Problem, rank: int, tiles: Tiling) -> None:
    queries = np.array(problem.query_layout.ranges(rank, problem.queries), dtype=np.int64).reshape(-1, 2)
    rows = np.unique(np.concatenate([queries.reshape(-1), *tiles.q]))
    keys = np.array(problem.keys_met(rank), dtype=np.int64).reshape(-1, 2)
    columns = np.unique(np.concatenate([keys.reshape(-1), *tiles.k]))
    count = np.zeros((len(rows), len(columns)), dtype=np.int32)
    corners = [np.searchsorted(rows, x) for x in tiles.q], [np.searchsorted(columns, x) for x in tiles.k]
    for i in (0, 1):
        for j in (0, 1):
            np.add.at(count, (corners[0][i], corners[1][j]), 1 if i == j else -1)
    count = count.cumsum(0).cumsum(1)[:-1, :-1]
    for row, column in np.argwhere(count > 1)[:1].tolist():
        where = (int(rows[row]), int(rows[row + 1])), (int(columns[column]), int(columns[column + 1]))
        raise ScheduleError(f"rank {rank}: two tiles cover queries {where[0]}, keys {where[1]}")
    local = _within((rows[:-1], rows[1:]), (queries[:, 0], queries[:, 1]))
    met = _within((columns[:-1], columns[1:]), (keys[:, 0], keys[:, 1]))
    row, column = np.nonzero((count == 0) & local[:, None] & met)
    q, k = (rows[row], rows[row + 1]), (columns[column], columns[column + 1])
    for i in np.nonzero(~proved(problem.expr, q, k, EMPTY))[0][:1].tolist():
        where = (int(q[0][i]), int(q[1][i])), (int(k[0][i]), int(k[1][i]))
        raise ScheduleError(
            f"rank {rank}: no tile covers queries {where[0]}, keys {where[1]}, which the mask may allow"
        )


def _kinds(problem: Problem, rank: int, tiles: Tiling) -> None:
    full, triangles = tiles.kind == FULL_CODE, np.zeros(len(tiles), dtype=bool)
    shape = triangle(problem.expr, tiles.q, tiles.k)
    for kind, expected in ((CAUSAL_TILE, LOWER), (MIRRORED, UPPER)):
        of_kind = tiles.kind == TILE_KINDS.index(kind)
        _refuse(of_kind & (shape != expected), rank, tiles, "the mask is not a triangle in tile {}")
        triangles |= of_kind
    some = tiles.take(full)
    _refuse(~proved(problem.expr, some.q, some.k, FULL), rank, some, "the mask is not full in tile {}")
    found = classify_all(problem.expr, tiles.q, tiles.k)
    _refuse(found == EMPTY_CODE, rank, tiles, "the mask is empty in tile {}")
    edge = np.maximum(tiles.q[1] - tiles.q[0], tiles.k[1] - tiles.k[0])
    evaluated = ~(full | triangles) | problem.cut_all
    _refuse(evaluated & (edge > problem.tile), rank, tiles, f"tile {{}} is larger than {problem.tile}")


def halves(q: IntervalArrays, k: IntervalArrays) -> tuple[IntervalArrays, IntervalArrays]:
    """Rectangles split in the middle of their longer side: the first halves of all, then the second ones."""
    tall = q[1] - q[0] >= k[1] - k[0]
    q_cut, k_cut = (q[0] + q[1]) // 2, (k[0] + k[1]) // 2
    rows = np.concatenate([q[0], np.where(tall, q_cut, q[0])]), np.concatenate([np.where(tall, q_cut, q[1]), q[1]])
    columns = np.concatenate([k[0], np.where(tall, k[0], k_cut)]), np.concatenate([np.where(tall, k[1], k_cut), k[1]])
    return rows, columns
