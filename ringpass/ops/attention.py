"""Ring attention as one operator, forward and backward.

Data that prune schedules are read by the host.  `host_copy` brings them there, once in a call for all sites that read
them; the copies follow the leaves of an attention, one for each of its site's `pruning`, and autograd keeps them for
the backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ringpass.kernels.blocks import empty_rows_first, rows_first
from ringpass.masks.constants import ConstantArray
from ringpass.ops import ring
from ringpass.ops.library import define, differentiate, implement
from ringpass.precision import accumulator
from ringpass.schedule.run_time_proof import prove_call
from ringpass.schedule.site import SITES, Site, lookup

SITE = "Tensor? seed, str site, SymInt queries, SymInt keys, int index, str group"
"""`site`: the key of what the plan decided (`ringpass.schedule.site`); the lengths in tokens, which may be symbolic.

`index`, the number of the attention in the graph, is for profilers alone: equal sites share a key.  `group`, the
site's, is the last argument, as in all ops that talk to ranks: there Inductor reads it, to estimate times.
"""
INDEX = 4  # its position in SITE
define("host_copy(Tensor x) -> Tensor")
define(f"ring_attention(Tensor q, Tensor k, Tensor v, Tensor[] leaves, {SITE}) -> Tensor[]")
define(
    "ring_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor[] leaves, "
    f"{SITE}) -> Tensor[]"
)

host_copy = torch.ops.ringpass.host_copy.default
ring_attention = torch.ops.ringpass.ring_attention.default
ring_attention_backward = torch.ops.ringpass.ring_attention_backward.default


def site_of(args: Sequence[Any]) -> tuple[Tensor | None, Site]:
    """(seed, Site) from the arguments that follow the leaves."""
    seed, key, queries, keys, *_ = args
    return seed, lookup(key, int(queries), int(keys))


def ring_attention_body(q: Tensor, k: Tensor, v: Tensor, leaves: list[Tensor], *args: Any) -> list[Tensor]:
    """[out (B, H, Lq, Dv), lse (B, H, Lq)] of the local queries; `args`: seed, site, queries, keys, index, group."""
    seed, site = site_of(args)
    site, leaves = _pruned(site, leaves)
    prove_call(args[1], SITES[args[1]], site, k.shape[1])
    out, lse = ring.forward(site, q, k, v, leaves, seed, args[INDEX])
    return [rows_first(out), lse.contiguous()]


def ring_attention_backward_body(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, leaves: list[Tensor], *args: Any
) -> list[Tensor]:
    """[dq, dk, dv, *gradients of the learned leaves] for the local tokens."""
    seed, site = site_of(args)
    site, leaves = _pruned(site, leaves)
    dq, dk, dv, dleaves = ring.backward(site, grad, q, k, v, out, lse, leaves, seed, args[INDEX])
    return [rows_first(dq), rows_first(dk), rows_first(dv), *dleaves]


def _pruned(site: Site, leaves: list[Tensor]) -> tuple[Site, list[Tensor]]:
    """(the site with the values that prune it, its leaves without their host copies)."""
    count = len(leaves) - len(site.pruning)
    return site.with_constants([_array(copy) for copy in leaves[count:]]), leaves[:count]


_ARRAYS: Any = WeakTensorKeyDictionary()  # of host copies, which live as long as their call: (version, array)


def _array(copy: Tensor) -> ConstantArray:
    """The array of a host copy, made once for all sites, forward and backward."""
    if copy not in _ARRAYS or _ARRAYS[copy][0] != copy._version:
        _ARRAYS[copy] = copy._version, ConstantArray(copy)
    found: ConstantArray = _ARRAYS[copy][1]
    return found


def _host_copy(x: Tensor) -> Tensor:
    return x.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _fake_host_copy(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device="cpu")


def _fake_ring_attention(q: Tensor, k: Tensor, v: Tensor, leaves: list[Tensor], *args: Any) -> list[Tensor]:
    return [empty_rows_first(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=accumulator(q.dtype))]


def _fake_ring_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, leaves: list[Tensor], *args: Any
) -> list[Tensor]:
    return [
        *(empty_rows_first(x, x.shape[3]) for x in (q, k, v)),
        *(leaves[i].new_empty(leaves[i].shape) for i in SITES[args[1]].learned),
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
    for i, g in zip(SITES[ctx.rest[0]].learned, dlearned, strict=True):
        dleaves[i] = g
    return dq, dk, dv, dleaves, *unused


implement("host_copy", _host_copy, _fake_host_copy)
implement("ring_attention", ring_attention_body, _fake_ring_attention)
implement("ring_attention_backward", ring_attention_backward_body, _fake_ring_attention_backward)
differentiate("ring_attention", _ring_attention_grad, _save_site)
