"""Ops that pick elements: a few tokens of a sharded value become replicated, without moving the others.

x[:, 0]               each rank looks up where it holds token 0; the one that does gives it, the others give zeros;
x[:, -3:]             the sum over ranks is the tokens
x[arange(B), last]    the same with positions that are data, as in x.gather(1, positions)
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from ringpass import ops
from ringpass.nodes import args_of, bound_of, first_of, hint_of, operands_of, size_of, slice_of
from ringpass.passes.op_rules import routing
from ringpass.passes.op_rules.spec import GraphSize, OpRule, Writer
from ringpass.passes.propagate.axis import Axis
from ringpass.passes.propagate.factors import Dims, Note, Sweep, product

aten = torch.ops.aten


# --- dims -------------------------------------------------------------------------------------------------------------


def _select(sweep: Sweep, node: Node, note: Note) -> Dims:
    dims = list(sweep.dims(first_of(node)))
    note.need_replication += dims.pop(args_of(node)[1])
    return tuple(dims)


def _selected(node: Node) -> tuple[int, int, int] | None:
    """The element that a select takes, where its place is a number."""
    shape, (_, dim, position, *_) = first_of(node).meta["val"].shape, args_of(node)
    size = shape[dim]
    if type(position) is not int or not isinstance(size, int):
        return None
    return dim % len(shape), position % size, position % size + 1


def _index(sweep: Sweep, node: Node, note: Note) -> Dims | None:
    """x[i, j, ..]: the indexed dims are needed replicated, the index tensors' dims stand in their place."""
    source, picks = sweep.dims(first_of(node)), list(args_of(node)[1])
    if len(picks) == 1 and (dims := routing.picked(sweep, first_of(node), picks[0])) is not None:
        return dims
    at = [d for d, p in enumerate(picks) if p is not None]
    if at != list(range(at[0], at[-1] + 1)) or any(picks[d].meta["val"].dtype == torch.bool for d in at):
        return None
    note.need_replication += [f for d in at for f in source[d]]
    inner = sweep.broadcast([sweep.dims(picks[d]) for d in at], note)
    return (*source[: at[0]], *inner, *source[at[-1] + 1 :])


def _gather(sweep: Sweep, node: Node, note: Note) -> Dims:
    """x.gather(dim, index): of index's shape; other dims where both have the same size go together."""
    source, picks = (sweep.dims(n) for n in operands_of(node))
    dim = args_of(node)[1] % len(picks)
    out = []
    for d, (f, g) in enumerate(zip(source, picks, strict=True)):
        if d == dim or product(f) != product(g):
            note.need_replication += (*f, *g) if d != dim else f
            out.append(g)
        else:
            out.append(sweep.tie(f, g, note) if f else g)
    return tuple(out)


def _index_select(sweep: Sweep, node: Node, note: Note) -> Dims | None:
    """index_select(x, dim, index): the dim is needed replicated, the index's stands in its place."""
    x, dim, picks = args_of(node)
    dims, (at,) = list(sweep.dims(x)), sweep.dims(picks) or ((),)
    if not dims:
        return None
    note.need_replication += dims[dim]
    dims[dim] = at
    return tuple(dims)


def _topk(sweep: Sweep, node: Node, note: Note) -> tuple[Dims, ...]:
    """Values and indices: the dim is needed replicated, the others pass."""
    dims = list(sweep.dims(first_of(node)))
    dim = bound_of(node).get("dim", -1) % len(dims)
    note.need_replication += dims[dim]
    dims[dim] = sweep.new(node.meta["val"][0].shape[dim])
    return (tuple(dims),) * 2


# --- a few tokens of a shard ------------------------------------------------------------------------------------------


def select_tokens(writer: Writer, x: Node, dim: int, axis: Axis, positions: Node, name: str, samples: int = 1) -> Node:
    """The tokens at `positions` (n,), along `dim` of the shard `x`, each from the rank that holds it.

    `samples`: how many sequences stand one after the other in that dim.
    """
    held, at = located(writer, positions, axis, samples)
    part = writer.emit(aten.index_select.default, x, dim, at, name=name)
    held = writer.emit(aten.view.default, held, [-1] + [1] * (x.meta["val"].ndim - dim - 1))
    return _from_holders(writer, part, held)


def positions_from(writer: Writer, node: Node, start: GraphSize, step: int, count: GraphSize) -> Node:
    """start, start + step, ..: (count,) positions, on the device of `node`."""
    first = writer.emit(aten.arange.default, count, device=node.meta["val"].device)
    scaled = writer.emit(aten.mul.Tensor, first, step) if step != 1 else first
    return writer.emit(aten.add.Tensor, scaled, start)


def write_slice(writer: Writer, node: Node, x: Node, dim: int, axis: Axis) -> Node | None:
    """x[:, a:b:c] along `dim` of the shard `x`, replicated; None where the bounds are not plain numbers."""
    along, start, _, step = slice_of(node)
    count = writer.size(size_of(node.meta["val"].shape[dim]))
    start = start or 0
    if along != dim or not all(type(n) is int for n in (start, step)):
        return None
    positions = positions_from(writer, node, start, step, count)
    return select_tokens(writer, x, dim, axis, positions, node.name, _samples(node, dim, axis))


def _write_select(writer: Writer, node: Node, x: Node, dim: int, axis: Axis) -> Node | None:
    """x[:, i]; None where i is not a plain number."""
    along, position = args_of(node)[1] % first_of(node).meta["val"].ndim, args_of(node)[2]
    if along != dim or type(position) is not int:
        return None
    positions = positions_from(writer, node, position, 1, 1)
    return writer.emit(
        aten.squeeze.dim, select_tokens(writer, x, dim, axis, positions, node.name, _samples(node, dim, axis)), dim
    )


def _write_index_select(writer: Writer, node: Node, x: Node, dim: int, axis: Axis) -> Node | None:
    _, along, positions, *_ = args_of(node)
    if along % first_of(node).meta["val"].ndim != dim:
        return None
    return select_tokens(
        writer, x, dim, axis, writer.replicated(positions, "positions"), node.name, _samples(node, dim, axis)
    )


def _write_index(writer: Writer, node: Node, x: Node, dim: int, axis: Axis) -> Node | None:
    """x[.., positions, ..] with integer positions along the sequence, and others before or after them."""
    picks = list(args_of(node)[1])
    if dim >= len(picks) or picks[dim] is None or any(writer.is_sharded(p) for p in picks if p is not None):
        return None
    given = [None if p is None else writer.replicated(p, "positions") for p in picks]
    held, given[dim] = located(writer, writer.replicated(picks[dim], "positions"), axis, _samples(node, dim, axis))
    part = writer.emit(aten.index.Tensor, x, given, name=node.name)
    after = x.meta["val"].ndim - len(picks) + sum(p is None for p in picks[dim:])
    held = writer.emit(aten.view.default, held, [*held.meta["val"].shape, *[1] * after])
    return _from_holders(writer, part, held)


def _write_gather(writer: Writer, node: Node, x: Node, dim: int, axis: Axis) -> Node | None:
    """x.gather(1, index) along the sequence."""
    _, along, index, *_ = args_of(node)
    if along % first_of(node).meta["val"].ndim != dim or _samples(node, dim, axis) > 1:
        return None
    held, at = located(writer, writer.replicated(index, "positions"), axis)
    return _from_holders(writer, writer.emit(aten.gather.default, x, dim, at, name=node.name), held)


def located(writer: Writer, positions: Node, axis: Axis, samples: int = 1) -> tuple[Node, Node]:
    """Whether this rank holds the token at each of `positions`, and its row here (of its sample the first where it does
    not)."""
    where = axis.layout.name, writer.rank.world, writer.rank.rank
    rows = writer.emit(ops.locate, positions, writer.tokens(axis), *where, name=f"{positions.name}_rows")
    held, at = writer.emit(aten.ge.Scalar, rows, 0), writer.emit(aten.clamp_min.default, rows, 0)
    if samples > 1:
        tokens = writer.tokens(axis)
        row = writer.emit(aten.remainder.Scalar, positions, writer.compute(operator.mul, tokens, samples))
        sample = writer.emit(aten.div.Scalar_mode, row, tokens, rounding_mode="floor")
        at = writer.emit(aten.add.Tensor, at, writer.emit(aten.mul.Tensor, sample, writer.length(axis)))
    return held, at


def _samples(node: Node, dim: int, axis: Axis) -> int:
    """How many sequences stand one after the other along `dim` of what `node` takes tokens of."""
    return hint_of(first_of(node).meta["val"].shape[dim]) // axis.hint


def _from_holders(writer: Writer, part: Node, held: Node) -> Node:
    """The tokens, from the rank that holds each of them."""
    mine = writer.emit(aten.where.ScalarOther, held, part, 0)
    return writer.emit(ops.reduce, mine, writer.rank.group, name=f"{part.name}_taken")


RULES = {
    "select.int": OpRule(_select, takes_part=_selected, select=_write_select),
    "index.Tensor": OpRule(_index, select=_write_index),
    "index_select.default": OpRule(_index_select, select=_write_index_select),
    "gather.default": OpRule(_gather, select=_write_gather),
    "topk.default": OpRule(_topk),
}
