"""Operators that give each rank the tokens next to its ranges of local tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ringpass.comm import collectives
from ringpass.comm.collectives import Shard
from ringpass.ops.library import SHARD, Context, define, differentiate, implement, unchanged

define(f"halo(Tensor x, {SHARD}, int most, int left, int right, str group) -> Tensor")
define(f"halo_backward(Tensor grad, {SHARD}, int each, int left, int right, str group) -> Tensor")
define(f"interior_rows(Tensor like, {SHARD}, int each, int left, int right) -> Tensor")

halo = torch.ops.ringpass.halo.default
halo_backward = torch.ops.ringpass.halo_backward.default
interior_rows = torch.ops.ringpass.interior_rows.default


def _halo(x: Tensor, *args: Any) -> Tensor:
    *where, most, left, right, group = args
    return collectives.halo(x, Shard(*where), most, left, right, group)


def _fake_halo(x: Tensor, *args: Any) -> Tensor:
    *where, most, left, right, _ = args
    dim = where[0]
    return x.new_empty((*x.shape[:dim], x.shape[dim] + most * (left + right), *x.shape[dim + 1 :]))


def _halo_backward(grad: Tensor, *args: Any) -> Tensor:
    *where, each, left, right, group = args
    return collectives.halo_back(grad, Shard(*where), each, left, right, group)


def _fake_halo_backward(grad: Tensor, *args: Any) -> Tensor:
    *where, each, _, _, _ = args
    shard = Shard(*where)
    return grad.new_empty((*grad.shape[: shard.dim], shard.length * each, *grad.shape[shard.dim + 1 :]))


def _save_halo(ctx: Context, inputs: tuple[Any, ...], output: object) -> None:
    x, *where, _, left, right, group = inputs
    shard = Shard(*where)
    ctx.arguments = *where, x.shape[shard.dim] // shard.length, left, right, group


def _halo_grad(ctx: Context, grad: Tensor) -> tuple[Any, ...]:
    return halo_backward(grad, *ctx.arguments), *unchanged(ctx)


implement("halo", _halo, _fake_halo)
implement("halo_backward", _halo_backward, _fake_halo_backward)
differentiate("halo", _halo_grad, _save_halo)


def _interior_rows(like: Tensor, *args: Any) -> Tensor:
    *where, each, left, right = args
    shard = Shard(*where)
    counts = [(b - a) * each for a, b in shard.layout.ranges(shard.rank, shard.tokens)]
    starts = [sum(counts[:i]) + i * (left + right) + left for i in range(len(counts))]
    rows = [torch.arange(at, at + n, device=like.device) for at, n in zip(starts, counts, strict=True)]
    return torch.cat(rows)


def _fake_interior_rows(like: Tensor, *args: Any) -> Tensor:
    *where, each, _, _ = args
    return like.new_empty(Shard(*where).length * each, dtype=torch.int64)


implement("interior_rows", _interior_rows, _fake_interior_rows)
