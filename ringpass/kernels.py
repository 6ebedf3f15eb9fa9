"""Attention of one tile: the table of kernels, forward and backward.

    >>> import torch
    >>> q = k = v = torch.randn(1, 2, 5, 8, dtype=torch.float64)
    >>> out, lse = forward(q, k, v, TileArgs(scale=0.5, causal=True))
    >>> dq, dk, dv, _ = backward(torch.ones_like(out), q, k, v, out, lse, TileArgs(scale=0.5, causal=True))

q is (B, H, Lq, D), k (B, G, Lk, D), v (B, G, Lk, Dv), H a multiple of G: query head j reads key/value head j // (H/G).
`lse` is the log of the sum of exponentials of each row's scores, (B, H, Lq), float32 (float64 for float64 inputs).
A row that sees no key gives out 0 and lse -inf.  The backward takes the *global* out and lse of the rows, so that the
gradients of several tiles add up to the exact gradient; a row with lse +inf there gives no gradient.

Kernels: `flash_cpu`, torch's CPU flash op; `plain`, ATen arithmetic for what no fused kernel does (dropout, a bias that
needs its gradient, V width != Q width, other devices).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

aten = torch.ops.aten


@dataclass(frozen=True)
class TileArgs:
    """What a tile's scores go through.

    `mask` (bool), `bias` (float) broadcast to (B, H, Lq, Lk); `keep`: dropout's.
    """

    scale: float
    causal: bool = False
    mask: Tensor | None = None
    bias: Tensor | None = None
    keep: Tensor | None = None
    dropout: float = 0.0
    learned: bool = False  # the bias needs its gradient


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which partial results are merged."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def choose(device: torch.device, dtype: torch.dtype, head_widths: tuple[int, int], args: TileArgs) -> str:
    """Name of the kernel for a tile.  Depends on nothing but its arguments, so all ranks choose alike."""
    fused = args.keep is None and not args.learned and head_widths[0] == head_widths[1]
    if device.type == "cpu" and fused and dtype in (torch.float64, torch.float32, torch.bfloat16):
        return "flash_cpu"
    return "plain"


def forward(q: Tensor, k: Tensor, v: Tensor, args: TileArgs) -> tuple[Tensor, Tensor]:
    """(out, lse) of one tile; out in q's dtype for fused kernels, in the accumulator's for `plain`."""
    kernel = choose(q.device, q.dtype, (q.shape[-1], v.shape[-1]), args)
    return _flash_cpu(q, k, v, args) if kernel == "flash_cpu" else _plain(q, k, v, args)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, args: TileArgs
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, dbias) of one tile, given the rows' global `out` and `lse`; dbias has the bias's own shape."""
    if choose(q.device, q.dtype, (q.shape[-1], v.shape[-1]), args) == "flash_cpu":
        return *_flash_cpu_backward(grad, q, k, v, out, lse, args), None
    return _plain_backward(grad, q, k, v, out, lse, args)


# --- flash_cpu --------------------------------------------------------------------------------------------------------


def _dense(*tensors: Tensor) -> list[Tensor]:
    """The CPU op reads garbage where the last stride is not 1."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _additive(q: Tensor, args: TileArgs) -> Tensor | None:
    """Mask and bias as the one additive mask that the op takes: 2-D or 4-D, q's dtype."""
    if args.mask is None:
        return None if args.bias is None else args.bias.to(q.dtype)
    bias = torch.zeros((), dtype=q.dtype, device=q.device) if args.bias is None else args.bias.to(q.dtype)
    return torch.where(args.mask, bias, -torch.inf)


def _flash_cpu(q: Tensor, k: Tensor, v: Tensor, args: TileArgs) -> tuple[Tensor, Tensor]:
    additive = _additive(q, args)
    q, k, v = _dense(q, k, v)
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, args.causal, attn_mask=_expanded(additive, q, k), scale=args.scale
    )
    if additive is not None:  # the op says lse = 0 for a row that sees nothing
        lse = lse.masked_fill(_sees_nothing(additive, args.causal, q, k), -torch.inf)
    return out, lse


def _sees_nothing(additive: Tensor, causal: bool, q: Tensor, k: Tensor) -> Tensor:
    """Rows whose every score is -inf; with a causal flag, every score that the triangle leaves."""
    closed = additive == -torch.inf
    if causal:
        closed = closed | torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    return closed.all(-1)


def _flash_cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, args: TileArgs
) -> tuple[Tensor, Tensor, Tensor]:
    mask = _expanded(_additive(q, args), q, k)
    grad, q, k, v, out = _dense(grad, q, k, v, out)
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse.contiguous(), 0.0, args.causal, attn_mask=mask, scale=args.scale
    )
    return dq, dk, dv


def _expanded(additive: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    if additive is None:
        return None
    return additive.expand(additive.shape[0], additive.shape[1], q.shape[2], k.shape[2])


# --- plain ------------------------------------------------------------------------------------------------------------


def _scores(q: Tensor, k: Tensor, args: TileArgs) -> Tensor:
    """Scaled, biased and masked scores (B, H, Lq, Lk) in the accumulator's dtype."""
    dtype = accumulator(q.dtype)
    scores = torch.matmul(q.to(dtype), _per_query_head(k, q).to(dtype).transpose(-1, -2)) * args.scale
    if args.bias is not None:
        scores = scores + args.bias.to(dtype)
    if args.causal:
        above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(above, -torch.inf)
    return scores if args.mask is None else scores.masked_fill(~args.mask, -torch.inf)


def _plain(q: Tensor, k: Tensor, v: Tensor, args: TileArgs) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k, args)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - finite(lse).unsqueeze(-1))
    return torch.matmul(_dropped(weights, args), _per_query_head(v, q).to(weights.dtype)), lse


def _plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, args: TileArgs
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    weights = torch.exp(_scores(q, k, args) - lse.unsqueeze(-1))
    grad = grad.to(weights.dtype)
    dv = torch.matmul(_dropped(weights, args).transpose(-1, -2), grad)
    dweights = _dropped(torch.matmul(grad, _per_query_head(v, q).to(grad.dtype).transpose(-1, -2)), args)
    delta = (grad * out.to(grad.dtype)).sum(-1, keepdim=True)
    dscores = weights * (dweights - delta)
    dq = torch.matmul(dscores, _per_query_head(k, q).to(grad.dtype)) * args.scale
    dk = torch.matmul(dscores.transpose(-1, -2), q.to(grad.dtype)) * args.scale
    dbias = dscores.sum_to_size(args.bias.shape) if args.learned and args.bias is not None else None
    return dq, _per_key_head(dk, k), _per_key_head(dv, v), dbias


def _dropped(x: Tensor, args: TileArgs) -> Tensor:
    scale = 1.0 / (1.0 - args.dropout) if args.dropout < 1.0 else 0.0
    return x if args.keep is None else torch.where(args.keep, x * scale, 0.0)


def _per_query_head(kv: Tensor, q: Tensor) -> Tensor:
    return kv if kv.shape[1] == q.shape[1] else kv.repeat_interleave(q.shape[1] // kv.shape[1], dim=1)


def _per_key_head(grad: Tensor, kv: Tensor) -> Tensor:
    return grad if grad.shape[1] == kv.shape[1] else grad.unflatten(1, (kv.shape[1], -1)).sum(2)


# --- merging ----------------------------------------------------------------------------------------------------------


def finite(lse: Tensor) -> Tensor:
    """`lse` with -inf replaced by 0, so that differences with it are never NaN."""
    return torch.where(lse == -torch.inf, 0.0, lse)


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys from attention over each: the log-sum-exp merge of flash attention."""
    base = finite(torch.maximum(lse, more_lse))
    weight, more_weight = torch.exp(lse - base), torch.exp(more_lse - base)
    total = weight + more_weight
    share = torch.where(total == 0, 0.0, 1.0 / total)  # a row that no key of either set serves stays 0
    merged = out * (weight * share).unsqueeze(-1) + more * (more_weight * share).unsqueeze(-1)
    return merged, base + torch.log(total)
