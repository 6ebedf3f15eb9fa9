"""Blocks of rows, (B, H, L, D) tensors in the memory order B, L, H, D: sliced, joined and stacked without copies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rows_first(x: Tensor) -> Tensor:
    """The same (B, H, L, D) in B, L, H, D memory order, which the reshapes of models after attention need."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def join_rows(parts: Sequence[Tensor]) -> Tensor:
    """Blocks of rows (dim 2), concatenated; those of (B, H, L, D) in the memory order of `rows_first`."""
    if parts[0].ndim == 4:
        return torch.cat([x.transpose(1, 2) for x in parts], 1).transpose(1, 2)
    return torch.cat(list(parts), 2)


def empty_rows(x: Tensor, length: int, heads: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised block of `length` rows (dim 2) like those of `x`, with its heads or `heads`, dtype or `dtype`.

    (B, H, L) or (B, H, L, D), the latter rows first.
    """
    heads = x.shape[1] if heads is None else heads
    if x.ndim == 4:
        return x.new_empty((x.shape[0], length, heads, x.shape[3]), dtype=dtype or x.dtype).transpose(1, 2)
    return x.new_empty((x.shape[0], heads, length), dtype=dtype or x.dtype)


def empty_rows_first(x: Tensor, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised (B, H, L, width) for B, H, L of `x`, rows first."""
    return x.new_empty((x.shape[0], x.shape[2], x.shape[1], width), dtype=dtype or x.dtype).transpose(1, 2)


def row_slice(x: Tensor, span: tuple[int, int]) -> Tensor:
    """Rows span[0]:span[1] (dim 2) of `x`; `x` itself if these are all."""
    return x if span == (0, x.shape[2]) else x.narrow(2, span[0], span[1] - span[0])


def stacked(x: Tensor, span: tuple[int, int], shift: int, count: int) -> Tensor:
    """Rows `span` (dim 2) of (B, H, L, ..) and the same `shift`, 2 `shift`, .. rows later, as (B count, H, n, ..).

    A view where B or `count` is 1.
    """
    start, stop = span
    if count == 1:
        return row_slice(x, span)
    if shift == 0:
        every = row_slice(x, span).unsqueeze(1).expand(-1, count, *[-1] * (x.ndim - 1))
    else:
        every = row_slice(x, (start, stop + (count - 1) * shift)).unfold(2, stop - start, shift).transpose(1, 2)
        every = every.transpose(3, 4) if x.ndim == 4 else every
    return every.flatten(0, 1)


def unstacked(x: Tensor, count: int) -> Tensor:
    """(B count, H, n, ..) as (B, H, count n, ..): the rows concatenated."""
    return x if count == 1 else x.unflatten(0, (-1, count)).transpose(1, 2).flatten(2, 3)
