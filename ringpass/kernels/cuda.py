"""Tile kernels for CUDA: torch's fused ops, adapted to this package's conventions.

    flash        aten._scaled_dot_product_flash_attention: float16, bfloat16; no mask; GQA; causal bottom-right
    cudnn        aten._scaled_dot_product_cudnn_attention: the same, causal top-left; its lse is (B, H, Lq, 1)
    efficient    aten._scaled_dot_product_efficient_attention: also float32, an additive mask, V of any width; causal
                 top-left; no GQA (K, V are repeated); its lse is padded with +inf to a multiple of 32 rows

In all of them lse is float32 and a natural logarithm, and the backward takes any out and lse for a row: it computes
exp(score - lse), which is 0 at lse = +inf.  For a row that sees no key in a masked tile, efficient returns lse 0, which
is overwritten here, from the mask.  No kernel uses dropout, so the random states of the backwards are never read.

The ops take strides, but need 16-byte alignment of pointers and strides: widths are padded with zeros, which changes no
score.  FlexAttention, for whole steps under a mask, is in `ringpass.kernels.flex`.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ringpass.kernels.tile import Grads, TileArgs, additive, per_key_head, per_query_head, sees_nothing

aten = torch.ops.aten
LSE_ROWS = 32  # efficient's lse has a multiple of this many rows
BIAS_COLUMNS = 16  # efficient's additive mask has rows that start at multiples of this many elements


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability, read once per device; (0, 0) where there is none, on ROCm too.

    Ranks choose kernels by it, so the ranks of a ring are assumed to have equal devices.
    """
    if device.type != "cuda" or torch.version.cuda is None:
        return 0, 0
    return torch.cuda.get_device_capability(device)


# --- flash ------------------------------------------------------------------------------------------------------------


def flash(q: Tensor, k: Tensor, v: Tensor, args: TileArgs) -> tuple[Tensor, Tensor]:
    """(out, lse) of one tile."""
    assert not args.causal or q.shape[2] == k.shape[2], "flash aligns its triangle bottom-right"
    width = _flash_width(q)
    out, lse, *_ = aten._scaled_dot_product_flash_attention(
        _fit(q, width), _fit(k, width), _fit(v, width), 0.0, args.causal, scale=args.scale
    )
    return _first(out, 3, v.shape[3]), lse


def flash_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, args: TileArgs) -> Grads:
    """(dq, dk, dv, None) of one tile from the rows' global `out` and `lse`."""
    width, lengths = _flash_width(q), (q.shape[2], k.shape[2])
    inputs = [_fit(x, width) for x in (grad, q, k, v, out)]
    seed, offset = q.new_empty(2, dtype=torch.uint64), q.new_empty((), dtype=torch.uint64)
    grads = aten._scaled_dot_product_flash_attention_backward(
        *inputs, _packed(lse), None, None, *lengths, 0.0, args.causal, seed, offset, scale=args.scale
    )
    dq, dk, dv = (_first(g, 3, x.shape[3]) for g, x in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv, None


def _flash_width(q: Tensor) -> int:
    """A multiple of 8; above 192 it is 256, since some devices have no backward for the widths between."""
    return 256 if q.shape[3] > 192 else _padded(q.shape[3], 8)


# --- cudnn ------------------------------------------------------------------------------------------------------------


def cudnn(q: Tensor, k: Tensor, v: Tensor, args: TileArgs) -> tuple[Tensor, Tensor]:
    """(out, lse) of one tile."""
    width = _padded(q.shape[3], 8)
    inputs = [_fit(x, width) for x in (q, k, v)]
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(*inputs, None, True, 0.0, args.causal, scale=args.scale)
    return _first(out, 3, v.shape[3]), lse.reshape(q.shape[:3])


def cudnn_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, args: TileArgs) -> Grads:
    """(dq, dk, dv, None) of one tile from the rows' global `out` and `lse`.

    The op keeps its plans by the strides of q, k and v alone, and reads the others by those of the call for which it
    made the plan.  They are given the strides that its own forward returns: those of `empty_like(q)`, lse contiguous.
    """
    width, lengths = _padded(q.shape[3], 8), (q.shape[2], k.shape[2])
    given = q, k, v
    q, k, v = (_fit(x, width) for x in given)
    inputs = (_laid_out_like(q, grad), q, k, v, _laid_out_like(q, out))
    seed = offset = q.new_empty((), dtype=torch.int64)
    rest = (None, None, None, *lengths, 0.0, args.causal)  # no bias, no packed sequences
    grads = aten._scaled_dot_product_cudnn_attention_backward(
        *inputs, _packed(lse).unsqueeze(-1), seed, offset, *rest, scale=args.scale
    )
    dq, dk, dv = (_first(g, 3, x.shape[3]) for g, x in zip(grads, given, strict=True))
    return dq, dk, dv, None


def _laid_out_like(q: Tensor, x: Tensor) -> Tensor:
    """`x`, padded with zeros to the width of `q`, with the strides of `empty_like(q)`; copied where it has others."""
    x = _fit(x, q.shape[3])
    wanted = torch.empty_like(q)
    same = all(n == 1 or a == b for n, a, b in zip(q.shape, x.stride(), wanted.stride(), strict=True))
    return x if same else wanted.copy_(x)


# --- efficient --------------------------------------------------------------------------------------------------------


def efficient(q: Tensor, k: Tensor, v: Tensor, args: TileArgs) -> tuple[Tensor, Tensor]:
    """(out, lse) of one tile."""
    added = additive(q, k, args)
    bias = None if added is None else _bias_rows(added, q, k)
    inputs = [_fit_to_unit(x) for x in (q, per_query_head(k, q), per_query_head(v, q))]
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(*inputs, bias, True, 0.0, args.causal, scale=args.scale)
    out, lse = _first(out, 3, v.shape[3]), _first(lse, 2, q.shape[2])
    return (out, lse) if added is None else _without_blind_rows(out, lse, sees_nothing(added, args.causal, q, k))


def efficient_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, args: TileArgs
) -> Grads:
    """(dq, dk, dv, None) of one tile from the rows' global `out` and `lse`."""
    added = additive(q, k, args)
    bias = None if added is None else _bias_rows(added, q, k)
    inputs = [_fit_to_unit(x) for x in (grad, q, per_query_head(k, q), per_query_head(v, q))]
    lse = F.pad(lse, (0, -lse.shape[2] % LSE_ROWS), value=torch.inf)
    seed = offset = q.new_empty((), dtype=torch.int64)
    rest = (0.0, (True, True, True, False), args.causal)  # the gradients wanted: of q, k, v, not of the bias
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        *inputs, bias, _fit_to_unit(out), _packed(lse), seed, offset, *rest, scale=args.scale
    )
    dk, dv = per_key_head(dk, k), per_key_head(dv, v)
    return _first(dq, 3, q.shape[3]), _first(dk, 3, k.shape[3]), _first(dv, 3, v.shape[3]), None


def _bias_rows(added: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The additive mask as (B, H, Lq, Lk) with aligned rows; broadcast dims cost no memory, save the keys'."""
    keys = k.shape[2]
    rows = F.pad(added.expand(*added.shape[:3], keys), (0, -keys % BIAS_COLUMNS))
    return _first(_packed(rows), 3, keys).expand(*q.shape[:3], keys)


# --- shared -----------------------------------------------------------------------------------------------------------


def _without_blind_rows(out: Tensor, lse: Tensor, blind: Tensor) -> tuple[Tensor, Tensor]:
    return out.masked_fill(blind.unsqueeze(-1), 0.0), lse.masked_fill(blind, -torch.inf)


def _padded(n: int, unit: int) -> int:
    return n + -n % unit


def _packed(x: Tensor) -> Tensor:
    return x if x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)


def _first(x: Tensor, dim: int, n: int) -> Tensor:
    return x if x.shape[dim] == n else x.narrow(dim, 0, n)


def _fit_to_unit(x: Tensor) -> Tensor:
    return _fit(x, _padded(x.shape[3], 16 // x.element_size()))


def _fit(x: Tensor, width: int) -> Tensor:
    """`x` padded with zeros to `width`, its last stride 1, each row at a multiple of 16 bytes."""
    if width > x.shape[3]:
        return _packed(F.pad(x, (0, width - x.shape[3])))
    unit = 16 // x.element_size()
    starts = [x.storage_offset(), *(stride for n, stride in zip(x.shape[:3], x.stride(), strict=False) if n > 1)]
    aligned = x.stride(3) == 1 and all(start % unit == 0 for start in starts)
    return x if aligned else x.clone(memory_format=torch.contiguous_format)
