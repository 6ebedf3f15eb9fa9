"""Attention of one tile in ATen arithmetic: every device and dtype, any bias, dropout or score function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ringpass.kernels.tile import Grads, TileArgs, above_diagonal, per_key_head, per_query_head
from ringpass.precision import accumulator

# --- plain ------------------------------------------------------------------------------------------------------------


def _products(q: Tensor, k: Tensor, args: TileArgs) -> Tensor:
    """Scaled scores (B, H, Lq, Lk) in the accumulator's dtype."""
    dtype = accumulator(q.dtype)
    return torch.matmul(q.to(dtype), per_query_head(k, q).to(dtype).transpose(-1, -2)) * args.scale


def _scored(scores: Tensor, *parameters: Tensor, args: TileArgs) -> Tensor:
    """The scores through the tile's score function, in their own shape and dtype."""
    return scores if args.score is None else args.score(scores, *parameters).to(scores.dtype).expand(scores.shape)


def _pulled(products: Tensor, args: TileArgs) -> tuple[Tensor, Callable[[Tensor], Sequence[Tensor]]]:
    """The scores, and how their gradient becomes that of the products and of the parameters."""
    if args.score is None:
        return products, lambda grad: (grad,)
    scores, pull, *_ = torch.func.vjp(partial(_scored, args=args), products, *args.parameters)
    return scores, pull


def _masked(scores: Tensor, q: Tensor, k: Tensor, args: TileArgs) -> Tensor:
    """The scores biased and masked."""
    if args.bias is not None:
        scores = scores + args.bias.to(scores.dtype)
    if args.causal:
        scores = scores.masked_fill(above_diagonal(q, k), -torch.inf)
    return scores if args.mask is None else scores.masked_fill(args.mask.logical_not(), -torch.inf)


def plain(q: Tensor, k: Tensor, v: Tensor, args: TileArgs) -> tuple[Tensor, Tensor]:
    """(out, lse) of one tile, in the accumulator's dtype."""
    scores = _masked(_scored(_products(q, k, args), *args.parameters, args=args), q, k, args)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1))
    return torch.matmul(_dropped(weights, args), per_query_head(v, q).to(weights.dtype)), lse


def plain_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, args: TileArgs) -> Grads:
    """(dq, dk, dv, dbias, *dparameters) of one tile from the rows' global `out` and `lse`."""
    scores, pull = _pulled(_products(q, k, args), args)
    weights = torch.exp(_masked(scores, q, k, args) - lse.unsqueeze(-1))
    grad = grad.to(weights.dtype)
    dv = torch.matmul(_dropped(weights, args).transpose(-1, -2), grad)
    dweights = _dropped(torch.matmul(grad, per_query_head(v, q).to(grad.dtype).transpose(-1, -2)), args)
    delta = (grad * out.to(grad.dtype)).sum(-1, keepdim=True)
    dscores = weights * (dweights - delta)
    dbias = dscores.sum_to_size(args.bias.shape) if args.learned and args.bias is not None else None
    dscores, *dparameters = pull(dscores)
    if args.score is not None:
        dscores = torch.where(weights == 0, 0.0, dscores)  # a slope without bound, where nothing is seen
    dq = torch.matmul(dscores, per_query_head(k, q).to(grad.dtype)) * args.scale
    dk = torch.matmul(dscores.transpose(-1, -2), q.to(grad.dtype)) * args.scale
    return dq, per_key_head(dk, k), per_key_head(dv, v), dbias, *dparameters


def _dropped(x: Tensor, args: TileArgs) -> Tensor:
    scale = 1.0 / (1.0 - args.dropout) if args.dropout < 1.0 else 0.0
    return x if args.keep is None else torch.where(args.keep, x * scale, 0.0)
