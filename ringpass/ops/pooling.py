"""The operators before and after an attention with a Ulysses degree: `pool_tokens` and `return_tokens`.

    q, = pool_tokens([q], heads, tokens, layout, world, rank, label, group)      (B, H, L, D) -> (B, h, n, D)
    out, = return_tokens([out], H, heads, tokens, layout, ..)             (B, h, n, D) -> (B, H, L, D)

Each is the other's gradient.  `heads`: those that each member of a group of neighbouring ranks gets
(`ringpass.layouts.pooling`); what is in one list travels in one message.  `lower` writes each as its steps:

    pack_heads          the message: all parcels, in the order of ranks
    start_all_to_all    its all-to-all, under way when this returns; `primitives.wait` ends it
    unpack_heads        the tensors, from what arrived
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ringpass.comm import pooling
from ringpass.comm.pooling import Contents, contents
from ringpass.layouts.pooling import Pooling
from ringpass.ops import primitives
from ringpass.ops.library import define, differentiate, implement
from ringpass.precision import accumulator
from ringpass.profiling import profiled

HOW = "str heads, SymInt tokens, str layout, int world, int rank"
define(f"pool_tokens(Tensor[] xs, {HOW}, str label, str group) -> Tensor[]")
define(f"return_tokens(Tensor[] xs, int all_heads, {HOW}, str label, str group) -> Tensor[]")
define(f"pack_heads(Tensor[] xs, bool back, {HOW}) -> Tensor")
define("start_all_to_all(Tensor[] sent, int[] received_sizes, int[] sent_sizes, str label, str group) -> Tensor[]")
define(
    f"unpack_heads(Tensor message, int batch, int[] widths, ScalarType dtype, int all_heads, bool back, {HOW}) "
    "-> Tensor[]"
)

_ops = torch.ops.ringpass
pool_tokens, return_tokens = _ops.pool_tokens.default, _ops.return_tokens.default
pack_heads, unpack_heads = _ops.pack_heads.default, _ops.unpack_heads.default
start_all_to_all = _ops.start_all_to_all.default
BUFFERED = primitives.exchange, primitives.start_gather, start_all_to_all
"""What is under way when it returns, in a buffer that `primitives.wait` completes."""


planned = lru_cache(maxsize=256)(Pooling)
"""A `Pooling` of known lengths: what it sends is worked out once, not in each call."""


def _pool_tokens(xs: list[Tensor], *args: Any) -> list[Tensor]:
    *about, label, group = args
    how = planned(*about)
    if how.layout.replicated:
        return [x.contiguous() for x in pooling.take_heads(xs, how)]
    return _unpack(_exchanged(xs, how, label, group, back=False), contents(xs), xs[0].dtype, 0, how, back=False)


def _return_tokens(xs: list[Tensor], all_heads: int, *args: Any) -> list[Tensor]:
    *about, label, group = args
    how = planned(*about)
    if how.layout.replicated:
        return pooling.place_heads(xs, how, all_heads)
    return _unpack(_exchanged(xs, how, label, group, back=True), contents(xs), xs[0].dtype, all_heads, how, back=True)


def _exchanged(xs: list[Tensor], how: Pooling, label: str, group: str, back: bool) -> Tensor:
    """What arrives of all ranks, complete."""
    with profiled(f"{label} all-to-all{' back' if back else ''}"):
        pending = pooling.start(pooling.pack(xs, how, back), *contents(xs).splits(how, back), group)
        pending.wait()
        return pending.received


def _unpack(
    message: Tensor, holds: Contents, dtype: torch.dtype, all_heads: int, how: Pooling, back: bool
) -> list[Tensor]:
    found = pooling.unpack_back(message, holds, how, all_heads, dtype) if back else pooling.unpack(message, holds, how)
    return [x.clone() if x.untyped_storage()._cdata == message.untyped_storage()._cdata else x for x in found]


def _fake_pool_tokens(xs: list[Tensor], *args: Any) -> list[Tensor]:
    how = Pooling(*args[:-2])
    return [x.new_empty((x.shape[0], len(how.own), how.pooled_length, x.shape[3])) for x in xs]


def _fake_return_tokens(xs: list[Tensor], all_heads: int, *args: Any) -> list[Tensor]:
    how = Pooling(*args[:-2])
    return [x.new_empty((x.shape[0], all_heads, how.length(how.rank), x.shape[3])) for x in xs]


implement("pool_tokens", _pool_tokens, _fake_pool_tokens)
implement("return_tokens", _return_tokens, _fake_return_tokens)

# --- the steps --------------------------------------------------------------------------------------------------------


def message_dtype(dtype: torch.dtype, how: Pooling, back: bool) -> torch.dtype:
    """The dtype in which heads travel: wider where gradients of one head come from several."""
    return accumulator(dtype) if back and how.adds else dtype


def _fake_pack_heads(xs: list[Tensor], back: bool, *args: Any) -> Tensor:
    how = Pooling(*args)
    return xs[0].new_empty(sum(contents(xs).splits(how, back)[1]), dtype=message_dtype(xs[0].dtype, how, back))


def _start_all_to_all(
    sent: list[Tensor], received_sizes: list[int], sent_sizes: list[int], label: str, group: str
) -> list[Tensor]:
    (message,) = sent
    with profiled(label):
        return [primitives.started(pooling.start(message, received_sizes, sent_sizes, group), label)]


def _unpack_heads(
    message: Tensor, batch: int, widths: list[int], dtype: torch.dtype, all_heads: int, back: bool, *args: Any
) -> list[Tensor]:
    return _unpack(message, Contents(batch, tuple(widths)), dtype, all_heads, planned(*args), back)


def _fake_unpack_heads(
    message: Tensor, batch: int, widths: list[int], dtype: torch.dtype, all_heads: int, back: bool, *args: Any
) -> list[Tensor]:
    how = Pooling(*args)
    heads, tokens = (all_heads, how.length(how.rank)) if back else (len(how.own), how.pooled_length)
    return [message.new_empty((batch, heads, tokens, width), dtype=dtype) for width in widths]


implement("pack_heads", lambda xs, back, *args: pooling.pack(xs, planned(*args), back), _fake_pack_heads)
implement(
    "start_all_to_all",
    _start_all_to_all,
    lambda sent, received_sizes, *args: [sent[0].new_empty(sum(received_sizes))],
)
implement("unpack_heads", _unpack_heads, _fake_unpack_heads)

# --- gradients --------------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: Any, output: Sequence[Tensor]) -> None:
    xs, *ctx.arguments = inputs
    ctx.all_heads = xs[0].shape[1]


def _pool_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    return return_tokens(grads, ctx.all_heads, *ctx.arguments), *[None] * len(ctx.arguments)


def _return_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    return pool_tokens(grads, *ctx.arguments[1:]), *[None] * len(ctx.arguments)


differentiate("pool_tokens", _pool_backward, _save)
differentiate("return_tokens", _return_backward, _save)
