"""Ops that merge neighbours along dims to one, or split each element into several neighbours.

    avg_pool1d(x, 4), x.unfold(2, 4, 4)      a dim (S/4, 4) becomes (S/4,)
    pixel_unshuffle(x, 2), im2col            the same; the inner factors of rows and columns become those of channels
    upsample_nearest2d                       a dim (S,) becomes (S, 2)
    pixel_shuffle, col2im, conv_transpose2d  the same; the inner factors come from the channels

Contract: if the outer factor of a dim is partitioned, the op on local tokens is the same call.  A dim whose windows
overlap, or do not cover it, is needed replicated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import sympy
from torch.fx import Node

from ringpass.nodes import Size, args_of, bound_of, first_of, op_name, operands_of, size_of
from ringpass.passes.op_rules.spec import OpRule, Writer, same_call
from ringpass.passes.propagate.axis import Axis
from ringpass.passes.propagate.factors import Dims, Factors, Note, Sweep, is_integral, product

DimsRule = Callable[[Sweep, Node, Note], Dims | None]


# --- dims of several factors ------------------------------------------------------------------------------------------


def units(sweep: Sweep, factors: Factors, size: Size | sympy.Expr, note: Note) -> tuple[Factors, Factors]:
    """(the `size` units of a dim, the elements of each); a dim that is no whole number of units is replicated."""
    each = sympy.cancel(product(factors) / size_of(size))
    if not is_integral(each):
        note.need_replication += factors
        return sweep.new(size), ()
    outer, inner = sweep.reshape((factors,), (size, each), note)
    return outer, inner


def merged(sweep: Sweep, factors: Factors, size: Size | sympy.Expr, note: Note) -> Factors:
    """The dim of `size` units of a dim, each made of all its elements or one of them."""
    outer, inner = units(sweep, factors, size, note)
    note.need_replication += inner
    return outer


def _split(sweep: Sweep, factors: Factors, size: Size | sympy.Expr, note: Note) -> Factors:
    """A dim of `size` elements, a whole number of neighbours for each element of a dim, which else is replicated."""
    each = sympy.cancel(size_of(size) / product(factors))
    if is_integral(each) and each.is_number:
        return (*factors, *sweep.new(int(each)))
    note.need_replication += factors
    return sweep.new(size)


def _replicated(sweep: Sweep, factors: Factors, size: Size | sympy.Expr, note: Note) -> Factors:
    """A dim of which each element of the result may read any."""
    note.need_replication += factors
    return sweep.new(size)


def of_each_dim(value: int | Sequence[int], n: int) -> list[int]:
    """An argument for each of n dims, given once or n times."""
    given = [value] if isinstance(value, int) else list(value)
    return given * n if len(given) == 1 else given


def _side_by_side(bound: dict[str, Any], kernel: Sequence[int]) -> list[bool]:
    """For each dim, whether the windows of an op stand side by side, from its first element on."""
    n = len(kernel)
    stride, apart = of_each_dim(bound.get("stride") or kernel, n), of_each_dim(bound.get("dilation", 1), n)
    padding = zip(*(of_each_dim(bound.get(name, 0), n) for name in ("padding", "output_padding")), strict=True)
    return [
        s == k and not any(p) and (d == 1 or k == 1) for s, k, p, d in zip(stride, kernel, padding, apart, strict=True)
    ]


# --- dims of ops ------------------------------------------------------------------------------------------------------


def _pooled(count: int) -> DimsRule:
    """The dims of a pool of windows along the last `count` dims."""

    def dims_rule(sweep: Sweep, node: Node, note: Note) -> Dims:
        dims, shape, bound = list(sweep.dims(first_of(node))), node.meta["val"].shape, bound_of(node)
        kernel = of_each_dim(bound["kernel_size"], count)
        at = range(len(dims) - count, len(dims))
        for position, k, tiles in zip(at, kernel, _side_by_side(bound, kernel), strict=True):
            whole = tiles and product(dims[position]) == k * size_of(shape[position])
            dims[position] = (merged if whole else _replicated)(sweep, dims[position], shape[position], note)
        return tuple(dims)

    return dims_rule


def _adaptive(count: int) -> DimsRule:
    """The dims of a pool to a given size."""

    def dims_rule(sweep: Sweep, node: Node, note: Note) -> Dims:
        dims, shape = sweep.dims(first_of(node)), node.meta["val"].shape
        pooled = [merged(sweep, f, n, note) for f, n in zip(dims[-count:], shape[-count:], strict=True)]
        return (*dims[:-count], *pooled)

    return dims_rule


def _unfolded(sweep: Sweep, node: Node, note: Note) -> Dims | None:
    """Windows of a dim, whose elements are a last dim; None where they overlap or leave elements out."""
    dims, (_, dim, size, step) = list(sweep.dims(first_of(node))), args_of(node)
    number = node.meta["val"].shape[dim]
    if size != step or product(dims[dim]) != size * size_of(number):
        return None
    dims[dim], inner = units(sweep, dims[dim], number, note)
    return (*dims, inner)


def _pixels_merged(sweep: Sweep, node: Node, note: Note) -> Dims | None:
    """pixel_unshuffle (.., C, H * r, W * r) -> (.., C * r * r, H, W)."""
    *batch, channels, rows, columns = sweep.dims(first_of(node))
    h, w = (units(sweep, f, n, note) for f, n in zip((rows, columns), node.meta["val"].shape[-2:], strict=True))
    return (*batch, (*channels, *h[1], *w[1]), h[0], w[0])


def _pixels_split(sweep: Sweep, node: Node, note: Note) -> Dims:
    """pixel_shuffle (.., C * r * r, H, W) -> (.., C, H * r, W * r)."""
    *batch, channels, rows, columns = sweep.dims(first_of(node))
    times = args_of(node)[1]
    parts = sweep.reshape((channels,), (node.meta["val"].shape[-3], times, times), note)
    return (*batch, parts[0], (*rows, *parts[1]), (*columns, *parts[2]))


def _grid_to_patches(sweep: Sweep, node: Node, note: Note) -> Dims | None:
    """im2col (B, C, H, W) -> (B, C * kh * kw, patches); None where they overlap or leave elements out."""
    image, bound = first_of(node).meta["val"].shape, bound_of(node)
    kernel = bound["kernel_size"]
    sizes = [sympy.cancel(size_of(n) / k) for n, k in zip(image[-2:], kernel, strict=True)]
    if len(image) != 4 or not all(map(is_integral, sizes)) or not all(_side_by_side(bound, kernel)):
        return None
    batch, channels, rows, columns = sweep.dims(first_of(node))
    h, w = (units(sweep, f, n, note) for f, n in zip((rows, columns), sizes, strict=True))
    return batch, (*channels, *h[1], *w[1]), (*h[0], *w[0])


def _patches_to_grid(sweep: Sweep, node: Node, note: Note) -> Dims | None:
    """col2im (B, C * kh * kw, patches) -> (B, C, H, W); None where they overlap or leave elements out."""
    image, bound = node.meta["val"].shape, bound_of(node)
    kernel = bound["kernel_size"]
    sizes = [sympy.cancel(size_of(n) / k) for n, k in zip(image[-2:], kernel, strict=True)]
    if len(image) != 4 or not all(map(is_integral, sizes)) or not all(_side_by_side(bound, kernel)):
        return None
    batch, channels, patches = sweep.dims(first_of(node))
    parts = sweep.reshape((channels,), (image[1], *kernel), note)
    rows, columns = sweep.reshape((patches,), sizes, note)
    return batch, parts[0], (*rows, *parts[1]), (*columns, *parts[2])


def _upsampled(sweep: Sweep, node: Node, note: Note) -> Dims:
    """Rows and columns of nearest neighbours: repeated, where the scale that picks them is how often each stands."""
    batch, channels, *dims = sweep.dims(first_of(node))
    shape, old = node.meta["val"].shape[2:], first_of(node).meta["val"].shape[2:]
    scales = bound_of(node).get("scale_factors") or [None] * len(shape)
    repeats = [
        _repeats(f, n) and (scale is None or scale * m == n)
        for f, n, m, scale in zip(dims, shape, old, scales, strict=True)
    ]
    out = [(_split if r else _replicated)(sweep, f, n, note) for r, f, n in zip(repeats, dims, shape, strict=True)]
    return batch, channels, *out


def _repeats(factors: Factors, size: Size) -> bool:
    """Whether each element of a dim is found equally often among its `size` nearest neighbours.

    torch finds them by a ratio in float32, which misses some where it is less than the exact one.
    """
    times = sympy.cancel(size_of(size) / product(factors))
    return bool(times.is_Integer) and Fraction(float(np.float32(1 / int(times)))) * int(times) >= 1


def _transposed_convolution(sweep: Sweep, node: Node, note: Note) -> Dims | None:
    """Of each element, a window; those that stand side by side are neighbours of one element."""
    dims, weight, shape = sweep.dims(first_of(node)), operands_of(node)[1], node.meta["val"].shape
    if len(dims) != len(sweep.dims(weight)):  # no batch: the first dim is that of channels
        return None
    note.need_replication += [f for d in (dims[1], *sweep.dims(weight)) for f in d]
    tiles = _side_by_side(bound_of(node), weight.meta["val"].shape[2:])
    sides = zip(tiles, dims[2:], shape[2:], strict=True)
    out = [(_split if whole else _replicated)(sweep, f, n, note) for whole, f, n in sides]
    return dims[0], sweep.new(shape[1]), *out


# --- writing ----------------------------------------------------------------------------------------------------------


def _write_sized(count: int) -> Callable[[Writer, Node, Axis], Node]:
    """Writes an op that is told the size of its last `count` dims, one of which has the tokens."""

    def write(writer: Writer, node: Node, axis: Axis) -> Node:
        if writer.shard_args(node, axis).dim < node.meta["val"].ndim - count:
            return same_call(writer, node, axis)
        given = writer.operands_by_name(node, axis, f"operand of {op_name(node)}")
        given |= {"output_size": writer.local_shape(node, axis)[-count:]}
        return writer.emit_by_name(node.target, {k: x for k, x in given.items() if k != "scale_factors"}, node.name)

    return write


RULES = {
    **{f"{kind}_pool{n}d.default": OpRule(_pooled(n), takes_none=False) for kind in ("avg", "max") for n in (1, 2, 3)},
    **{
        f"adaptive_avg_pool{n}d.default": OpRule(_adaptive(n), takes_none=False, write=_write_sized(n))
        for n in (1, 2, 3)
    },
    **{
        f"{name}{n}d.vec": OpRule(_upsampled, takes_none=False, write=_write_sized(n))
        for name in ("upsample_nearest", "_upsample_nearest_exact")
        for n in (1, 2, 3)
    },
    **dict.fromkeys(
        ("conv_transpose1d.default", "conv_transpose2d.input", "conv_transpose3d.input"),
        OpRule(_transposed_convolution, computes=True),
    ),
    "unfold.default": OpRule(_unfolded, takes_none=False),
    "im2col.default": OpRule(_grid_to_patches, takes_none=False),
    "col2im.default": OpRule(_patches_to_grid, takes_none=False, write=_write_sized(2)),
    "pixel_unshuffle.default": OpRule(_pixels_merged, takes_none=False),
    "pixel_shuffle.default": OpRule(_pixels_split, takes_none=False),
}
