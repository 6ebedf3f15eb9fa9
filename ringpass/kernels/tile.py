"""The arguments of a tile, and what its kernels share: grouped heads, additive masks, rows that see no key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ringpass.precision import accumulator


@dataclass(frozen=True)
class TileArgs:
    """Everything that is applied to a tile's scores, (B, H, Lq, Lk).

    `mask` (bool, True: may attend), `bias` (float) and `keep` (bool, dropout's keep mask) broadcast to their shape;
    `dropout` is the probability that a weight is dropped.  `score`: any other function of the scaled scores and of
    `parameters`, through which all of these get their gradients.
    """

    scale: float
    causal: bool = False  # row i sees keys 0..i
    mask: Tensor | None = None
    bias: Tensor | None = None
    keep: Tensor | None = None
    dropout: float = 0.0
    learned: bool = False  # the bias needs its gradient
    score: Callable[..., Tensor] | None = None
    parameters: tuple[Tensor, ...] = ()
    mirrored: bool = False  # causal with all rows in reverse: row i sees keys i and after, of as many keys as rows


Grads = tuple[Any, ...]
"""Gradients of q, k, v, the bias (None where it needs none), and each of the parameters of the score function."""


def per_query_head(kv: Tensor, q: Tensor) -> Tensor:
    """Keys or values (B, G, Lk, D) as (B, H, Lk, D): each head repeated for the query heads of `q` that read it."""
    return kv if kv.shape[1] == q.shape[1] else kv.repeat_interleave(q.shape[1] // kv.shape[1], dim=1)


def per_key_head(grad: Tensor, kv: Tensor) -> Tensor:
    """The gradient of `kv` (B, G, Lk, D) from that of its repeated heads (B, H, Lk, D), summed in the accumulator."""
    if grad.shape[1] == kv.shape[1]:
        return grad
    grouped: Tensor = grad.unflatten(1, (kv.shape[1], -1))
    return grouped.sum(2, dtype=accumulator(grad.dtype))


def additive(q: Tensor, k: Tensor, args: TileArgs) -> Tensor | None:
    """Mask, bias and mirrored triangle as one additive mask in q's dtype, 4-D, of their broadcast shape; None: none."""
    mask = args.mask
    if args.mirrored:
        causal = above_diagonal(q, k).logical_not().flip(0, 1)
        mask = causal if mask is None else mask & causal
    if mask is None:
        return None if args.bias is None else args.bias.to(q.dtype)
    bias = torch.zeros((), dtype=q.dtype, device=q.device) if args.bias is None else args.bias.to(q.dtype)
    added: Tensor = torch.where(mask, bias, -torch.inf)
    return added.view((1,) * (4 - added.ndim) + added.shape)


def sees_nothing(added: Tensor, causal: bool, q: Tensor, k: Tensor) -> Tensor:
    """Bools (.., Lq): rows whose scores are all -inf by the additive mask and, with `causal`, the triangle."""
    closed = added == -torch.inf
    if causal:
        closed = closed | above_diagonal(q, k)
    return closed.all(-1)


def above_diagonal(q: Tensor, k: Tensor) -> Tensor:
    """(Lq, Lk) bools: True where a causal tile is masked."""
    return torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)


def merge_by_lse(
    out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys from attention over each: the log-sum-exp merge of flash attention.

    `out`, `more`: (B, H, L, D); `lse`, `more_lse`: (B, H, L).  `in_place`: the result is written to `out` and `lse`.
    """
    # the weight of `more`; 0 also for a row that sees no key in either set, where the difference is NaN
    share = torch.sigmoid(more_lse - lse).masked_fill(more_lse == -torch.inf, 0.0)
    into, into_lse = (out, lse) if in_place else (None, None)
    return torch.lerp(out, more, share.unsqueeze(-1), out=into), torch.logaddexp(lse, more_lse, out=into_lse)
