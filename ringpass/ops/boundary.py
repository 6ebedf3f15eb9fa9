"""Operators between replicated and sharded values: shard, gather, all-to-all, reduce, replicate and their like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ringpass.comm import all_reduce, collectives
from ringpass.comm.collectives import Shard
from ringpass.layouts.hilbert import Order
from ringpass.layouts.layout import REPLICATED
from ringpass.ops.library import SHARD, Context, define, differentiate, implement, save_arguments, unchanged

define(f"shard(Tensor x, {SHARD}, str group) -> Tensor")
define(f"gather(Tensor x, {SHARD}, str group) -> Tensor")
define(f"reduce_scatter(Tensor x, {SHARD}, str group) -> Tensor")
define(
    "redistribute(Tensor x, int dim, SymInt outer, SymInt tokens, str layout, str other, int world, int rank, "
    "str group) -> Tensor"
)
define(
    "all_to_all(Tensor x, int dim, SymInt outer, SymInt tokens, str layout, int to_dim, SymInt to_outer, "
    "SymInt to_tokens, str to_layout, int world, int rank, str group) -> Tensor"
)
define("permute(Tensor x, int dim, SymInt outer, SymInt tokens, str order, bool inverse) -> Tensor")
define("reduce(Tensor x, str group) -> Tensor")
define("reduce_list(Tensor[] xs, int equal, int rank, str group) -> Tensor[]")
define("replicate(Tensor[] xs, int equal, int rank, str group) -> Tensor[]")

shard = torch.ops.ringpass.shard.default
gather = torch.ops.ringpass.gather.default
reduce_scatter = torch.ops.ringpass.reduce_scatter.default
redistribute = torch.ops.ringpass.redistribute.default
all_to_all = torch.ops.ringpass.all_to_all.default
permute = torch.ops.ringpass.permute.default
reduce = torch.ops.ringpass.reduce.default
reduce_list = torch.ops.ringpass.reduce_list.default
replicate = torch.ops.ringpass.replicate.default


def _fake_shard(x: Tensor, *args: Any) -> Tensor:
    where = Shard(*args[:-1])
    return x.new_empty(where.resized(x.shape, where.tokens, where.length))


def _fake_gather(x: Tensor, *args: Any) -> Tensor:
    where = Shard(*args[:-1])
    return x.new_empty(where.resized(x.shape, where.length, where.tokens))


implement("shard", lambda x, *args: collectives.take(x, Shard(*args[:-1])), _fake_shard)
implement("gather", lambda x, *args: collectives.gather(x, Shard(*args[:-1]), args[-1]), _fake_gather)
implement("reduce_scatter", lambda x, *args: collectives.reduce_scatter(x, Shard(*args[:-1]), args[-1]), _fake_shard)
gather_back, shard_back = gather, shard
differentiate("shard", lambda ctx, grad: (gather_back(grad, *ctx.arguments), *unchanged(ctx)), save_arguments)
differentiate("gather", lambda ctx, grad: (shard_back(grad, *ctx.arguments), *unchanged(ctx)), save_arguments)


def _redistribute(x: Tensor, *args: Any) -> Tensor:
    dim, outer, tokens, layout, other, world, rank, group = args
    return collectives.redistribute(x, Shard(dim, outer, tokens, layout, world, rank), other, group)


def _fake_redistribute(x: Tensor, *args: Any) -> Tensor:
    dim, outer, tokens, layout, other, world, rank, _ = args
    old, new = (Shard(dim, outer, tokens, name, world, rank) for name in (layout, other))
    return x.new_empty(old.resized(x.shape, old.length, new.length))


def _redistribute_backward(ctx: Context, grad: Tensor) -> tuple[Any, ...]:
    *where, layout, other, world, rank, group = ctx.arguments
    return redistribute_back(grad, *where, other, layout, world, rank, group), *unchanged(ctx)


implement("redistribute", _redistribute, _fake_redistribute)
redistribute_back = redistribute
differentiate("redistribute", _redistribute_backward, save_arguments)


def _shards(args: Sequence[Any]) -> tuple[Shard, Shard]:
    """What an all-to-all takes apart and puts together: the dim that is held in parts, the one that will be."""
    dim, outer, tokens, layout, to_dim, to_outer, to_tokens, to_layout, world, rank = args
    return Shard(dim, outer, tokens, layout, world, rank), Shard(to_dim, to_outer, to_tokens, to_layout, world, rank)


def _fake_all_to_all(x: Tensor, *args: Any) -> Tensor:
    held, wanted = _shards(args[:-1])
    return x.new_empty(wanted.resized(held.resized(x.shape, held.length, held.tokens), wanted.tokens, wanted.length))


def _all_to_all_backward(ctx: Context, grad: Tensor) -> tuple[Any, ...]:
    *where, world, rank, group = ctx.arguments
    return all_to_all_back(grad, *where[4:], *where[:4], world, rank, group), *unchanged(ctx)


implement("all_to_all", lambda x, *args: collectives.all_to_all(x, *_shards(args[:-1]), args[-1]), _fake_all_to_all)
all_to_all_back = all_to_all
differentiate("all_to_all", _all_to_all_backward, save_arguments)


def _permute(x: Tensor, dim: int, outer: Any, tokens: Any, order: str, inverse: bool) -> Tensor:
    curve = Order.parse(order)
    split = Shard(dim, outer, tokens, REPLICATED, 1, 0).split(x, tokens)
    return split.index_select(1, (curve.inverse if inverse else curve.permutation).tensor(x)).reshape(x.shape)


def _permute_backward(ctx: Context, grad: Tensor) -> tuple[Any, ...]:
    *where, inverse = ctx.arguments
    return permute(grad, *where, not inverse), *unchanged(ctx)


implement("permute", _permute, lambda x, *args: x.new_empty(x.shape))
differentiate("permute", _permute_backward, save_arguments)

implement("reduce", lambda x, group: all_reduce.reduce([x], group)[0], lambda x, group: x.new_empty(x.shape))


def silent(count: int, equal: int, rank: int) -> range:
    """The positions, of `count`, at which `rank` adds zeros: of the last `equal`, which all have, rank 0's count."""
    return range(count if rank == 0 else count - equal, count)


implement(
    "reduce_list",
    lambda xs, equal, rank, group: all_reduce.reduce(xs, group, silent(len(xs), equal, rank)),
    lambda xs, *args: [x.new_empty(x.shape) for x in xs],
)
implement("replicate", lambda xs, *args: [x.clone() for x in xs], lambda xs, *args: [torch.empty_like(x) for x in xs])


def _replicate_backward(ctx: Context, grads: list[Tensor | None]) -> tuple[Any, ...]:
    equal, rank, group = ctx.arguments
    present = [i for i, g in enumerate(grads) if g is not None]
    if not present:
        return grads, *unchanged(ctx)
    equal_present = sum(i >= len(grads) - equal for i in present)
    sums = reduce_list([grads[i] for i in present], equal_present, rank, group)
    found = dict(zip(present, sums, strict=True))
    return [found.get(i) for i in range(len(grads))], *unchanged(ctx)


differentiate("reduce", lambda ctx, grad: (grad, None), save_arguments)
differentiate("replicate", _replicate_backward, save_arguments)
