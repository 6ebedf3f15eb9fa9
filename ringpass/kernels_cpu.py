"""torch's CPU flash op as a tile kernel.

Its lse is a natural logarithm.  It reads garbage where a last stride is not 1, and says lse = 0 for a row that sees
nothing.  GQA, a causal flag (top-left) and an additive mask with broadcast strides are its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ringpass.tile import Grads, TileArgs, additive, sees_nothing

aten = torch.ops.aten


def flash_cpu(q: Tensor, k: Tensor, v: Tensor, args: TileArgs) -> tuple[Tensor, Tensor]:
    """(out, lse) of one tile."""
    added = additive(q, args)
    q, k, v = _dense(q, k, v)
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, args.causal, attn_mask=_expanded(added, q, k), scale=args.scale
    )
    if added is not None:
        lse = lse.masked_fill(sees_nothing(added, args.causal, q, k), -torch.inf)
    return out, lse


def flash_cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, args: TileArgs
) -> Grads:
    """(dq, dk, dv, None) of one tile from the rows' global `out` and `lse`."""
    mask = _expanded(additive(q, args), q, k)
    grad, q, k, v, out = _dense(grad, q, k, v, out)
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse.contiguous(), 0.0, args.causal, attn_mask=mask, scale=args.scale
    )
    return dq, dk, dv, None


def _dense(*tensors: Tensor) -> list[Tensor]:
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _expanded(added: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The op takes a 2-D or 4-D mask of full length."""
    return None if added is None else added.expand(added.shape[0], added.shape[1], q.shape[2], k.shape[2])
