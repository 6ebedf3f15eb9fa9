"""Ops that rearrange dims and elements: views, transposes, splits, results of several values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch.fx import Node

from ringpass.nodes import args_of, bound_of, first_of, op_name, operands_of, size_of
from ringpass.passes.op_rules.spec import OpRule, Put, Writer
from ringpass.passes.propagate.axis import Axis
from ringpass.passes.propagate.factors import Dims, Note, Results, Sweep

aten = torch.ops.aten


# --- views ------------------------------------------------------------------------------------------------------------


def _view(sweep: Sweep, node: Node, note: Note) -> Dims:
    return sweep.reshape(sweep.dims(first_of(node)), node.meta["val"].shape, note)


def _write_view(writer: Writer, node: Node, axis: Axis) -> Node:
    """The view at the local size."""
    args, _ = writer.operands(node, axis, f"operand of {op_name(node)}")
    return writer.emit(aten.reshape.default, args[0], writer.local_shape(node, axis), name=node.name)


def _expand(sweep: Sweep, node: Node, note: Note) -> Dims:
    dims, shape = sweep.dims(first_of(node)), node.meta["val"].shape
    dims = ((),) * (len(shape) - len(dims)) + dims
    return tuple(d if d else sweep.new(n) for d, n in zip(dims, shape, strict=True))


def _write_expand(writer: Writer, node: Node, axis: Axis) -> Node:
    args, kwargs = writer.operands(node, axis, f"operand of {op_name(node)}")
    return writer.copy(node, (args[0], writer.local_shape(node, axis), *args[2:]), kwargs)


def _unsqueeze(sweep: Sweep, node: Node, note: Note) -> Dims:
    dims = list(sweep.dims(first_of(node)))
    dims.insert(args_of(node)[1] % (len(dims) + 1), ())
    return tuple(dims)


def _as_complex(sweep: Sweep, node: Node, note: Note) -> Dims:
    """Pairs in the last dim are one number."""
    *dims, pairs = sweep.dims(first_of(node))
    note.need_replication += pairs
    return tuple(dims)


def _as_real(sweep: Sweep, node: Node, note: Note) -> Dims:
    return (*sweep.dims(first_of(node)), sweep.new(2))


# --- permutations of dims ---------------------------------------------------------------------------------------------


def _permuted(order: Callable[[Node, int], list[int]]) -> OpRule:
    """An op whose result has its operand's dims in another order."""

    def dims_rule(sweep: Sweep, node: Node, note: Note) -> Dims:
        dims = sweep.dims(first_of(node))
        return tuple(dims[d] for d in order(node, len(dims)))

    return OpRule(dims_rule)


def _swapped(node: Node, rank: int) -> list[int]:
    args, order = args_of(node), list(range(rank))
    a, b = (args[1], args[2]) if len(args) > 2 else (0, rank - 1)
    order[a], order[b] = order[b], order[a]
    return order


# --- splits and stacks along other dims -------------------------------------------------------------------------------


def _split(sweep: Sweep, node: Node, note: Note) -> tuple[Dims, ...]:
    """split, chunk: the dim is needed replicated, the others pass."""
    dims = list(sweep.dims(first_of(node)))
    dim = bound_of(node).get("dim", 0) % len(dims)
    values = node.meta["val"]
    if len(values) == 1:
        return (tuple(dims),)
    note.need_replication += dims[dim]
    return tuple((*dims[:dim], sweep.new(v.shape[dim]), *dims[dim + 1 :]) for v in values)


def _unbind(sweep: Sweep, node: Node, note: Note) -> tuple[Dims, ...]:
    dims = list(sweep.dims(first_of(node)))
    note.need_replication += dims.pop(bound_of(node).get("dim", 0) % len(dims))
    return (tuple(dims),) * len(node.meta["val"])


def _stack(sweep: Sweep, node: Node, note: Note) -> Dims:
    dims = list(sweep.broadcast([sweep.dims(n) for n in operands_of(node)], note))
    dim = bound_of(node).get("dim", 0)
    dims.insert(dim % (len(dims) + 1), sweep.new(node.meta["val"].shape[dim]))
    return tuple(dims)


def _stacked(node: Node) -> Put:
    """Each of its operands, an element of the new dim."""
    parts = args_of(node)[0]
    dim = bound_of(node).get("dim", 0) % node.meta["val"].ndim
    return Put(dim, None, tuple((part, i, i + 1) for i, part in enumerate(parts)))


def _repeat_interleave(sweep: Sweep, node: Node, note: Note) -> Dims | None:
    """Repeated K/V heads: each index, that many times; None: of all elements."""
    x, bound = first_of(node), bound_of(node)
    dims, dim = list(sweep.dims(x)), bound.get("dim")
    if dim is None:
        return None
    times = sympy.cancel(size_of(node.meta["val"].shape[dim]) / size_of(x.meta["val"].shape[dim] or 1))
    dims[dim] = (*dims[dim], *sweep.fresh_sizes(times))
    return tuple(dims)


def _write_repeat_interleave(writer: Writer, node: Node, axis: Axis) -> Node:
    """Local elements repeated; the op may have been told the size of all of its result."""
    given = writer.operands_by_name(node, axis, f"operand of {op_name(node)}")
    return writer.emit_by_name(node.target, {k: x for k, x in given.items() if k != "output_size"}, node.name)


def _repeat(sweep: Sweep, node: Node, note: Note) -> Dims:
    """A dim that is repeated is (the repetition, its index); new dims come first."""
    dims, times = sweep.dims(first_of(node)), [size_of(n) for n in _sizes(args_of(node)[1])]
    dims = ((),) * (len(times) - len(dims)) + dims
    return tuple((*sweep.fresh_sizes(n), *d) for n, d in zip(times, dims, strict=True))


def _sizes(given: Any) -> list[Any]:
    """Sizes among arguments: numbers, symbolic ones too."""
    return [n.meta["val"] if isinstance(n, Node) else n for n in given]


def _getitem(sweep: Sweep, node: Node, note: Note) -> Results:
    value = sweep.values[first_of(node)][node.args[1]]
    if isinstance(node.meta["val"], torch.Tensor):
        return tuple(sweep.resolve(d) for d in value)
    return tuple(value)  # a list among several results


VIEW = OpRule(_view, view=True, write=_write_view)
RULES = {
    **dict.fromkeys((
        "view.default", "reshape.default", "_unsafe_view.default", "flatten.using_ints", "unflatten.int",
        "view_as.default", "reshape_as.default",
    ), VIEW),
    **dict.fromkeys(("squeeze.dim", "squeeze.dims", "squeeze.default"), VIEW),  # a rank may have one token
    "expand.default": OpRule(_expand, expands=True, write=_write_expand),
    "unsqueeze.default": OpRule(_unsqueeze),
    "view_as_complex.default": OpRule(_as_complex),
    "view_as_real.default": OpRule(_as_real),
    **dict.fromkeys(("transpose.int", "t.default"), _permuted(_swapped)),
    "numpy_T.default": _permuted(lambda node, rank: [*reversed(range(rank))]),
    "mT.default": _permuted(lambda node, rank: [*range(rank - 2), rank - 1, rank - 2]),
    "permute.default": _permuted(lambda node, rank: [d % rank for d in args_of(node)[1]]),
    **dict.fromkeys(("split.Tensor", "split_with_sizes.default", "chunk.default"), OpRule(_split)),
    "unbind.int": OpRule(_unbind),
    "stack.default": OpRule(_stack, puts=_stacked),
    "repeat_interleave.self_int": OpRule(_repeat_interleave, write=_write_repeat_interleave),
    "repeat.default": OpRule(_repeat),
    "getitem": OpRule(_getitem, follows=True),
}  # fmt: skip
