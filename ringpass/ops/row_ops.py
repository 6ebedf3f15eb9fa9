"""Operators on the rows of head groups: select some heads and tokens of a block, send them, combine results.

    take_rows    some rows of some heads, as a new tensor
    pack_rows    the parts of a message of K and V, flat
    add_rows     the sum of parts, each on some rows of a block
    merge_rows   the log-sum-exp merge of (out, lse) parts, each on some rows of a block

Rows are flat lists of (start, stop, step).  For several parts, heads and rows are concatenated, and `sizes` holds the
length of each part's lists: heads, rows, heads, rows, ..

The loop calls `taken`, `added` and `merged`, which emit the operators while it is traced.  While it runs, a first part
that has all rows is reused as the result, and selecting all rows of all heads returns the tensor itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from ringpass.kernels.blocks import empty_rows
from ringpass.kernels.tile import merge_by_lse
from ringpass.masks.constants import DeviceCopies
from ringpass.ops import primitives
from ringpass.ops.library import define, implement
from ringpass.schedule.messages import count

BlockIndex = tuple[Sequence[int], Sequence[int]]  # heads, rows
Index = slice | Tensor

define("take_rows(Tensor x, int[] heads, int[] rows) -> Tensor")
define("pack_rows(Tensor[] tensors, int[] heads, int[] rows, int[] sizes) -> Tensor")
define("add_rows(Tensor[] parts, int[] heads, int[] rows, int[] sizes, int groups, int length) -> Tensor")
define(
    "merge_rows(Tensor[] outs, Tensor[] lses, int[] heads, int[] rows, int[] sizes, int disjoint, int groups, "
    "int length) -> Tensor[]"
)
_ops = torch.ops.ringpass
pack_rows = _ops.pack_rows.default


def taken(x: Tensor, heads: Sequence[int], rows: Sequence[int]) -> Tensor:
    """Some rows of some heads of `x` (B, G, L, D) as (B, heads, rows, D); `x` itself if these are all."""
    found: Tensor = x if _is_all((heads, rows), *x.shape[1:3]) else _ops.take_rows(x, heads, rows)
    return found


def added(parts: Sequence[Tensor], block_indices: Sequence[BlockIndex], groups: int, length: int) -> Tensor:
    """The sum of parts as (B, groups, length, D).

    Part i has the heads and rows block_indices[i] of the result.  The parts may be overwritten.
    """
    args = list(parts), *flat(block_indices), groups, length
    total: Tensor = _sum(*args, given=True) if get_proxy_mode() is None else _ops.add_rows(*args)
    return total


def merged(
    parts: Sequence[Sequence[Tensor]], block_indices: Sequence[BlockIndex], disjoint: int, groups: int, length: int
) -> list[Tensor]:
    """The log-sum-exp merge of (out, lse) parts: [out (B, groups, length, D), lse (B, groups, length)].

    Part i has the heads and rows block_indices[i] of the result; the first `disjoint` parts have no row in common.
    The parts may be overwritten.
    """
    outs, lses = ([part[i] for part in parts] for i in range(2))
    args = outs, lses, *flat(block_indices), disjoint, groups, length
    total: list[Tensor] = _merge(*args, given=True) if get_proxy_mode() is None else _ops.merge_rows(*args)
    return total


def flat(block_indices: Sequence[BlockIndex]) -> tuple[list[int], list[int], list[int]]:
    """(heads, rows, sizes) of several parts, as the operators take them."""
    heads = [head for part, _ in block_indices for head in part]
    rows = [number for _, part in block_indices for number in part]
    return heads, rows, [len(x) for block_index in block_indices for x in block_index]


def _block_indices(heads: Sequence[int], rows: Sequence[int], sizes: Sequence[int]) -> Iterator[BlockIndex]:
    i = j = 0
    for n, m in zip(sizes[::2], sizes[1::2], strict=True):
        yield heads[i : i + n], rows[j : j + m]
        i, j = i + n, j + m


@lru_cache(maxsize=256)
def _copies(heads: tuple[int, ...]) -> DeviceCopies:
    return DeviceCopies(np.array(heads, dtype=np.int64))


def _index(block_index: BlockIndex, like: Tensor) -> tuple[Index, Index]:
    """Slices for evenly spaced heads and rows, else tensors on the device of `like`."""
    (heads, rows), device = block_index, like.device
    step = heads[1] - heads[0] if len(heads) > 1 else 1
    even = step > 0 and list(heads) == list(range(heads[0], heads[0] + step * len(heads), step))
    found: list[Index] = [slice(heads[0], heads[-1] + 1, step) if even else _copies(tuple(heads)).tensor(like)]
    if len(rows) == 3:
        return found[0], slice(*rows)
    spans = zip(rows[::3], rows[1::3], rows[2::3], strict=True)
    return found[0], torch.cat([torch.arange(0, device=device), *(torch.arange(*s, device=device) for s in spans)])


def _take(x: Tensor, block_index: BlockIndex) -> Tensor:
    heads, rows = _index(block_index, x)
    return x[:, heads][:, :, rows]


def _put(x: Tensor, block_index: BlockIndex, part: Tensor, add: bool) -> None:
    """Writes `part` to its rows of `x`, or adds it; a head may be repeated only if `add`."""
    heads, rows = _index(block_index, x)
    if isinstance(heads, slice):
        there = x[:, heads]
        if isinstance(rows, slice):
            there[:, :, rows].add_(part) if add else there[:, :, rows].copy_(part)
        elif add:
            there.index_add_(2, rows, part)
        else:
            there.index_copy_(2, rows, part)
        return
    at = torch.arange(x.shape[2], device=x.device)[rows] if isinstance(rows, slice) else rows
    x.movedim(0, 2).index_put_((heads[:, None], at[None, :]), part.movedim(0, 2), accumulate=add)


def _take_rows(x: Tensor, heads: list[int], rows: list[int]) -> Tensor:
    return _take(x, (heads, rows)).clone(memory_format=torch.contiguous_format)


def _fake_take_rows(x: Tensor, heads: list[int], rows: list[int]) -> Tensor:
    return x.new_empty((x.shape[0], len(heads), count(rows), *x.shape[3:]))


def _pack_rows(tensors: list[Tensor], *where: list[int]) -> Tensor:
    """As `primitives.pack`, where a row is a (head, token) of each of the parts in turn."""
    message, block_indices = _fake_pack_rows(tensors, *where), list(_block_indices(*where))
    views = primitives.unpack(message, [x[:, :1] for x in tensors], _rows_of(*where))
    for x, found in zip(tensors, views, strict=True):
        offset = 0
        for block_index in block_indices:
            part = _take(x, block_index).flatten(1, 2)
            found[:, 0, offset : offset + part.shape[1]].copy_(part)
            offset += part.shape[1]
    return message


def _fake_pack_rows(tensors: list[Tensor], *where: list[int]) -> Tensor:
    return tensors[0].new_empty(_rows_of(*where) * sum(x.shape[0] * x.shape[3] for x in tensors))


def _rows_of(*where: list[int]) -> int:
    """How many (head, token) pairs the parts have."""
    return sum(len(heads) * count(rows) for heads, rows in _block_indices(*where))


def _is_all(block_index: BlockIndex, groups: int, length: int) -> bool:
    heads, rows = block_index
    return list(heads) == list(range(groups)) and list(rows) == [0, length, 1]


def _sum(
    parts: list[Tensor], heads: list[int], rows: list[int], sizes: list[int], groups: int, length: int,
    given: bool = False,
) -> Tensor:  # fmt: skip
    """Rows first; `given`: reuses the memory of the first part if it has all rows."""
    block_indices = list(_block_indices(heads, rows, sizes))
    complete = _is_all(block_indices[0], groups, length)
    out = _first(parts[0], given) if complete else empty_rows(parts[0], length, groups).zero_()
    for block_index, part in zip(block_indices[complete:], parts[complete:], strict=True):
        _put(out, block_index, part, add=True)
    return out


def _fake_add_rows(parts: list[Tensor], *args: Any) -> Tensor:
    groups, length = args[-2:]
    return empty_rows(parts[0], length, groups)


def _merge(
    outs: list[Tensor], lses: list[Tensor], heads: list[int], rows: list[int], sizes: list[int], disjoint: int,
    groups: int, length: int, given: bool = False,
) -> list[Tensor]:  # fmt: skip
    """Rows first; `given`: reuses the memory of the first part if it has all rows."""
    block_indices = list(_block_indices(heads, rows, sizes))
    complete = _is_all(block_indices[0], groups, length)
    if complete:
        out, lse = _first(outs[0], given), _first(lses[0], given)
    else:
        out = empty_rows(outs[0], length, groups).zero_()
        lse = empty_rows(lses[0], length, groups).fill_(-torch.inf)
    for i in range(int(complete), len(block_indices)):
        if i < disjoint:
            _put(out, block_indices[i], outs[i], add=False)
            _put(lse, block_indices[i], lses[i], add=False)
            continue
        old, old_lse = _take(out, block_indices[i]), _take(lse, block_indices[i])
        merge_by_lse(old, old_lse, outs[i], lses[i], in_place=True)
        if not all(isinstance(index, slice) for index in _index(block_indices[i], out)):
            _put(out, block_indices[i], old, add=False)
            _put(lse, block_indices[i], old_lse, add=False)
    return [out, lse]


def _fake_merge_rows(outs: list[Tensor], lses: list[Tensor], *args: Any) -> list[Tensor]:
    groups, length = args[-2:]
    return [empty_rows(x[0], length, groups) for x in (outs, lses)]


def _first(part: Tensor, given: bool) -> Tensor:
    return part if given else empty_rows(part, part.shape[2]).copy_(part)


implement("take_rows", _take_rows, _fake_take_rows)
implement("pack_rows", _pack_rows, _fake_pack_rows)
implement("add_rows", _sum, _fake_add_rows)
implement("merge_rows", _merge, _fake_merge_rows)
