"""Ops that write into a copy of a tensor: slices, scattered elements.

    slice_scatter(x, part, 1, 8, 16)      x[:, 8:16] = part: the local tokens of `part` into the local tokens of x
    slice_scatter(x, cls, 1, 0, 1)        the few replicated tokens of `cls`: those that this rank holds
    slice_scatter(x, part, -1, 0, 64)     features: all other dims pass
    scatter(x, -1, index, values)         the named dim is needed replicated, all others are the same index
    index_add(x, 1, index, rows)          the replicated rows whose positions this rank holds
    one_hot(index, classes)               a one among zeros: the dims of the index, and one of the classes

Contract: nothing moves.  Of rows that are written, each rank takes those that go into its tokens.
"""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch.fx import Node

from ringpass.nodes import bound_of, first_of, hint_of, size_of
from ringpass.passes.op_rules.selecting import located, positions_from
from ringpass.passes.op_rules.slicing import first_token, rows_before
from ringpass.passes.op_rules.spec import OpRule, Placed, Put, Writer, same_call
from ringpass.passes.propagate.axis import Axis
from ringpass.passes.propagate.factors import Dims, Note, Sweep, product

aten = torch.ops.aten


def _slice_scatter(sweep: Sweep, node: Node, note: Note) -> Dims | None:
    """x with a slice replaced: other dims are those of the part, whose tokens are a slice of those of x, or few."""
    base, part, dim = _written(node)
    x, inner = sweep.dims(base), sweep.dims(part)
    if part.meta["val"].shape[dim] == base.meta["val"].shape[dim]:
        return sweep.broadcast([x, inner], note)
    if _is_slice(sweep, node):
        sweep.slices[node] = dim
    else:
        note.need_replication += inner[dim]
    return _with_dim(sweep, [x, inner], dim, note)


def _with_dim(sweep: Sweep, operands: list[Dims], dim: int, note: Note) -> Dims:
    """The dims of the first operand; those of the others but `dim` are the same index."""
    out = list(sweep.broadcast_beside(operands, [dim], note))
    out[dim] = operands[0][dim]
    return tuple(out)


def _written(node: Node) -> tuple[Node, Node, int]:
    """(the tensor that a slice_scatter writes into, what it writes, along which dim)."""
    bound = bound_of(node)
    return bound["self"], bound["src"], bound.get("dim", 0) % node.meta["val"].ndim


def _is_slice(sweep: Sweep, node: Node) -> bool:
    """Whether a slice_scatter writes tokens next to each other, which are the same tokens where they come from."""
    base, part, dim = _written(node)
    tokens, written = sweep.dims(base)[dim], sweep.dims(part)[dim]
    start, step = _positions(node)
    if step != 1 or not tokens or not written or sweep.computed.isdisjoint((base, part)):
        return False
    outer, inner = sweep.index(tokens), sweep.index(written)
    many, few = (hint_of(n.meta["val"].shape[dim]) for n in (base, part))
    known = sweep.alignment.locate(inner)[0] is sweep.alignment.locate(outer)[0]
    return (known or 2 * few >= many) and sweep.alignment.join(outer, inner, start)


def _positions(node: Node) -> tuple[sympy.Expr, int]:
    """(the first token that a slice_scatter writes, how far apart they are)."""
    bound, (base, _, dim) = bound_of(node), _written(node)
    start = bound.get("start")
    size = base.meta["val"].shape[dim]
    return first_token(start, size_of(size), hint_of(size)), bound.get("step", 1)


def _put(node: Node) -> Put | None:
    """The elements that a slice_scatter replaces, where they are next to each other, and their place is a number."""
    base, part, dim = _written(node)
    start, step = _positions(node)
    size = part.meta["val"].shape[dim]
    if step != 1 or not start.is_Integer or not isinstance(size, int):
        return None
    return Put(dim, base, ((part, int(start), int(start) + size),))


def _axis_of_written(placement: Placed, node: Node, axis: Axis, dim: int) -> Axis | None:
    """x and the part are on axes of the same sequence."""
    base, part, _ = _written(node)
    inner = placement.axis_along(part, dim)
    aligned = (
        axis.units is None and inner is not None and inner.sequence is axis.sequence and placement.modes[part] is inner
    )
    return axis if aligned and placement.axis_along(base, dim) is axis else None


def _alone(placement: Placed, node: Node) -> bool:
    """Tokens are written into a dim of tokens alone, not into one of tokens merged with other dims."""
    bound = bound_of(node)
    dim = bound.get("dim", 0) % node.meta["val"].ndim
    factors = placement.sweep.dims(bound["self"])[dim]
    return len(factors) == 1 or not any(map(placement.is_axis, factors))


def _write_slice_scatter(writer: Writer, node: Node, axis: Axis) -> Node:
    """The local tokens of the part into those of x."""
    base, part, dim = _written(node)
    if node in writer.placement.slices:
        inner = writer.placement.axis_along(part, dim)
        assert inner is not None
        local, start = writer.sharded(part, inner), rows_before(writer, node, dim, axis, inner.offset)
        stop = writer.compute(operator.add, start, writer.length(inner))
        given = writer.sharded(base, axis), local, dim, start, stop
        return writer.emit(aten.slice_scatter.default, *given, name=node.name)
    if part.meta["val"].shape[dim] == base.meta["val"].shape[dim]:  # all of it, along whatever dim
        return writer.emit(aten.slice_scatter.default, *(writer.operand(n, axis, "") for n in (base, part)), dim)
    if writer.placement.axis_along(base, dim) is not axis:
        return same_call(writer, node, axis)
    first, step = _positions(node)
    count = writer.size(size_of(part.meta["val"].shape[dim]))
    positions = positions_from(writer, node, writer.size(first), step, count)
    rows = writer.operand(part, axis, "tokens written into others")
    return _write_rows(writer, node, axis, aten.index_copy.default, dim, positions, rows)


def _write_rows(
    writer: Writer, node: Node, axis: Axis, op: Any, dim: int, positions: Node, rows: Any, **kwargs: Any
) -> Node:
    """`op` of the local tokens of x, and of those of `rows` whose positions this rank holds.

    The others go into a row after the last one, which is dropped.
    """
    x = writer.sharded(bound_of(node)["self"], axis)
    length = writer.length(axis)
    room = writer.emit(aten.constant_pad_nd.default, x, [0, 0] * (x.meta["val"].ndim - 1 - dim) + [0, 1])
    held, at = located(writer, positions, axis)
    target = writer.emit(aten.where.ScalarOther, held, at, length)
    written = writer.emit(op, room, dim, target, rows, **kwargs)
    return writer.emit(aten.slice.Tensor, written, dim, 0, length, name=node.name)


def _scatter(sweep: Sweep, node: Node, note: Note) -> Dims | None:
    """x.scatter(dim, index, src): dims other than `dim` go together where all have the same size."""
    bound = bound_of(node)
    dim, x = bound["dim"], sweep.dims(bound["self"])
    others = [sweep.dims(n) for n in (bound["index"], bound.get("src")) if isinstance(n, Node)]
    if not x or any(len(d) != len(x) for d in others):
        return None
    dim %= len(x)
    out = []
    for d, factors in enumerate(x):
        columns = [factors, *(o[d] for o in others)]
        if d == dim or any(product(c) != product(factors) for c in columns):
            note.need_replication += [f for c in columns for f in c]
            out.append(factors)
        else:
            out.append(sweep.broadcast([(c,) for c in columns], note)[0])
    return tuple(out)


def _one_hot(sweep: Sweep, node: Node, note: Note) -> Dims | None:
    """The dims of the classes, and a new one; None: how many there are follows from the classes of all tokens."""
    classes = bound_of(node).get("num_classes", -1)
    if isinstance(classes, int) and classes < 0:
        return None
    return (*sweep.dims(first_of(node)), sweep.new(node.meta["val"].shape[-1]))


def _index_along(sweep: Sweep, node: Node, note: Note) -> Dims | None:
    """index_add, index_copy, index_fill: `index` counts along one dim of x and of the rows written."""
    bound = bound_of(node)
    x, rows = sweep.dims(bound["self"]), bound.get("source", bound.get("value"))
    parts = [x, sweep.dims(rows)] if isinstance(rows, Node) and sweep.dims(rows) else [x]
    if not x or any(len(p) != len(x) for p in parts):
        return None
    dim = bound["dim"] % len(x)
    note.need_replication += [f for p in parts[1:] for f in p[dim]]
    note.need_replication += [f for d in sweep.dims(bound["index"]) for f in d]
    return _with_dim(sweep, parts, dim, note)


def _write_index_along(writer: Writer, node: Node, axis: Axis) -> Node:
    """The rows into the local tokens that they are for."""
    bound = bound_of(node)
    dim = bound["dim"] % node.meta["val"].ndim
    if writer.placement.axis_along(bound["self"], dim) is not axis:
        return same_call(writer, node, axis)
    positions = writer.replicated(bound["index"], "positions")
    if not positions.meta["val"].ndim:
        positions = writer.emit(aten.unsqueeze.default, positions, 0)
    rows = bound.get("source", bound.get("value"))
    given = writer.operand(rows, axis, "rows") if isinstance(rows, Node) else rows
    named = {"alpha": bound["alpha"]} if "alpha" in bound else {}
    return _write_rows(writer, node, axis, node.target, dim, positions, given, **named)


def _diagonal_scatter(sweep: Sweep, node: Node, note: Note) -> Dims:
    """x with a diagonal replaced."""
    bound = bound_of(node)
    x, part = sweep.dims(bound["self"]), sweep.dims(bound["src"])
    pair = sorted((bound.get("dim1", 0) % len(x), bound.get("dim2", 1) % len(x)))
    note.need_replication += [*x[pair[0]], *x[pair[1]], *part[-1]]
    rest = [d for d in range(len(x)) if d not in pair]
    tied = sweep.broadcast([tuple(x[d] for d in rest), part[:-1]], note)
    out = list(x)
    for d, factors in zip(rest, tied, strict=True):
        out[d] = factors
    return tuple(out)


RULES = {
    "slice_scatter.default": OpRule(
        _slice_scatter, may_shard=_alone, slice_axis=_axis_of_written, puts=_put, write=_write_slice_scatter
    ),
    "diagonal_scatter.default": OpRule(_diagonal_scatter),
    "one_hot.default": OpRule(_one_hot),
    **dict.fromkeys((
        "scatter.src", "scatter.value", "scatter.reduce", "scatter.value_reduce", "scatter_add.default",
        "scatter_reduce.two",
    ), OpRule(_scatter)),
    **dict.fromkeys((
        "index_add.default", "index_copy.default", "index_fill.int_Scalar", "index_fill.int_Tensor",
    ), OpRule(_index_along, may_shard=_alone, write=_write_index_along)),
}  # fmt: skip
