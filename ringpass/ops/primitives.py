"""The steps of ring attention as operators: each is a node of the unrolled graph, or a call in the rolled loop.

    pack                rows of K and V (dK and dV) as one message, token by token
    exchange            start sending one message and receiving another; returns the buffer that will hold what arrives
    start_gather        start gathering one message of each rank, equally long; returns the buffer for all of them
    wait                either buffer, complete
    attention_tile      (out, lse) of one tile;  attention_tile_backward: (dq, dk, dv, dbias if learned)
    scored_tile         the same with a score function;  scored_tile_backward: (dq, dk, dv, gradients of its leaves)
    merge               the log-sum-exp merge of two (out, lse) of the same rows
    mask_tile           a mask or bias expression on one tile;  mask_tile_backward: gradients of its learned leaves
    keep_tile           the keep mask of attention dropout on one tile

`merge` is arithmetic: the compiler gets its body, to fuse.  `pack` is a call, so that all messages are ranges of one
buffer.  `after` lists tensors that an op does not read and that must exist before it runs, in whatever order code
generation prefers: buffers in flight while a tile is computed, so that their exchanges start before it, and the latest
merges, which bounds what waits to be merged.  `label` names what the op does in the trace of a profiler.

Spans are flat lists of token ranges, [start, stop, start, stop, ..], in curve positions if the layout names a
curve.  The keep mask of dropout depends on the original index of a token, not on its position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ringpass.comm import collectives, p2p
from ringpass.kernels import table as kernels
from ringpass.kernels.blocks import empty_rows_first, rows_first
from ringpass.kernels.tile import TileArgs, merge_by_lse
from ringpass.masks.evaluate import evaluate
from ringpass.masks.expr import parse
from ringpass.ops import counter_random
from ringpass.ops.library import LABELLED, UNLABELLED, define, implement, storage_key
from ringpass.precision import accumulator
from ringpass.profiling import profiled

TILE = "Tensor? mask, Tensor? bias, Tensor? keep, float scale, bool causal, bool mirrored, float dropout, bool learned"
SCORE = "str score, Tensor[] leaves, int[] parameters, int[] queries, int[] keys"
SPANS = "int batch, int heads, int[] queries, int[] keys"
define("pack(Tensor[] tensors, int[] rows) -> Tensor")
define(
    "exchange(Tensor[] sent, int numel, ScalarType dtype, int dst, int src, int tag, Tensor[] after, str label, "
    "str group) -> Tensor[]"
)
define("start_gather(Tensor[] sent, int world, Tensor[] after, str label, str group) -> Tensor[]")
define("wait(Tensor(a) received) -> Tensor(a)")
for _kind, _about in (("attention", TILE), ("scored", f"{TILE}, {SCORE}")):
    define(f"{_kind}_tile(Tensor q, Tensor k, Tensor v, {_about}, Tensor[] after, {LABELLED}) -> Tensor[]")
    define(
        f"{_kind}_tile_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_about}, "
        f"Tensor[] after, {LABELLED}) -> Tensor[]"
    )
define("merge(Tensor out, Tensor lse, Tensor more, Tensor more_lse) -> Tensor[]")
define(f"mask_tile(Tensor[] leaves, Tensor like, str expr, {SPANS}) -> Tensor")
define(f"mask_tile_backward(Tensor grad, Tensor[] leaves, int[] learned, Tensor like, str expr, {SPANS}) -> Tensor[]")
define(f"keep_tile(Tensor seed, int stream, float p, str dropout_indices, {SPANS}) -> Tensor")

_ops = torch.ops.ringpass
exchange, start_gather, wait = _ops.exchange.default, _ops.start_gather.default, _ops.wait.default
attention_tile, attention_tile_backward = _ops.attention_tile.default, _ops.attention_tile_backward.default
scored_tile, scored_tile_backward = _ops.scored_tile.default, _ops.scored_tile_backward.default
mask_tile, mask_tile_backward, keep_tile = (
    _ops.mask_tile.default,
    _ops.mask_tile_backward.default,
    _ops.keep_tile.default,
)

pack, merge = _ops.pack.default, _ops.merge.default

NOBODY = -1

# --- exchanges --------------------------------------------------------------------------------------------------------


def _pack(tensors: list[Tensor], rows: list[int]) -> Tensor:
    """The given rows (start, stop, start, stop, ..) of each (B, G, L, D) tensor as a message: 1-D.

    A message goes token by token, each with what all tensors hold of it, so that a range of its tokens is one range of
    its elements.
    """
    message = _fake_pack(tensors, rows)
    tokens = sum(rows[1::2]) - sum(rows[::2])
    for x, part in zip(tensors, unpack(message, tensors, tokens), strict=True):
        offset = 0
        for start, stop in zip(rows[::2], rows[1::2], strict=True):
            part[:, :, offset : offset + stop - start].copy_(x[:, :, start:stop])
            offset += stop - start
    return message


def unpack(message: Tensor, like: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """The (B, G, tokens, D) views of a message: one tensor for each of `like`, with its B, G and D."""
    sizes = [token_size([x]) for x in like]
    parts = message.view(tokens, sum(sizes)).split(sizes, 1)
    return [
        part.unflatten(1, (x.shape[0], x.shape[1], x.shape[3])).permute(1, 2, 0, 3)
        for part, x in zip(parts, like, strict=True)
    ]


def token_size(tensors: Sequence[Tensor]) -> int:
    """The elements that a message has of one token of (B, G, L, D) tensors."""
    return sum(x.shape[0] * x.shape[1] * x.shape[3] for x in tensors)


def _fake_pack(tensors: list[Tensor], rows: list[int]) -> Tensor:
    return tensors[0].new_empty(token_size(tensors) * (sum(rows[1::2]) - sum(rows[::2])))


implement("pack", _pack, _fake_pack)


def _exchange(
    sent: list[Tensor],
    numel: int,
    dtype: torch.dtype,
    dst: int,
    src: int,
    tag: int,
    after: list[Tensor],
    label: str,
    group: str,
) -> list[Tensor]:
    (message,) = sent
    with profiled(label):
        received = message.new_empty(numel, dtype=dtype)
        peers = (None if rank == NOBODY else rank for rank in (dst, src))
        to, of = peers
        return [started(p2p.start(message, to, received, of, tag, group, label), label)]


def started(pending: p2p.PendingExchange, label: str) -> Tensor:
    """What `wait` will end, by its buffer, which is returned; `label` names it in traces of profilers and in errors."""
    pending.label = label
    p2p.IN_FLIGHT[storage_key(pending.received)] = pending
    return pending.received


def _start_gather(sent: list[Tensor], world: int, after: list[Tensor], label: str, group: str) -> list[Tensor]:
    (message,) = sent
    with profiled(label):
        pending = collectives.start_gather(message, message.new_empty(world * message.numel()), group)
        return [started(pending, label)]


def _wait(received: Tensor) -> Tensor:
    pending = p2p.IN_FLIGHT.pop(storage_key(received))
    with profiled(f"wait for {pending.label}"):
        pending.wait()
    return received


implement("exchange", _exchange, lambda sent, numel, dtype, *args: [sent[0].new_empty(numel, dtype=dtype)])
implement("start_gather", _start_gather, lambda sent, world, *args: [sent[0].new_empty(world * sent[0].numel())])
implement("wait", _wait, lambda received: received)

# --- tiles ------------------------------------------------------------------------------------------------------------


def _args(q: Tensor, args: Sequence[Any]) -> TileArgs:
    allowed, bias, keep, scale, causal, mirrored, drop, learned, *scoring, _ = args
    plain = TileArgs(scale, causal, allowed, bias, keep, drop, learned, mirrored=mirrored)
    if not scoring:
        return plain
    score, leaves, parameters, queries, keys = scoring
    where = indices(q.device, q.shape[0], q.shape[1], queries, keys)

    def scored(scores: Tensor, *changed: Tensor) -> Tensor:
        return evaluate(parse(score), {**where, "score": scores}, _swapped(leaves, parameters, changed))

    dtype = accumulator(q.dtype)
    return replace(plain, score=scored, parameters=tuple(leaves[i].to(dtype) for i in parameters))


def _swapped(leaves: Sequence[Tensor], numbers: Sequence[int], changed: Sequence[Tensor]) -> list[Tensor]:
    """`leaves` with leaf numbers[i] replaced by changed[i]."""
    given = dict(zip(numbers, changed, strict=True))
    return [given.get(i, leaf) for i, leaf in enumerate(leaves)]


def _attention_tile(q: Tensor, k: Tensor, v: Tensor, *args: Any, label: str = UNLABELLED) -> list[Tensor]:
    with profiled(label):
        out, lse = kernels.forward(q, k, v, _args(q, args))
        return [rows_first(out.to(q.dtype)), lse.contiguous()]


def _fake_attention_tile(q: Tensor, k: Tensor, v: Tensor, *args: object, **_: object) -> list[Tensor]:
    return [empty_rows_first(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=accumulator(q.dtype))]


def _attention_tile_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *args: Any, label: str = UNLABELLED
) -> list[Tensor]:
    with profiled(label):
        dq, dk, dv, *others = kernels.backward(grad, q, k, v, out, lse, _args(q, args))
        dtype = kernels.gradient_dtype(q, k, v, _args(q, args))
        return [*(rows_first(g.to(dtype)) for g in (dq, dk, dv)), *(g.contiguous() for g in others if g is not None)]


def _fake_attention_tile_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *args: Any, **_: object
) -> list[Tensor]:
    tile = _args(q, args)
    dtype = kernels.gradient_dtype(q, k, v, tile)
    learned = [tile.bias] if tile.learned and tile.bias is not None else []
    others = [x.new_empty(x.shape, dtype=accumulator(q.dtype)) for x in (*learned, *tile.parameters)]
    return [*(empty_rows_first(x, x.shape[3], dtype) for x in (q, k, v)), *others]


for _kind in ("attention", "scored"):
    implement(f"{_kind}_tile", _attention_tile, _fake_attention_tile)
    implement(f"{_kind}_tile_backward", _attention_tile_backward, _fake_attention_tile_backward)


def merge_body(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> list[Tensor]:
    """[out, lse]: the log-sum-exp merge, (B, H, L, D) and (B, H, L), in the dtype of `out`, rows first."""
    merged, total = merge_by_lse(out, lse, more.to(out.dtype), more_lse)
    return [rows_first(merged), total]


def _fake_merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> list[Tensor]:
    return [empty_rows_first(out, out.shape[3]), lse.new_empty(lse.shape)]


implement("merge", merge_body, _fake_merge)


def _mask_tile(leaves: list[Tensor], like: Tensor, expr: str, *spans: Any) -> Tensor:
    return evaluate(parse(expr), indices(like.device, *spans), leaves).contiguous()


def _mask_tile_backward(
    grad: Tensor, leaves: list[Tensor], learned: list[int], like: Tensor, expr: str, *spans: Any
) -> list[Tensor]:
    where = indices(like.device, *spans)

    def value(*changed: Tensor) -> Tensor:
        return evaluate(parse(expr), where, _swapped(leaves, learned, changed)).to(grad.dtype)

    _, pull, *_ = torch.func.vjp(value, *(leaves[i].to(grad.dtype) for i in learned))
    return [g.contiguous() for g in pull(grad)]


def _fake_mask_tile_backward(grad: Tensor, leaves: list[Tensor], learned: list[int], *args: object) -> list[Tensor]:
    return [leaves[i].new_empty(leaves[i].shape, dtype=grad.dtype) for i in learned]


def _keep_tile(seed: Tensor, stream: int, p: float, dropout_indices: str, *spans: Any) -> Tensor:
    """`dropout_indices`: expressions of head, query and key that seed the keep mask."""
    where = indices(seed.device, *spans)
    at = [evaluate(parse(text), where, []).reshape(-1) for text in dropout_indices.split("; ")]
    return counter_random.keep(seed, stream, p, [where["b"].reshape(-1), *at])


def _fake_keep_tile(
    seed: Tensor,
    stream: int,
    p: float,
    dropout_indices: str,
    batch: int,
    heads: int,
    queries: list[int],
    keys: list[int],
) -> Tensor:
    lengths = [sum(stop - start for start, stop in zip(s[::2], s[1::2], strict=True)) for s in (queries, keys)]
    return seed.new_empty((batch, heads, *lengths), dtype=torch.bool)


implement("mask_tile", _mask_tile, _mask_tile)
implement("mask_tile_backward", _mask_tile_backward, _fake_mask_tile_backward)
implement("keep_tile", _keep_tile, _fake_keep_tile)


def indices(
    device: torch.device, batch: int, heads: int, queries: Sequence[int], keys: Sequence[int]
) -> dict[str, Tensor]:
    """The indices b, h, q, k of a tile, each of its own dim of (B, H, Lq, Lk), as `evaluate` takes them.

    `queries`, `keys`: token ranges, [start, stop, start, stop, ..].
    """
    return {
        "b": torch.arange(batch, device=device).view(-1, 1, 1, 1),
        "h": torch.arange(heads, device=device).view(1, -1, 1, 1),
        "q": _tokens(queries, device).view(1, 1, -1, 1),
        "k": _tokens(keys, device).view(1, 1, 1, -1),
    }


def _tokens(span: Sequence[int], device: torch.device) -> Tensor:
    parts = [torch.arange(a, b, device=device) for a, b in zip(span[::2], span[1::2], strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
