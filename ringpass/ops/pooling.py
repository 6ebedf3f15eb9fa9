"""The operators before and after an attention with a Ulysses degree: `pool_tokens` and `return_tokens`.

    q, = pool_tokens([q], heads, tokens, layout, world, rank, group)      (B, H, L, D) -> (B, h, n, D)
    out, = return_tokens([out], H, heads, tokens, layout, ..)             (B, h, n, D) -> (B, H, L, D)

Each is the other's gradient.  `heads`: those that each member of a group of neighbouring ranks gets
(`ringpass.layouts.pooling`); what is in one list travels in one message.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ringpass.comm import pooling
from ringpass.layouts.pooling import Pooling
from ringpass.ops.library import define, differentiate, implement

HOW = "str heads, SymInt tokens, str layout, int world, int rank, str group"
define(f"pool_tokens(Tensor[] xs, {HOW}) -> Tensor[]")
define(f"return_tokens(Tensor[] xs, int all_heads, {HOW}) -> Tensor[]")

pool_tokens = torch.ops.ringpass.pool_tokens.default
return_tokens = torch.ops.ringpass.return_tokens.default


def _pool_tokens(xs: list[Tensor], *args: Any) -> list[Tensor]:
    return [x.contiguous() for x in pooling.pool(xs, Pooling(*args[:-1]), args[-1])]


def _return_tokens(xs: list[Tensor], all_heads: int, *args: Any) -> list[Tensor]:
    return [x.contiguous() for x in pooling.unpool(xs, Pooling(*args[:-1]), all_heads, args[-1])]


def _fake_pool_tokens(xs: list[Tensor], *args: Any) -> list[Tensor]:
    how = Pooling(*args[:-1])
    return [x.new_empty((x.shape[0], len(how.own), _after(x, how), x.shape[3])) for x in xs]


def _after(x: Tensor, how: Pooling) -> Any:
    return x.shape[2] if how.layout.replicated else how.pooled_length


def _fake_return_tokens(xs: list[Tensor], all_heads: int, *args: Any) -> list[Tensor]:
    how = Pooling(*args[:-1])
    return [x.new_empty((x.shape[0], all_heads, _before(x, how), x.shape[3])) for x in xs]


def _before(x: Tensor, how: Pooling) -> Any:
    return x.shape[2] if how.layout.replicated else how.length(how.rank)


implement("pool_tokens", _pool_tokens, _fake_pool_tokens)
implement("return_tokens", _return_tokens, _fake_return_tokens)


def _save(ctx: Any, inputs: Any, output: Sequence[Tensor]) -> None:
    xs, *ctx.arguments = inputs
    ctx.all_heads = xs[0].shape[1]


def _pool_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    return return_tokens(grads, ctx.all_heads, *ctx.arguments), *[None] * len(ctx.arguments)


def _return_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    return pool_tokens(grads, *ctx.arguments[1:]), *[None] * len(ctx.arguments)


differentiate("pool_tokens", _pool_backward, _save)
differentiate("return_tokens", _return_backward, _save)
