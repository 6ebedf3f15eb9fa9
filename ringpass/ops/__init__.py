"""The operators that partitioned graphs hold: the four boundary operators, ring attention, counter-based dropout.

The invariant of a partitioned graph: *a replicated value has the whole and equal cotangent on every rank; a sharded
value has the cotangent of its own tokens.*  Each operator's autograd formula keeps it:

    operator         forward                                   backward
    shard            take the own tokens                       all-gather
    gather           all-gather, in original order             take the own tokens
    redeal           from the own tokens in one layout to those in another     back
    permute          all tokens in the order of a curve        the inverse
    reduce_scatter   take the own tokens of the sum            (stands in backward graphs only)
    halo             the own tokens, run by run, with those around them   their sum, where they are held
    core             the local row of each own token, where each run has rows around it   none
    reduce           all-reduce (sum)                          identity
    replicate        identity                                  all-reduce (sum), in float32
    ring_attention   local rows of attention over all keys     ring_attention_backward
    block_means      means over blocks of all tokens           none: what is chosen by them has no gradient
    choose_blocks    the pairs of blocks that attend           none
    locate           the local row of each position, -1 where this rank does not hold it    none
    dropout          the element's own coin, scaled            the same coin

`replicate` stands once after each replicated value that needs a gradient and that sharded consumers read whole; it
takes a list, so that the gradients of many parameters are summed in one message.  `ring_attention` returns [out, lse],
its backward [dq, dk, dv, *gradients of the learned leaves].  None of the operators aliases its inputs.

Where a layout names a curve, `permute` stands before `shard` and, inverse, after `gather`, which alone know nothing of
it.  Dropout, block means and `locate` count tokens in their own order, so that no layout changes a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ringpass.comm import collectives
from ringpass.comm.collectives import Shard
from ringpass.kernels.blocks import empty_rows_first, rows_first
from ringpass.kernels.table import accumulator
from ringpass.layouts.hilbert import Order
from ringpass.layouts.layout import Layout
from ringpass.ops import counter_random as counter
from ringpass.ops import ring
from ringpass.ops.library import LIBRARY, define, differentiate, implement
from ringpass.schedule import block_selection as selection
from ringpass.schedule.block_selection import TopBlocks
from ringpass.schedule.site import Site

SHARD = "int dim, SymInt outer, SymInt tokens, str layout, int world, int rank"
SITE = (
    "Tensor? seed, str mask, str bias, float scale, float dropout, int stream, SymInt queries, SymInt keys, "
    "str query_layout, str key_layout, int tile, int rank, int world, str group, str comm, str score, str dilation, "
    "str sink, str learned, str pruning"
)
define(f"shard(Tensor x, {SHARD}, str group) -> Tensor")
define(f"gather(Tensor x, {SHARD}, str group) -> Tensor")
define(f"reduce_scatter(Tensor x, {SHARD}, str group) -> Tensor")
define(
    "redeal(Tensor x, int dim, SymInt outer, SymInt tokens, str layout, str other, int world, int rank, str group) "
    "-> Tensor"
)
define("permute(Tensor x, int dim, SymInt outer, SymInt tokens, str order, bool inverse) -> Tensor")
define(f"halo(Tensor x, {SHARD}, int most, int left, int right, str group) -> Tensor")
define(f"halo_backward(Tensor grad, {SHARD}, int each, int left, int right, str group) -> Tensor")
define(f"core(Tensor like, {SHARD}, int each, int left, int right) -> Tensor")
define("reduce(Tensor x, str group) -> Tensor")
define("reduce_list(Tensor[] xs, str group) -> Tensor[]")
define("replicate(Tensor[] xs, str group) -> Tensor[]")
define("locate(Tensor positions, SymInt tokens, str layout, int world, int rank) -> Tensor")
define(f"keep(Tensor seed, SymInt[] shape, float p, int stream, {SHARD}) -> Tensor")
define(f"dropout(Tensor x, Tensor seed, float p, int stream, {SHARD}) -> Tensor")
define(f"block_means(Tensor x, int block, {SHARD}, str group) -> Tensor")
define(
    "choose_blocks(Tensor q, Tensor k, float scale, str mask, SymInt queries, SymInt keys, int block, float? density, "
    "float? mass) -> Tensor"
)
define(f"ring_attention(Tensor q, Tensor k, Tensor v, Tensor[] leaves, {SITE}) -> Tensor[]")
define(
    "ring_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor[] leaves, "
    f"{SITE}) -> Tensor[]"
)

_ops = torch.ops.ringpass
shard, gather, reduce, replicate = _ops.shard.default, _ops.gather.default, _ops.reduce.default, _ops.replicate.default
halo, halo_backward, core = _ops.halo.default, _ops.halo_backward.default, _ops.core.default
permute, redeal = _ops.permute.default, _ops.redeal.default
reduce_list, dropout, keep = _ops.reduce_list.default, _ops.dropout.default, _ops.keep.default
reduce_scatter, locate = _ops.reduce_scatter.default, _ops.locate.default
block_means, choose_blocks = _ops.block_means.default, _ops.choose_blocks.default
ring_attention, ring_attention_backward = _ops.ring_attention.default, _ops.ring_attention_backward.default
COMMUNICATING = (
    shard, gather, redeal, halo, halo_backward, reduce, reduce_list, reduce_scatter, replicate, block_means,
    ring_attention, ring_attention_backward,
)  # fmt: skip
"""Saved for the backward, never recomputed; kept in graph order by code generation."""


# --- shard, gather ----------------------------------------------------------------------------------------------------


def _fake_shard(x: Tensor, *args: Any) -> Tensor:
    where = Shard(*args[:-1])
    return x.new_empty(where.resized(x.shape, where.tokens, where.length))


def _fake_gather(x: Tensor, *args: Any) -> Tensor:
    where = Shard(*args[:-1])
    return x.new_empty(where.resized(x.shape, where.length, where.tokens))


def _save_arguments(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.arguments = inputs[1:]


def _unchanged(ctx: Any) -> tuple[None, ...]:
    return (None,) * len(ctx.arguments)


implement("shard", lambda x, *args: collectives.take(x, Shard(*args[:-1])), _fake_shard)
implement("gather", lambda x, *args: collectives.gather(x, Shard(*args[:-1]), args[-1]), _fake_gather)
implement("reduce_scatter", lambda x, *args: collectives.reduce_scatter(x, Shard(*args[:-1]), args[-1]), _fake_shard)
_shard_backward_gather, _gather_backward_shard = gather, shard
differentiate(
    "shard", lambda ctx, grad: (_shard_backward_gather(grad, *ctx.arguments), *_unchanged(ctx)), _save_arguments
)
differentiate(
    "gather", lambda ctx, grad: (_gather_backward_shard(grad, *ctx.arguments), *_unchanged(ctx)), _save_arguments
)


def _redeal(x: Tensor, *args: Any) -> Tensor:
    dim, outer, tokens, layout, other, world, rank, group = args
    return collectives.redeal(x, Shard(dim, outer, tokens, layout, world, rank), other, group)


def _fake_redeal(x: Tensor, *args: Any) -> Tensor:
    dim, outer, tokens, layout, other, world, rank, _ = args
    old, new = (Shard(dim, outer, tokens, name, world, rank) for name in (layout, other))
    return x.new_empty(old.resized(x.shape, old.length, new.length))


def _redeal_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *where, layout, other, world, rank, group = ctx.arguments
    return _redeal_back(grad, *where, other, layout, world, rank, group), *_unchanged(ctx)


implement("redeal", _redeal, _fake_redeal)
_redeal_back = redeal
differentiate("redeal", _redeal_backward, _save_arguments)


def _permute(x: Tensor, dim: int, outer: Any, tokens: Any, order: str, inverse: bool) -> Tensor:
    curve = Order.parse(order)
    split = Shard(dim, outer, tokens, "replicated", 1, 0).split(x, tokens)
    return split.index_select(1, (curve.inverse if inverse else curve.known).tensor(x)).reshape(x.shape)


def _permute_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *where, inverse = ctx.arguments
    return permute(grad, *where, not inverse), *_unchanged(ctx)


implement("permute", _permute, lambda x, *args: x.new_empty(x.shape))
differentiate("permute", _permute_backward, _save_arguments)

# --- halo -------------------------------------------------------------------------------------------------------------


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


def _save_halo(ctx: Any, inputs: Any, output: Any) -> None:
    x, *where, _, left, right, group = inputs
    shard = Shard(*where)
    ctx.arguments = *where, x.shape[shard.dim] // shard.length, left, right, group


def _halo_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return halo_backward(grad, *ctx.arguments), *_unchanged(ctx)


implement("halo", _halo, _fake_halo)
implement("halo_backward", _halo_backward, _fake_halo_backward)
differentiate("halo", _halo_grad, _save_halo)


def _core(like: Tensor, *args: Any) -> Tensor:
    *where, each, left, right = args
    shard = Shard(*where)
    counts = [(b - a) * each for a, b in shard.placement.ranges(shard.rank, shard.tokens)]
    starts = [sum(counts[:i]) + i * (left + right) + left for i in range(len(counts))]
    rows = [torch.arange(at, at + n, device=like.device) for at, n in zip(starts, counts, strict=True)]
    return torch.cat(rows)


def _fake_core(like: Tensor, *args: Any) -> Tensor:
    *where, each, _, _ = args
    return like.new_empty(Shard(*where).length * each, dtype=torch.int64)


implement("core", _core, _fake_core)

# --- reduce, replicate ------------------------------------------------------------------------------------------------

implement("reduce", lambda x, group: collectives.reduce([x], group)[0], lambda x, group: x.new_empty(x.shape))
implement("reduce_list", collectives.reduce, lambda xs, group: [x.new_empty(x.shape) for x in xs])
implement("replicate", lambda xs, group: [x.clone() for x in xs], lambda xs, group: [torch.empty_like(x) for x in xs])


def _replicate_backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, None]:
    present = [g for g in grads if g is not None]
    if not present:
        return grads, None
    summed = iter(reduce_list(present, ctx.arguments[-1]))
    return [None if g is None else next(summed) for g in grads], None


differentiate("reduce", lambda ctx, grad: (grad, None), _save_arguments)
differentiate("replicate", _replicate_backward, _save_arguments)

# --- dropout ----------------------------------------------------------------------------------------------------------


def _dropout(x: Tensor, seed: Tensor, p: float, stream: int, *args: Any) -> Tensor:
    """Composite: autograd and code generation see the coins as one op, and the scaling as arithmetic to fuse."""
    kept = keep(seed.to(x.device), list(x.shape), p, stream, *args)
    return torch.where(kept, x * (1.0 / (1.0 - p) if p < 1.0 else 0.0), 0.0)


def _keep(seed: Tensor, shape: Sequence[int], p: float, stream: int, *args: Any) -> Tensor:
    """The coins of the local elements of a tensor whose local shape is `shape`."""
    where = Shard(*args)
    indices = [torch.arange(n, device=seed.device) for n in shape]
    if not where.placement.replicated:
        indices[where.dim] = _global_index(where, shape[where.dim], seed.device)
    return counter.keep(seed, stream, p, indices)


def _global_index(where: Shard, size: int, device: torch.device) -> Tensor:
    """Index along the full dim of each local element: outer * S * inner, S in the middle."""
    inner = size // (where.outer * where.length)
    spans = where.placement.ranges(where.rank, where.tokens)
    tokens = torch.cat([torch.arange(a, b, device=device) for a, b in spans])
    if where.placement.order:
        tokens = where.placement.order.known.tensor(tokens)[tokens]
    outer, last = torch.arange(where.outer, device=device), torch.arange(inner, device=device)
    index: Tensor = (outer.view(-1, 1, 1) * where.tokens + tokens.view(1, -1, 1)) * inner + last
    return index.reshape(-1)


implement("keep", _keep, lambda seed, shape, *args: seed.new_empty(shape, dtype=torch.bool))
LIBRARY.impl("dropout", _dropout, "CompositeImplicitAutograd")

# --- positions ------------------------------------------------------------------------------------------------------


def _locate(positions: Tensor, tokens: int, layout: str, world: int, rank: int) -> Tensor:
    where, places = Layout(layout, world), positions % tokens
    if where.order:
        places = where.order.inverse.tensor(places)[places]
    held = torch.cat([torch.arange(a, b) for a, b in where.ranges(rank, tokens)]).to(positions.device)
    rows = torch.full((tokens,), -1, dtype=torch.int64, device=positions.device)
    rows[held] = torch.arange(len(held), device=positions.device)
    return rows[places]


implement("locate", _locate, lambda positions, *args: positions.new_empty(positions.shape, dtype=torch.int64))

# --- block selection --------------------------------------------------------------------------------------------------


def _block_means(x: Tensor, block: int, *args: Any) -> Tensor:
    where, group = Shard(*args[:-1]), args[-1]
    layout = where.placement
    sums = selection.block_sums(x, block, layout.ranges(where.rank, where.tokens), where.tokens, layout.order)
    whole = where.placement.replicated or where.world == 1
    return selection.means(sums if whole else collectives.reduce([sums], group)[0], block, where.tokens)


def _fake_block_means(x: Tensor, block: int, *args: Any) -> Tensor:
    blocks = (Shard(*args[:-1]).tokens + block - 1) // block
    return x.new_empty((*x.shape[:2], blocks, x.shape[3]), dtype=accumulator(x.dtype))


def _choose_blocks(
    q: Tensor, k: Tensor, scale: float, mask: str, queries: int, keys: int, block: int, *target: Any
) -> Tensor:
    return selection.choose(q, k, scale, mask, (queries, keys), TopBlocks(block, *target))


def _fake_choose_blocks(q: Tensor, k: Tensor, *args: Any) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], k.shape[2]), dtype=torch.bool)


implement("block_means", _block_means, _fake_block_means)
implement("choose_blocks", _choose_blocks, _fake_choose_blocks)

# --- ring attention ---------------------------------------------------------------------------------------------------


def site_of(args: Any) -> tuple[Tensor | None, Site]:
    """(seed, Site) from the arguments that follow the leaves."""
    seed, *rest, learned, pruning = args
    fields = [*rest, _numbers(learned), _numbers(pruning)]
    return seed, Site(*fields)


def _numbers(text: str) -> tuple[int, ...]:
    """Numbers of leaves, written as `0,2`: autograd takes no list of ints."""
    return tuple(int(i) for i in text.split(",") if i)


def ring_attention_body(q: Tensor, k: Tensor, v: Tensor, leaves: list[Tensor], *args: Any) -> list[Tensor]:
    seed, site = site_of(args)
    out, lse = ring.forward(site.knowing(leaves), q, k, v, leaves, seed)
    return [rows_first(out), lse.contiguous()]


def ring_attention_backward_body(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, leaves: list[Tensor], *args: Any
) -> list[Tensor]:
    seed, site = site_of(args)
    dq, dk, dv, dleaves = ring.backward(site.knowing(leaves), grad, q, k, v, out, lse, leaves, seed)
    return [rows_first(dq), rows_first(dk), rows_first(dv), *dleaves]


def _fake_ring_attention(q: Tensor, k: Tensor, v: Tensor, leaves: list[Tensor], *args: Any) -> list[Tensor]:
    return [empty_rows_first(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=accumulator(q.dtype))]


def _fake_ring_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, leaves: list[Tensor], *args: Any
) -> list[Tensor]:
    return [
        *(empty_rows_first(x, x.shape[3]) for x in (q, k, v)),
        *(leaves[i].new_empty(leaves[i].shape) for i in site_of(args)[1].learned),
    ]


def _save_site(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, leaves, seed, *ctx.rest = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.seeded = seed is not None
    ctx.save_for_backward(q, k, v, out, lse, *leaves, *([seed] if ctx.seeded else []))


def _ring_attention_grad(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    grad = grads[0]
    q, k, v, out, lse, *leaves = ctx.saved_tensors
    seed = leaves.pop() if ctx.seeded else None
    unused = (None,) * (1 + len(ctx.rest))
    if grad is None:
        return None, None, None, [None] * len(leaves), *unused
    dq, dk, dv, *dlearned = ring_attention_backward(grad, q, k, v, out, lse, leaves, seed, *ctx.rest)
    dleaves: list[Tensor | None] = [None] * len(leaves)
    for i, g in zip(site_of((None, *ctx.rest))[1].learned, dlearned, strict=True):
        dleaves[i] = g
    return dq, dk, dv, dleaves, *unused


implement("ring_attention", ring_attention_body, _fake_ring_attention)
implement("ring_attention_backward", ring_attention_backward_body, _fake_ring_attention_backward)
differentiate("ring_attention", _ring_attention_grad, _save_site)
