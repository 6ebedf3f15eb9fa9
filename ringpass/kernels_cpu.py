"""torch's CPU flash op as a tile kernel.

Its lse is a natural logarithm.  It reads garbage where a last stride is not 1, and says lse = 0 for a row that sees
nothing.  GQA, a causal flag (top-left) and an additive mask with broadcast strides are its own; a mirrored
triangle is a mask to it.

Under the causal flag it skips keys in blocks of 512, so a short triangle costs as much as its square.  It is therefore
computed as two triangles of half the rows and the square between them, down to triangles of `SMALLEST` rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from ringpass.library import empty_rows_first
from ringpass.tile import Grads, TileArgs, accumulator, additive, merge, sees_nothing

aten = torch.ops.aten
SMALLEST, LARGEST = 128, 1024  # rows: of the triangles that are left, of a causal one that is divided


def flash_cpu(q: Tensor, k: Tensor, v: Tensor, args: TileArgs) -> tuple[Tensor, Tensor]:
    """(out, lse) of one tile."""
    if not _divided(q, k, args):
        return _flash(q, k, v, args)
    out = empty_rows_first(q, v.shape[3], accumulator(q.dtype))
    lse = out.new_empty(q.shape[:3])
    for rows, columns, piece in _pieces(q.shape[2], args):
        more, more_lse = _flash(q[:, :, rows], k[:, :, columns], v[:, :, columns], piece)
        if rows == columns:
            out[:, :, rows], lse[:, :, rows] = more, more_lse
        else:
            merge(out[:, :, rows], lse[:, :, rows], more.to(out.dtype), more_lse, in_place=True)
    return out, lse


def flash_cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, args: TileArgs
) -> Grads:
    """(dq, dk, dv, None) of one tile from the rows' global `out` and `lse`."""
    if not _divided(q, k, args):
        return *_flash_backward(grad, q, k, v, out, lse, args), None
    dq, dk, dv = (empty_rows_first(x, x.shape[3], accumulator(x.dtype)) for x in (q, k, v))
    for rows, columns, piece in _pieces(q.shape[2], args):
        grad_, q_, out_, lse_ = (x[:, :, rows] for x in (grad, q, out, lse))
        more = _flash_backward(grad_, q_, k[:, :, columns], v[:, :, columns], out_, lse_, piece)
        for total, place, part in zip((dq, dk, dv), (rows, columns, columns), more, strict=True):
            total[:, :, place].copy_(part) if rows == columns else total[:, :, place].add_(part)
    return dq, dk, dv, None


def _divided(q: Tensor, k: Tensor, args: TileArgs) -> bool:
    """Whether the tile is computed in pieces."""
    plain = (args.causal or args.mirrored) and args.mask is None and args.bias is None
    short = args.mirrored or q.shape[2] <= LARGEST  # the mask of a mirrored triangle is as large as its square
    return plain and short and q.shape[2] == k.shape[2] and q.shape[2] >= 2 * SMALLEST


def _pieces(length: int, args: TileArgs) -> Iterator[tuple[slice, slice, TileArgs]]:
    """(rows, columns, what acts there) of the parts of a triangle: the triangles, which meet all rows, first."""
    edges = [0, length]
    while edges[1] >= 2 * SMALLEST:
        edges = sorted({*edges, *((a + b) // 2 for a, b in pairwise(edges))})
    yield from ((slice(a, b), slice(a, b), args) for a, b in pairwise(edges))
    square = replace(args, causal=False, mirrored=False)
    while len(edges) > 2:
        for a, b, c in zip(edges[::2], edges[1::2], edges[2::2], strict=False):
            first, last = slice(a, b), slice(b, c)
            yield (first, last, square) if args.mirrored else (last, first, square)
        edges = edges[::2]


def _flash(q: Tensor, k: Tensor, v: Tensor, args: TileArgs) -> tuple[Tensor, Tensor]:
    added = additive(q, args)
    q, k, v = _dense(q, k, v)
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, args.causal, attn_mask=_expanded(added, q, k), scale=args.scale
    )
    if args.mask is not None or args.bias is not None:
        assert added is not None
        lse = lse.masked_fill(sees_nothing(added, args.causal, q, k), -torch.inf)
    return out, lse


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, args: TileArgs
) -> tuple[Tensor, Tensor, Tensor]:
    mask = _expanded(additive(q, args), q, k)
    grad, q, k, v, out = _dense(grad, q, k, v, out)
    found: tuple[Tensor, Tensor, Tensor] = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse.contiguous(), 0.0, args.causal, attn_mask=mask, scale=args.scale
    )
    return found


def _dense(*tensors: Tensor) -> list[Tensor]:
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _expanded(added: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The op takes a 2-D or 4-D mask of full length."""
    return None if added is None else added.expand(added.shape[0], added.shape[1], q.shape[2], k.shape[2])
