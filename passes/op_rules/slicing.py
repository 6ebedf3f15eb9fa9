"""Slices, concatenations, pads and convolutions along the sequence, on local tokens.

    x[:, 1:]                  the local rows but the first, on the rank that holds token 0; all of them elsewhere
    cat([cls, patches])       the local patches, after the CLS token on the rank that holds it
    cat([text, image])        the local text, then the local image: each part is assigned to ranks by itself
    pad(x, (0, 0, 0, 5))      the local tokens, then those of the five that this rank holds
    conv1d(x, w, padding=1)   conv1d(halo(x, 1, 1), w), and of what it gives, the rows of local tokens
    pad(x, (0, 0, 1, -1))     halo(x, 1, 0), without the last row of each range of tokens
    conv1d(pad(x, (2, 0)), w) conv1d(halo(padded, 2, 0), w), and of what it gives for all of `padded`, the rows of x

Contract: a conv1d and a shift exchange the halo of each range of local tokens, and no more; the others move nothing,
for a token is on the same rank in all slices of its sequence (`plan.axes`).  Of a replicated part, such as CLS, each
rank takes its shard.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import accumulate

import sympy
import torch
from torch.fx import Node

from ringpass import ops
from ringpass.layouts.layout import assigned
from ringpass.layouts.ranges import clipped
from ringpass.layouts.ranges import size as size_of_ranges
from ringpass.nodes import (
    args_of,
    bound_of,
    first_of,
    hint_of,
    is_empty,
    op_name,
    operands_of,
    size_of,
    slice_of,
)
from ringpass.passes.op_rules.merging import merged, of_each_dim
from ringpass.passes.op_rules.selecting import write_slice
from ringpass.passes.op_rules.spec import GraphSize, OpRule, Placed, Put, Writer, same_call
from ringpass.passes.propagate.alignment import same
from ringpass.passes.propagate.axis import Axis
from ringpass.passes.propagate.factors import Dims, Factors, Note, Sweep, product

aten = torch.ops.aten
CONVOLUTIONS = ("conv1d.default", "conv2d.default", "conv3d.default")
PADS = ("pad.default", "constant_pad_nd.default")


# --- dims -------------------------------------------------------------------------------------------------------------


def _passing_dims(sweep: Sweep, node: Node, note: Note) -> Dims:
    """Dims whose size the op leaves alone pass; the others are needed replicated.

    For slice, pad and cat of what holds no tokens.
    """
    rank = node.meta["val"].ndim
    changed = _padded_dims(node, rank)
    operands = [sweep.dims(n) for n in operands_of(node) if n.meta["val"].shape != (0,)]  # cat skips empty 1-D tensors
    operands = [((),) * (rank - len(d)) + d for d in operands]
    out = []
    for position, n in enumerate(node.meta["val"].shape):
        columns = [d[position] for d in operands]
        if position not in changed and all(product(f) == size_of(n) for f in columns):
            out.append(sweep.broadcast([(f,) for f in columns], note)[0])
        else:
            note.need_replication += [f for column in columns for f in column]
            out.append(sweep.new(n))
    return tuple(out)


def _sliced(sweep: Sweep, node: Node, note: Note) -> Dims:
    """A slice of the tokens, if it is most of them or known from elsewhere, and its result is computed on."""
    dims, (dim, start, _, step) = list(sweep.dims(first_of(node))), slice_of(node)
    old, size = product(dims[dim]), size_of(node.meta["val"].shape[dim])
    returned = all(user.op == "output" for user in node.users)
    if _takes_one_of_each(sweep, node):
        dims[dim] = merged(sweep, dims[dim], node.meta["val"].shape[dim], note)
        return tuple(dims)
    if old == size or not dims[dim] or size == 1 or step != 1 or first_of(node) not in sweep.computed or returned:
        return _passing_dims(sweep, node, note)
    many, kept = (hint_of(n.meta["val"].shape[dim]) for n in (first_of(node), node))
    begin = first_token(start, old, many)
    section = sweep.in_sections and (sweep.is_section(dims[dim]) or len(dims[dim]) > 1 or _one_of_sections(node))
    found = sweep.slice_of(dims[dim], begin, size, new=2 * kept >= many or section, section=section)
    if found is None:
        return _passing_dims(sweep, node, note)
    sweep.slices[node] = dim
    dims[dim] = found
    return tuple(dims)


def _taken(node: Node) -> tuple[int, int, int] | None:
    """The elements that a slice takes, where they are next to each other, and their places are numbers."""
    dim, start, stop, step = slice_of(node)
    size = first_of(node).meta["val"].shape[dim]
    if step != 1 or not all(type(n) is int for n in (start or 0, 0 if stop is None else stop, size)):
        return None
    first, last, _ = slice(start, stop).indices(size)
    return dim, first, last


def first_token(start: int | Node | None, size: sympy.Expr, hint: int) -> sympy.Expr:
    """Where a slice of `size` tokens, `hint` in this compilation, begins, counted from the front."""
    first = size_of(start.meta["val"] if isinstance(start, Node) else start or 0)
    if not first.is_negative:
        return first
    return size + first if hint + int(first) >= 0 else sympy.Integer(0)


def _one_of_sections(node: Node) -> bool:
    """Whether a slice of less than half the tokens is one of several of its value, which together are most of it.

    Those of less than half must be an eighth at least: CLS and the other tokens are no sections, nor are the two parts
    of a roll.
    """
    source, dim = first_of(node), slice_of(node)[0]
    slices = {n.args: n for n in source.users if op_name(n) == op_name(node) and first_of(n) is source}
    sizes = [hint_of(n.meta["val"].shape[dim]) for n in slices.values() if slice_of(n)[0] == dim]
    many, kept = (hint_of(n.meta["val"].shape[dim]) for n in (source, node))
    small = [n for n in sizes if 2 * n < many]
    moved = len(small) == 1 and all(op_name(user) == "cat.default" for user in node.users)
    return 2 * kept < many <= min(2 * sum(sizes), 8 * sum(small)) and not moved


def _takes_one_of_each(sweep: Sweep, node: Node) -> bool:
    """Whether a slice x[:, a::n] takes one of each n neighbours, of as many as a dim of computed values consists of."""
    dim, start, _, step = slice_of(node)
    factors, size = sweep.dims(first_of(node))[dim], size_of(node.meta["val"].shape[dim])
    numbers = all(type(n) is int for n in (start or 0, step)) and 0 <= (start or 0) < step and step > 1
    return numbers and product(factors) == step * size and first_of(node) in sweep.computed


def _concatenated(sweep: Sweep, node: Node, note: Note) -> Dims:
    """Slices of a sequence joined, if any of them holds computed values."""
    operands = [n for n in operands_of(node) if not is_empty(n)]
    rank = node.meta["val"].ndim
    listed = [n for n in args_of(node)[0] if n in operands]
    if len(listed) == 1:
        return sweep.dims(listed[0])
    dim = bound_of(node).get("dim", 0) % rank
    parts = [(sweep.dims(n)[dim], size_of(n.meta["val"].shape[dim])) for n in listed]
    if sweep.computed.isdisjoint(operands) or len(parts) < 2 or not any(f for f, _ in parts):
        return _passing_dims(sweep, node, note)
    alike = [n for n in operands_of(node) if n.meta["val"].ndim == rank]  # empty ones have the other dims too
    out = list(sweep.broadcast_beside([sweep.dims(n) for n in alike], [dim], note))
    out[dim] = sweep.joined(parts, note)
    sweep.slices[node] = dim
    return tuple(out)


def _put_together(node: Node) -> Put | None:
    """The parts of a concatenation, where their sizes are numbers."""
    dim = bound_of(node).get("dim", 0) % node.meta["val"].ndim
    parts = [n for n in args_of(node)[0] if not is_empty(n)]
    sizes = [n.meta["val"].shape[dim] for n in parts]
    if not all(isinstance(n, int) for n in sizes):
        return None
    ends = list(accumulate(sizes, initial=0))
    return Put(dim, None, tuple(zip(parts, ends, ends[1:], strict=False)))


def _padded(sweep: Sweep, node: Node, note: Note) -> Dims:
    """Tokens put before and after a slice of a sequence, if it holds computed values."""
    rank, source = node.meta["val"].ndim, first_of(node)
    changed = _padded_dims(node, rank)
    amounts = args_of(node)[1]
    (dim,) = changed if len(changed) == 1 else (None,)
    low, high = amounts[2 * (rank - 1 - dim) :][:2] if dim is not None else (0, 0)
    computed = source in sweep.computed or any(op_name(user) in CONVOLUTIONS[:1] for user in node.users)
    fixed = all(isinstance(n, int) and n >= 0 for n in (low, high))
    if _shift_of(node):
        sweep.halos[node] = min(changed)
        return sweep.dims(source)
    if dim is None or not (fixed and computed) or _fill(node) is None or not sweep.dims(source)[dim]:
        return _passing_dims(sweep, node, note)
    dims = list(sweep.dims(source))
    size = size_of(source.meta["val"].shape[dim])
    dims[dim] = sweep.joined([((), size_of(low)), (dims[dim], size), ((), size_of(high))], note)
    sweep.slices[node] = dim
    return tuple(dims)


def _convolved(sweep: Sweep, node: Node, note: Note) -> Dims | None:
    """Batches pass; so does the first dim of the grid, if each step gives one element, or, of a conv1d, if it gives a
    slice of the tokens."""
    dims, shape = sweep.dims(first_of(node)), node.meta["val"].shape
    weights = sweep.dims(bound_of(node)["weight"])
    if len(dims) != len(weights):  # no batch: the first dim is that of channels
        return None
    note.need_replication += [f for d in (dims[1], *weights) for f in d]
    step = _halo_of(node)[2]
    old, size = (size_of(x.meta["val"].shape[2]) for x in (first_of(node), node))
    if dims[2] and old == step * size:
        note.need_replication += [f for d in dims[3:] for f in d]
        rows = merged(sweep, dims[2], shape[2], note)
        if any(_halo_of(node)[:2]):
            sweep.halos[node] = 2
        return dims[0], sweep.new(shape[1]), rows, *sweep.fresh(shape[3:])
    if step == 1 and len(dims) == 3 and dims[2] and (inner := _inner_slice(sweep, node, dims[2])):
        sweep.slices[node] = 2
        return dims[0], sweep.new(shape[1]), inner
    note.need_replication += [f for d in dims[2:] for f in d]
    return (dims[0], *sweep.fresh(shape[1:]))


def _inner_slice(sweep: Sweep, node: Node, tokens: Factors) -> Factors | None:
    """The slice of its tokens that a conv1d gives, of fewer than it reads: a known one, or the last that it can be."""
    old, size = (size_of(x.meta["val"].shape[2]) for x in (first_of(node), node))
    fewer = old - size
    if not fewer.is_Integer or fewer < 0:
        return None
    known = (
        at for found, at in sweep.alignment.slices(sweep.index(tokens)) if same(found.size, size) and at.is_Integer
    )
    offset = min((at for at in known if 0 <= at <= fewer), default=fewer)
    return sweep.slice_of(tokens, offset, size, new=True)


def _halo_of(node: Node, offset: int = 0) -> tuple[int, int, int]:
    """(elements before, elements after, step): what a convolution reads around `step` elements of the first dim of its
    grid, or a shift around one.

    `offset`: where the first token that a conv1d gives is among those that it reads.
    """
    if op_name(node) not in CONVOLUTIONS:
        low = _shift_of(node)
        return max(low, 0), max(-low, 0), 1
    bound = bound_of(node)
    step, padding, apart = (_single(bound.get(name, n)) for name, n in (("stride", 1), ("padding", 0), ("dilation", 1)))
    before = padding + offset
    after = max(apart * (int(bound["weight"].meta["val"].shape[2]) - 1) - before + 1 - step, 0)
    return before, after + -(before + after) % step, step


def _single(value: int | Sequence[int]) -> int:
    return value if isinstance(value, int) else int(value[0])


def _shift_of(node: Node) -> int:
    """By how many tokens a pad shifts a sequence of the same length: it pads one side and crops the other."""
    if op_name(node) not in PADS:
        return 0
    amounts, rank = list(args_of(node)[1]), node.meta["val"].ndim
    changed = _padded_dims(node, rank)
    if len(changed) != 1:
        return 0
    low, high = amounts[2 * (rank - 1 - min(changed)) :][:2]
    fixed = isinstance(low, int) and isinstance(high, int) and low == -high
    return low if fixed and _fill(node) == 0 else 0


def _fill(node: Node) -> float | None:
    """The number that a pad fills in; None where it repeats what is there."""
    bound = bound_of(node)
    return (bound.get("value") or 0) if bound.get("mode", "constant") == "constant" else None


def _padded_dims(node: Node, rank: int) -> set[int]:
    """Dims that a pad changes: also one that it pads on one side and crops on the other, to the same size."""
    if op_name(node) not in PADS:
        return set()
    amounts = args_of(node)[1]
    return {rank - 1 - i // 2 for i, amount in enumerate(amounts) if not (isinstance(amount, int) and amount == 0)}


# --- placement --------------------------------------------------------------------------------------------------------


def _parts_of(node: Node, dim: int) -> list[tuple[Node, sympy.Expr]]:
    """The operands of a slice, cat or pad along `dim`, and where their tokens begin in what a cat makes."""
    given = args_of(node)[0]
    parts = [n for n in given if not is_empty(n)] if isinstance(given, list | tuple) else [given]
    sizes = [size_of(n.meta["val"].shape[dim]) for n in parts]
    return [(n, sum(sizes[:i], sympy.Integer(0))) for i, n in enumerate(parts)]


def _of_one_sequence(placement: Placed, node: Node, axis: Axis, dim: int) -> list[Axis | None] | None:
    """The axis of each part; None unless those that have one are slices of the sequence of `node`, and one has."""
    parts, sequence = [part for part, _ in _parts_of(node, dim)], placement.sequence_along(node, dim)
    found = [placement.axis_along(part, dim) for part in parts]
    inner = [placement.sweep.dims(part)[dim][-1:] for part in parts]
    if any(a and not any(map(placement.is_axis, last)) for a, last in zip(found, inner, strict=True)):
        return None  # a unit of the axis is several tokens
    sequences = [placement.sequence_along(part, dim) for part in parts]
    aligned = any(found) and all(a is None or s is sequence for a, s in zip(found, sequences, strict=True))
    return found if aligned else None


def _axis_of_joined(placement: Placed, node: Node, axis: Axis, dim: int) -> Axis | None:
    """A cat or pad joins local tokens where each replicated part is held by one rank."""
    found = _of_one_sequence(placement, node, axis, dim)
    if found is None or axis.units is not None:
        return None
    parts = zip(_parts_of(node, dim), found, strict=True)
    holders = [placement.holder(axis, offset, part, dim) for (part, offset), sharded in parts if sharded is None]
    return None if None in holders else axis


def _axis_of_slice(placement: Placed, node: Node, axis: Axis, dim: int) -> Axis | None:
    """A slice takes local tokens of what is sharded."""
    if axis.units is not None:
        source = placement.axis_along(first_of(node), dim)
        same_units = source is not None and axis.units in (source.index, source.units)
        return axis if same_units and placement.modes[first_of(node)] is source else None
    found = _of_one_sequence(placement, node, axis, dim)
    return axis if found is not None and placement.modes[first_of(node)] is found[0] else None


def _axis_of_convolution(placement: Placed, node: Node, axis: Axis, dim: int) -> Axis | None:
    """A conv1d does so where neighbours are those of the sequence."""
    if axis.units is not None:
        return None
    return _axis_of_slice(placement, node, axis, dim) if placement.in_order(node, axis) else None


# --- writing ----------------------------------------------------------------------------------------------------------


def _write_slice(writer: Writer, node: Node, axis: Axis) -> Node:
    """The local tokens of a slice of the sequence; a slice of all elements is its operand."""
    if node in writer.placement.slices:
        source = _axis_of_operand(writer, node)
        return _slice_of(writer, writer.sharded(first_of(node), source), source, node, axis)
    if first_of(node).meta["val"].shape == node.meta["val"].shape:
        return writer.sharded(first_of(node), axis)
    return same_call(writer, node, axis)


def _axis_of_operand(writer: Writer, node: Node) -> Axis:
    """The axis on which the operand of a slice or convolution runs."""
    axis = writer.placement.modes[first_of(node)]
    assert axis is not None
    return axis


def _slice_of(writer: Writer, x: Node, source: Axis, node: Node, axis: Axis) -> Node:
    """Of the local tokens `x` of the axis `source`, those of its slice `axis`, which `node` makes."""
    sweep = writer.placement.sweep
    dim = sweep.slices[node]
    _, offset = sweep.sequence(sweep.dims(node)[dim])
    if axis.units is not None:
        start = _before_in_units(writer, source, axis)
    else:
        start = rows_before(writer, first_of(node), dim, source, offset)
    stop = writer.compute(operator.add, start, _local_rows(writer, node, dim, axis))
    return writer.emit(aten.slice.Tensor, x, dim, start, stop, name=node.name)


def _write_cat(writer: Writer, node: Node, axis: Axis) -> Node:
    if node not in writer.placement.slices:
        return same_call(writer, node, axis)
    dim, parts = writer.placement.sweep.slices[node], []
    for part, offset in _parts_of(node, dim):
        source = writer.placement.axis_along(part, dim)
        parts.append(writer.sharded(part, source) if source else _held(writer, part, axis, dim, offset))
    return writer.emit(aten.cat.default, parts, dim, name=node.name)


def _held(writer: Writer, part: Node, axis: Axis, dim: int, offset: sympy.Expr) -> Node:
    """Of a few replicated tokens at `offset` of the axis: all, on the rank that holds them there, none elsewhere."""
    holder = writer.placement.holder(axis, offset, part, dim)
    assert holder is not None
    size = writer.size(size_of(part.meta["val"].shape[dim]))
    args = dim, 1, size, assigned([holder]), writer.rank.world, writer.rank.rank, writer.rank.group
    replicated = writer.replicated(part, "a part of a sequence")
    return writer.emit(ops.shard, replicated, *args, name=f"{part.name}_local")


def _write_pad(writer: Writer, node: Node, axis: Axis) -> Node:
    if node not in writer.placement.slices:
        reads_neighbours = writer.placement.reads_neighbours(node, axis)
        return _write_halo(writer, node, axis) if reads_neighbours else same_call(writer, node, axis)
    dim = writer.placement.sweep.slices[node]
    source, amounts = first_of(node), list(args_of(node)[1])
    inner = writer.placement.axis_along(source, dim)
    assert inner is not None
    sweep = writer.placement.sweep
    _, offset = sweep.sequence(sweep.dims(source)[dim])
    low = rows_before(writer, node, dim, axis, offset)
    rest = writer.compute(operator.sub, _local_rows(writer, node, dim, axis), _local_rows(writer, source, dim, inner))
    at = 2 * (node.meta["val"].ndim - 1 - dim)
    amounts[at : at + 2] = low, writer.compute(operator.sub, rest, low)
    return writer.copy(node, (writer.sharded(source, inner), amounts, *args_of(node)[2:]), node.kwargs)


def _write_convolution(writer: Writer, node: Node, axis: Axis) -> Node:
    """A conv1d of more tokens than it gives: as if it gave as many, and of these the slice that it gives."""
    if node in writer.placement.slices:
        source = _axis_of_operand(writer, node)
        every = _write_halo(writer, node, source, int(axis.offset - source.offset))
        return _slice_of(writer, every, source, node, axis)
    reads_neighbours = writer.placement.reads_neighbours(node, axis)
    return _write_halo(writer, node, axis) if reads_neighbours else same_call(writer, node, axis)


def _write_halo(writer: Writer, node: Node, axis: Axis, offset: int = 0) -> Node:
    """A convolution or a shift, of the local tokens and their halo; what it gives begins at `offset`."""
    source, (low, high, step) = first_of(node), _halo_of(node, offset)
    where, layout = writer.shard_args(source, axis), axis.layout
    ranges = layout.ranges if isinstance(axis.tokens, int) else layout.spans  # as many as any length has
    most = len(list(ranges(writer.rank.rank, axis.hint)))
    size = size_of(source.meta["val"].shape[where.dim])
    each = writer.size(sympy.cancel(size / step / size_of(axis.tokens)))
    x = writer.sharded(source, axis)
    rows = writer.emit(ops.halo, x, *where, most, low, high, writer.rank.group, name=f"{source.name}_around")
    if op_name(node) in CONVOLUTIONS:
        given = writer.operands_by_name(node, axis, "weights")
        _, *others = of_each_dim(given.get("padding", 0), x.meta["val"].ndim - 2)
        given |= {"input": rows, "padding": [0, *others]}
        rows, before, after = writer.emit_by_name(node.target, given), 0, (low + high) // step
    else:
        before, after = high, low
    at = writer.emit(ops.interior_rows, rows, *where, each, before, after)
    return writer.emit(aten.index_select.default, rows, where.dim, at, name=node.name)


def _local_rows(writer: Writer, node: Node, dim: int, axis: Axis) -> GraphSize:
    """The local size of a dim of `node` on `axis`."""
    return writer.local_shape(node, axis)[dim]


def rows_before(writer: Writer, node: Node, dim: int, axis: Axis, offset: sympy.Expr) -> GraphSize:
    """How many local rows of `node`, along `dim` on `axis`, are before `offset` of its sequence: where the length is
    symbolic, one of its split points."""
    sweep, size = writer.placement.sweep, size_of(axis.tokens)
    factors = sweep.dims(node)[dim]
    at = sympy.expand(offset - sweep.sequence(factors)[1])
    if isinstance(axis.tokens, int):
        rows = axis.layout.rows(writer.rank.rank, axis.tokens, int(product(factors) / size))
        return size_of_ranges(clipped(rows, 0, int(at)))
    ends = {point: point if point >= 0 else size + point for point in (0, *axis.layout.split_points)}
    point = next((point for point, end in ends.items() if same(end, at)), None)
    assert point is not None or same(at, size), (axis, offset)
    return writer.compute(lambda s: axis.layout.before(writer.rank.rank, s, point), writer.tokens(axis))


def _before_in_units(writer: Writer, source: Axis, part: Axis) -> GraphSize:
    """How many local tokens of `source`, the units or a slice of their tokens, are before the slice `part` of them."""
    assert isinstance(part.tokens, int)
    offset, skipped = int(part.offset), 0 if source.units is None else int(source.offset)
    tokens = source.hint if source.units is not None else source.hint * part.layout.unit
    layout = source.layout if source.units is not None else source.layout.in_units(part.layout.unit)
    return size_of_ranges(clipped(layout.ranges(writer.rank.rank, tokens), 0, offset - skipped, 0))


_CONVOLUTION = OpRule(
    _convolved,
    computes=True,
    slice_axis=_axis_of_convolution,
    weights=lambda node: operands_of(node)[1:],
    write=_write_convolution,
)
_PAD = OpRule(_padded, slice_axis=_axis_of_joined, write=_write_pad)
RULES = {
    "slice.Tensor": OpRule(
        _sliced,
        takes_part=_taken,
        slice_axis=_axis_of_slice,
        write=_write_slice,
        select=write_slice,
        output_part=slice_of,
    ),
    "cat.default": OpRule(_concatenated, puts=_put_together, slice_axis=_axis_of_joined, write=_write_cat),
    **dict.fromkeys(CONVOLUTIONS, _CONVOLUTION),
    **dict.fromkeys(PADS, _PAD),
}
