"""Dense attention on one device: defines what the options of the backend compute, for tests and for users.

    >>> q = k = v = torch.randn(1, 2, 10, 4, dtype=torch.float64)
    >>> out = attention(q, k, v, Dilation((4, 8), (1, 2)), causal=True)

Memory and time grow with the number of (query, key) pairs, S x S.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ringpass.schedule.dilation import Dilation


def multiplicity(dilation: Dilation, heads: int, tokens: int) -> Tensor:
    """m (H, S, S), int64: how many patterns of `dilation` hold a query and a key (arXiv 2307.02486, eqs. 3-10).

    `heads`: number of query heads H; `tokens`: length of the sequence S.
    """
    p = torch.arange(tokens)
    m = torch.zeros(heads, tokens, tokens, dtype=torch.int64)
    for w, r in zip(dilation.segment_lengths, dilation.dilation_rates, strict=True):
        w = min(w, tokens)
        for head in range(heads):
            covered = (p % w) % r == dilation.offset(head, heads, r)
            same = p[:, None] // w == p[None, :] // w
            m[head] += covered[:, None] & covered[None, :] & same
    return m


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dilation: Dilation | None = None,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """O[p] = sum_c m exp(s_pc) v_c / sum_c m exp(s_pc), s the scaled, biased scores: (B, H, S, Dv), differentiable.

    q is (B, H, S, D), k (B, G, S, D), v (B, G, S, Dv), H a multiple of G; `mask` (bool, True: may attend) and `bias`
    broadcast to (B, H, S, S); `scale` None: 1 / sqrt(D).  A query that sees no key gives 0.  `order` (S,): the patterns
    of `dilation` count positions along it, and `order[i]` is the token at position i; causal, mask and bias count
    tokens.
    """
    heads, tokens = q.shape[1:3]
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (1.0 / math.sqrt(q.shape[3]) if scale is None else scale)
    scores = scores if bias is None else scores + bias
    m = torch.ones(heads, tokens, k.shape[2], dtype=torch.int64)
    if dilation is not None:
        m = multiplicity(dilation, heads, tokens)
        if order is not None:
            position = order.argsort()
            m = m[:, position][:, :, position]
    allowed = (m > 0).expand(scores.shape)
    allowed = allowed & torch.ones(tokens, k.shape[2], dtype=torch.bool).tril() if causal else allowed
    allowed = allowed if mask is None else allowed & mask
    scores = (scores + m.to(scores.dtype).log()).masked_fill(~allowed, -torch.inf)
    weights = torch.softmax(scores, dim=-1).masked_fill(~allowed.any(-1, keepdim=True), 0.0)
    return weights @ v
