"""Rows of lanes as operators: taking some heads and tokens out of a block, sending them, and putting results back.

    take_rows    some rows of some heads, as a tensor of their own
    pack_rows    parcels of K and V as one message
    add_rows     the sum of parts, each with its own rows, as a block
    merge_rows   the log-sum-exp merge of (out, lse) parts, each with its own rows, as a block

Rows are flat lists of (start, stop, step).  Of several parts, all heads and rows are one list each, and `sizes` says
how many numbers belong to each part: heads, rows, heads, rows, ..
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ringpass import kernels
from ringpass.bundle import count
from ringpass.library import define, implement, rows_first

Place = tuple[Sequence[int], Sequence[int]]  # heads, rows
Index = slice | Tensor

define("take_rows(Tensor x, int[] heads, int[] rows) -> Tensor")
define("pack_rows(Tensor[] tensors, int[] heads, int[] rows, int[] sizes) -> Tensor")
define("add_rows(Tensor[] parts, int[] heads, int[] rows, int[] sizes, int groups, int length) -> Tensor")
define(
    "merge_rows(Tensor[] outs, Tensor[] lses, int[] heads, int[] rows, int[] sizes, int disjoint, int groups, "
    "int length) -> Tensor[]"
)
_ops = torch.ops.ringpass
take_rows, pack_rows = _ops.take_rows.default, _ops.pack_rows.default
add_rows, merge_rows = _ops.add_rows.default, _ops.merge_rows.default


def flat(places: Sequence[Place]) -> tuple[list[int], list[int], list[int]]:
    """(heads, rows, sizes) of several parts, as the operators take them."""
    heads = [head for part, _ in places for head in part]
    rows = [number for _, part in places for number in part]
    return heads, rows, [len(x) for place in places for x in place]


def _places(heads: Sequence[int], rows: Sequence[int], sizes: Sequence[int]) -> Iterator[Place]:
    i = j = 0
    for n, m in zip(sizes[::2], sizes[1::2], strict=True):
        yield heads[i : i + n], rows[j : j + m]
        i, j = i + n, j + m


def _index(place: Place, device: torch.device) -> tuple[Index, Index]:
    """Slices where heads and rows are evenly spaced, else tensors."""
    heads, rows = place
    step = heads[1] - heads[0] if len(heads) > 1 else 1
    even = step > 0 and list(heads) == list(range(heads[0], heads[0] + step * len(heads), step))
    found: list[Index] = [slice(heads[0], heads[-1] + 1, step) if even else torch.tensor(heads, device=device)]
    if len(rows) == 3:
        return found[0], slice(*rows)
    spans = zip(rows[::3], rows[1::3], rows[2::3], strict=True)
    return found[0], torch.cat([torch.arange(0, device=device), *(torch.arange(*s, device=device) for s in spans)])


def _take(x: Tensor, place: Place) -> Tensor:
    heads, rows = _index(place, x.device)
    return x[:, heads][:, :, rows]


def _put(x: Tensor, place: Place, part: Tensor, add: bool) -> None:
    """Writes `part` to its rows of `x`, or adds it; only what is added may name a head twice."""
    heads, rows = _index(place, x.device)
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
    return torch.cat([_message(x, list(_places(*where))) for x in tensors])


def _message(x: Tensor, places: Sequence[Place]) -> Tensor:
    return torch.cat([_take(x, place).flatten(1, 2) for place in places], dim=1).reshape(-1)


def _fake_pack_rows(tensors: list[Tensor], *where: list[int]) -> Tensor:
    numbers = sum(len(heads) * count(rows) for heads, rows in _places(*where))
    return tensors[0].new_empty(numbers * sum(x.shape[0] * x.shape[3] for x in tensors))


def _add_rows(
    parts: list[Tensor], heads: list[int], rows: list[int], sizes: list[int], groups: int, length: int
) -> Tensor:
    out = parts[0].new_zeros((parts[0].shape[0], groups, length, parts[0].shape[3]))
    for place, part in zip(_places(heads, rows, sizes), parts, strict=True):
        _put(out, place, part, add=True)
    return out


def _fake_add_rows(parts: list[Tensor], *args: Any) -> Tensor:
    return parts[0].new_empty((parts[0].shape[0], *args[-2:], parts[0].shape[3]))


def _merge_rows(
    outs: list[Tensor], lses: list[Tensor], heads: list[int], rows: list[int], sizes: list[int], disjoint: int,
    groups: int, length: int,
) -> list[Tensor]:  # fmt: skip
    """The first `disjoint` parts share no row."""
    batch, width = outs[0].shape[0], outs[0].shape[3]
    out = outs[0].new_zeros((batch, length, groups, width)).transpose(1, 2)
    lse = lses[0].new_full((batch, groups, length), -torch.inf)
    for i, place in enumerate(_places(heads, rows, sizes)):
        more, more_lse = outs[i], lses[i]
        if i >= disjoint:
            more, more_lse = kernels.merge(_take(out, place), _take(lse, place), more, more_lse)
        _put(out, place, more, add=False)
        _put(lse, place, more_lse, add=False)
    return [rows_first(out), lse]


def _fake_merge_rows(outs: list[Tensor], lses: list[Tensor], *args: Any) -> list[Tensor]:
    groups, length = args[-2:]
    out = outs[0].new_empty((outs[0].shape[0], length, groups, outs[0].shape[3])).transpose(1, 2)
    return [out, lses[0].new_empty((outs[0].shape[0], groups, length))]


implement("take_rows", _take_rows, _fake_take_rows)
implement("pack_rows", _pack_rows, _fake_pack_rows)
implement("add_rows", _add_rows, _fake_add_rows)
implement("merge_rows", _merge_rows, _fake_merge_rows)
