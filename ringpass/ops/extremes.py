"""Operators that find the largest or smallest elements of a sharded value, over the tokens of all ranks.

    extremum(x, dims, ..)          amax or amin; equals share the gradient evenly, over all ranks
    first_extremum(x, SHARD, ..)   (values, indices) along one dim, the sequence's: the first of equals, which gets the
                                   gradient, and its index in the full dim of `size` elements

A rank without tokens has no part in either.  A NaN is larger and smaller than all numbers, as in torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ringpass.comm import collectives
from ringpass.comm.collectives import Shard
from ringpass.layouts.layout import CONTIGUOUS
from ringpass.ops.boundary import permute, reduce, shard
from ringpass.ops.library import SHARD, define, differentiate, implement

define("extremum(Tensor x, int[] dims, bool keepdim, bool largest, int world, int rank, str group) -> Tensor")
define(f"first_extremum(Tensor x, bool largest, {SHARD}, SymInt size, str group) -> Tensor[]")

extremum = torch.ops.ringpass.extremum.default
first_extremum = torch.ops.ringpass.first_extremum.default


def _bound(dtype: torch.dtype, largest: bool) -> float | int | bool:
    """What is no larger (smaller) than any number of `dtype`."""
    if dtype == torch.bool:
        return not largest
    if dtype.is_floating_point:
        return float("-inf") if largest else float("inf")
    return torch.iinfo(dtype).min if largest else torch.iinfo(dtype).max


def _best(x: Tensor, dims: list[int], keepdim: bool, largest: bool) -> Tensor:
    """The largest (smallest) elements along `dims`; the bound where there are none."""
    if not x.numel():
        shape = [1 if d in dims else n for d, n in enumerate(x.shape) if keepdim or d not in dims]
        return x.new_full(shape, _bound(x.dtype, largest))
    return x.amax(dims, keepdim) if largest else x.amin(dims, keepdim)


def _of_ranks(x: Tensor, world: int, rank: int, group: str) -> Tensor:
    """The `x` of each rank, as (world, ..)."""
    return collectives.gather(x.unsqueeze(0), Shard(0, 1, world, CONTIGUOUS, world, rank), group)


# --- amax, amin -------------------------------------------------------------------------------------------------------


def _extremum(x: Tensor, dims: list[int], keepdim: bool, largest: bool, world: int, rank: int, group: str) -> Tensor:
    return _best(_of_ranks(_best(x, dims, keepdim, largest), world, rank, group), [0], False, largest)


def _fake_extremum(x: Tensor, dims: list[int], keepdim: bool, *args: object) -> Tensor:
    return x.new_empty([1 if d in dims else n for d, n in enumerate(x.shape) if keepdim or d not in dims])


def _save_extremum(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.dims, ctx.keepdim, *_, ctx.group = inputs
    ctx.save_for_backward(x, output)


def _extremum_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, best = ctx.saved_tensors
    for d in () if ctx.keepdim else sorted(ctx.dims):
        grad, best = grad.unsqueeze(d), best.unsqueeze(d)
    equal = x == best
    count = reduce(equal.sum(ctx.dims, True), ctx.group)
    return equal * (grad / count), *(None,) * 6


implement("extremum", _extremum, _fake_extremum)
differentiate("extremum", _extremum_backward, _save_extremum)


# --- max, argmax ------------------------------------------------------------------------------------------------------


def _first_extremum(x: Tensor, largest: bool, *args: Any) -> list[Tensor]:
    *shard_args, size, group = args
    where = Shard(*shard_args)
    best, first = _first_local(x, where, _full_indices(x, where, size, group), largest)
    values, firsts = (_of_ranks(t, where.world, where.rank, group) for t in (best, first))
    value = _best(values, [0], False, largest)
    return [value, _best(torch.where(_found(values, value), firsts, _NEVER), [0], False, False)]


def _first_local(x: Tensor, where: Shard, full: Tensor, largest: bool) -> tuple[Tensor, Tensor]:
    """The largest (smallest) local elements, and the first indices, of those in `full`, at which they are."""
    if x.numel() and where.layout.order is None:  # local elements are in their original order
        best, row = x.max(where.dim) if largest else x.min(where.dim)
        return best, full[row]
    best = _best(x, [where.dim], True, largest)
    along = full.view(-1, *[1] * (x.ndim - where.dim - 1))
    return best.squeeze(where.dim), _best(torch.where(_found(x, best), along, _NEVER), [where.dim], False, False)


_NEVER = torch.iinfo(torch.int64).max
"""The index of what is not there."""


def _found(x: Tensor, best: Tensor) -> Tensor:
    """Where `x` is what was looked for: a NaN, if there is one."""
    return (x == best) | (x != x)


def _full_indices(like: Tensor, where: Shard, size: Any, group: str) -> Tensor:
    """The index of each local element in its full dim, which has `size` elements."""
    indices, row = torch.arange(size, device=like.device), (0, where.outer, where.tokens)
    if where.layout.order is not None:
        indices = permute(indices, *row, str(where.layout.order), False)
    local: Tensor = shard(indices, *row, where.layout_name, where.world, where.rank, group)
    return local


def _fake_first_extremum(x: Tensor, largest: bool, dim: int, *args: object) -> list[Tensor]:
    shape = [*x.shape[:dim], *x.shape[dim + 1 :]]
    return [x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)]


def _save_first_extremum(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, _, *shard_args, ctx.size, ctx.group = inputs
    ctx.where, ctx.ndim = Shard(*shard_args), x.ndim
    ctx.save_for_backward(output[1])


def _first_extremum_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    (indices,), where, grad = ctx.saved_tensors, ctx.where, grads[0]
    full = _full_indices(grad, where, ctx.size, ctx.group).view(-1, *[1] * (ctx.ndim - where.dim - 1))
    return (full == indices.unsqueeze(where.dim)) * grad.unsqueeze(where.dim), *(None,) * 9


implement("first_extremum", _first_extremum, _fake_first_extremum)
differentiate("first_extremum", _first_extremum_backward, _save_first_extremum)
