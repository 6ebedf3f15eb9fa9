"""torch's CPU flash op as a tile kernel.

Its lse is a natural logarithm.  It reads garbage if a last stride is not 1, and returns lse = 0 for a row that sees no
key.  It supports GQA, a causal flag (top-left) and an additive mask with broadcast strides; a mirrored triangle is
passed as a mask.  With fewer keys than a vector register holds, it gives out 0 and lse 0 for a row of which every score
is NaN: such a row is found here and made NaN again, since NaN is how users find a fault.

Under the causal flag it skips keys in blocks of 512, so a short triangle costs as much as its square.  A triangle is
therefore computed as two triangles of half the rows, in one call with twice the batch, and the square between them.  A
triangle of fewer than 4 `SMALLEST` rows becomes a strip, of all rows and the half of the keys that more rows see, and a
triangle of the other keys, since the op is slow with few rows; so does a triangle with an odd number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ringpass.kernels.blocks import join_rows, rows_first, stacked, unstacked
from ringpass.kernels.tile import (
    Grads,
    TileArgs,
    above_diagonal,
    additive,
    merge_by_lse,
    per_query_head,
    sees_nothing,
)
from ringpass.precision import accumulator

aten = torch.ops.aten
SMALLEST, LARGEST = 128, 1024  # rows: of the smallest triangles, of the largest causal one that is divided
VECTOR = 64  # bytes: of the widest vector registers


def flash_cpu(q: Tensor, k: Tensor, v: Tensor, args: TileArgs) -> tuple[Tensor, Tensor]:
    """(out, lse) of one tile, (B, H, Lq, D) and (B, H, Lq)."""
    if not _divided(q, k, args):
        return _flash(q, k, v, args)
    return _triangle(_views(q, k, v), args)


def flash_cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, args: TileArgs
) -> Grads:
    """(dq, dk, dv, None) of one tile from the rows' global `out` and `lse`."""
    if not _divided(q, k, args):
        return *_flash_backward(grad, q, k, v, out, lse, args), None
    grad, q, k, v, out = _views(grad, q, k, v, out)
    return *_triangle_backward((grad, q, out, lse), (k, v), args), None


def _divided(q: Tensor, k: Tensor, args: TileArgs) -> bool:
    """Whether the tile is computed in parts."""
    plain = (args.causal or args.mirrored) and args.mask is None and args.bias is None
    short = args.mirrored or q.shape[2] <= LARGEST  # the mask of a mirrored triangle is as large as its square
    return plain and short and q.shape[2] == k.shape[2] and q.shape[2] >= 2 * SMALLEST


# --- triangles --------------------------------------------------------------------------------------------------------


def _triangle(tensors: Sequence[Tensor], args: TileArgs) -> tuple[Tensor, Tensor]:
    """(out, lse) in the accumulator's dtype, from (q, k, v)."""
    q, k, v = tensors
    length = q.shape[2]
    if length < 2 * SMALLEST:
        return _flash(q, k, v, args)
    if _in_strips(length):
        strip, rows = _strip(length, args)
        out, lse = _flash(q, k[:, :, strip], v[:, :, strip], args)
        part, part_lse = _triangle(_rows_of(tensors, rows), args)
    else:
        out, lse = map(_joined, _triangle([_halved(x) for x in tensors], args))
        rows, columns = _square(length, args)
        part, part_lse = _flash(q[:, :, rows], k[:, :, columns], v[:, :, columns], _full(args))
    out = out.to(accumulator(q.dtype))
    merge_by_lse(out[:, :, rows], lse[:, :, rows], part.to(out.dtype), part_lse, in_place=True)
    return out, lse


def _triangle_backward(mine: Sequence[Tensor], theirs: Sequence[Tensor], args: TileArgs) -> list[Tensor]:
    """[dq, dk, dv] in the accumulator's dtype, from (grad, q, out, lse) and (k, v)."""
    length = mine[1].shape[2]
    if length < 2 * SMALLEST:
        return _gradients(mine, theirs, args)
    if _in_strips(length):
        strip, rows = _strip(length, args)
        dq, *of_strip = _gradients(mine, _rows_of(theirs, strip), args)
        more, *of_rest = _triangle_backward(_rows_of(mine, rows), _rows_of(theirs, rows), args)
        dk, dv = (join_rows(x[::-1] if args.mirrored else x) for x in zip(of_strip, of_rest, strict=True))
    else:
        halves = _triangle_backward([_halved(x) for x in mine], [_halved(x) for x in theirs], args)
        dq, dk, dv = map(_joined, halves)
        rows, columns = _square(length, args)
        more, *of_square = _gradients(_rows_of(mine, rows), _rows_of(theirs, columns), _full(args))
        for total, part in zip(_rows_of((dk, dv), columns), of_square, strict=True):
            total.add_(part)
    dq[:, :, rows].add_(more)
    return [dq, dk, dv]


def _in_strips(length: int) -> bool:
    return length < 4 * SMALLEST or length % 2 == 1


def _strip(length: int, args: TileArgs) -> tuple[slice, slice]:
    """The keys of the strip, which has all rows; the rows, and keys, of the remaining triangle."""
    keys = length // 2 if length < 4 * SMALLEST else length % (2 * SMALLEST)
    if args.mirrored:
        return slice(length - keys, length), slice(0, length - keys)
    return slice(0, keys), slice(keys, length)


def _square(length: int, args: TileArgs) -> tuple[slice, slice]:
    """(rows, columns) of the square between the halves of a triangle."""
    first, second = slice(0, length // 2), slice(length // 2, length)
    return (first, second) if args.mirrored else (second, first)


def _full(args: TileArgs) -> TileArgs:
    return replace(args, causal=False, mirrored=False)


def _rows_of(tensors: Sequence[Tensor], rows: slice) -> list[Tensor]:
    return [x[:, :, rows] for x in tensors]


def _gradients(mine: Sequence[Tensor], theirs: Sequence[Tensor], args: TileArgs) -> list[Tensor]:
    """[dq, dk, dv] of a part."""
    (grad, q, out, lse), (k, v) = mine, theirs
    return [x.to(accumulator(x.dtype)) for x in _flash_backward(grad, q, k, v, out, lse, args)]


def _views(*tensors: Tensor) -> list[Tensor]:
    """The tensors in a memory order in which `_halved` copies nothing."""
    return [rows_first(x) if x.shape[0] > 1 else x for x in tensors]


def _halved(x: Tensor) -> Tensor:
    """(B, H, L, ..) as (2 B, H, L / 2, ..)."""
    half = x.shape[2] // 2
    return stacked(x, (0, half), half, 2)


def _joined(x: Tensor) -> Tensor:
    """(2 B, H, L / 2, ..) as (B, H, L, ..)."""
    return unstacked(x, 2)


# --- torch's op -------------------------------------------------------------------------------------------------------


def _flash(q: Tensor, k: Tensor, v: Tensor, args: TileArgs) -> tuple[Tensor, Tensor]:
    added = additive(q, k, args)
    q, k, v = _dense(q, k, v)
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, args.causal, attn_mask=_expanded(added, q, k), scale=args.scale
    )
    if k.shape[2] * accumulator(k.dtype).itemsize < VECTOR:
        nan = _has_nan(q, k, added, args.causal)
        out, lse = out.masked_fill(nan.unsqueeze(-1), torch.nan), lse.masked_fill(nan, torch.nan)
    if args.mask is not None or args.bias is not None:
        assert added is not None
        lse = lse.masked_fill(sees_nothing(added, args.causal, q, k), -torch.inf)
    return out, lse


def _has_nan(q: Tensor, k: Tensor, added: Tensor | None, causal: bool) -> Tensor:
    """Bools (B, H, Lq): rows of which a score is NaN."""
    dtype = accumulator(q.dtype)
    scores = torch.matmul(q.to(dtype), per_query_head(k, q).to(dtype).transpose(-1, -2))
    if added is not None:
        scores = scores + added
    found = scores.isnan()
    return (found & above_diagonal(q, k).logical_not() if causal else found).any(-1)


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, args: TileArgs
) -> tuple[Tensor, Tensor, Tensor]:
    mask = _expanded(additive(q, k, args), q, k)
    grad, q, k, v, out = _dense(grad, q, k, v, out)
    found: tuple[Tensor, Tensor, Tensor] = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse.contiguous(), 0.0, args.causal, attn_mask=mask, scale=args.scale
    )
    return found


def _dense(*tensors: Tensor) -> list[Tensor]:
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _expanded(added: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The mask at full length: the op takes only 2-D or 4-D masks."""
    return None if added is None else added.expand(added.shape[0], added.shape[1], q.shape[2], k.shape[2])
