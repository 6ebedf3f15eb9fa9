"""Reductions: the result of local tokens, combined over ranks.

    sum, mean, nansum, count_nonzero    reduce(the local sum); a mean divides by the full number of elements
    amax, amin, max, min, argmax, ..    ringpass.extremum, ringpass.first_extremum
    logsumexp                           m + log(reduce(sum(exp(x - m)))), m the largest over all ranks
    var, std, var_mean, std_mean        reduce(sum((x - mean) ** 2)) / (n - 1), mean the one over all ranks
    any, all, prod, norms               the same op over the results of all ranks

What has no such form (a norm of a negative order, ..) needs what it reduces replicated.

Contract: the result is replicated; sums are added in float32 (float64).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from ringpass import ops
from ringpass.layouts.layout import CONTIGUOUS
from ringpass.nodes import bound_of, first_of, op_name, size_of
from ringpass.passes.op_rules.along_dims import dims_of
from ringpass.passes.op_rules.spec import GraphSize, OpRule, Writer
from ringpass.passes.propagate.axis import Axis
from ringpass.passes.propagate.factors import Factors, Note, Results, Sweep
from ringpass.precision import accumulator

aten = torch.ops.aten


# --- dims -------------------------------------------------------------------------------------------------------------


def _reduced(sweep: Sweep, node: Node) -> tuple[Results, Factors]:
    """(dims of the result, the factors that are reduced)."""
    dims, reduced = sweep.dims(first_of(node)), dims_of(node)
    values = node.meta["val"] if isinstance(node.meta["val"], tuple | list) else [node.meta["val"]]
    keeps = values[0].ndim == len(dims)
    out = tuple(() if d in reduced else f for d, f in enumerate(dims) if keeps or d not in reduced)
    factors = tuple(f for d in reduced for f in dims[d])
    return out if isinstance(node.meta["val"], Tensor) else (out,) * len(values), factors


def _combines(node: Node) -> bool:
    """Whether the results of local tokens give the result of all."""
    x, name = first_of(node).meta["val"], op_name(node)
    if "norm" in name:
        order = _order(node)
        return order > 0 or order == -torch.inf
    if name.startswith(("var", "std")):
        return not x.is_complex() and _correction(node) in (0, 1)
    return not x.is_complex() or name.startswith(("any", "all", "count_nonzero"))


def _reduction(sweep: Sweep, node: Node, note: Note) -> Results:
    out, factors = _reduced(sweep, node)
    (note.reduction if _combines(node) else note.need_replication).extend(factors)
    return out


# --- what results are combined of -------------------------------------------------------------------------------------


def _keeps(node: Node) -> bool:
    """Whether the reduced dims stay, with size 1."""
    return bool(bound_of(node).get("keepdim", False))


def _operand(writer: Writer, node: Node, axis: Axis, dtype: torch.dtype | None = None) -> Node:
    """The local tokens that are reduced, in `dtype`."""
    x = writer.operand(first_of(node), axis, f"operand of {op_name(node)}")
    assert isinstance(x, Node)
    return x if dtype in (None, x.meta["val"].dtype) else writer.emit(aten.to.dtype, x, dtype)


def _cast(writer: Writer, node: Node, result: Node, index: int = 0) -> Node:
    """`result` in the dtype of the op's result of that index."""
    values = node.meta["val"]
    dtype = (values if isinstance(values, Tensor) else values[index]).dtype
    return result if result.meta["val"].dtype == dtype else writer.emit(aten.to.dtype, result, dtype)


def _sum(writer: Writer, node: Node, x: Node, keepdim: bool, name: str) -> Node:
    """The sum of `x` over the dims that `node` reduces and over the ranks."""
    part = writer.emit(aten.sum.dim_IntList, x, dims_of(node), keepdim, dtype=x.meta["val"].dtype)
    return writer.emit(ops.reduce, part, writer.rank.group, name=name)


def _count(writer: Writer, node: Node) -> GraphSize:
    """The full number of elements that each element of the result is made of."""
    shape = first_of(node).meta["val"].shape
    return writer.size(sympy.prod([size_of(shape[d]) for d in dims_of(node)]))


def _of_ranks(writer: Writer, part: Node) -> Node:
    """The results of all ranks, as (P, ..)."""
    world, rank = writer.rank.world, writer.rank.rank
    mine = writer.emit(aten.unsqueeze.default, part, 0)
    return writer.emit(ops.gather, mine, 0, 1, world, CONTIGUOUS, world, rank, writer.rank.group)


# --- sums -------------------------------------------------------------------------------------------------------------


def _write_sum(writer: Writer, node: Node, axis: Axis) -> Node:
    """The sum of local tokens, added over ranks.  A mean divides by the full number of elements."""
    result = node.meta["val"].dtype
    dtype = accumulator(result) if result.is_floating_point else result
    op = aten.nansum.default if op_name(node).startswith("nansum") else aten.sum.dim_IntList
    x = _operand(writer, node, axis)
    part = writer.emit(op, x, dims_of(node), _keeps(node), dtype=dtype, name=node.name)
    total = writer.emit(ops.reduce, part, writer.rank.group, name=f"{node.name}_reduced")
    if op_name(node).startswith("mean"):
        total = writer.emit(aten.div.Tensor, total, _count(writer, node), name=f"{node.name}_mean")
    return _cast(writer, node, total)


def _write_count_nonzero(writer: Writer, node: Node, axis: Axis) -> Node:
    part = writer.emit(aten.count_nonzero.dim_IntList, _operand(writer, node, axis), dims_of(node), name=node.name)
    return writer.emit(ops.reduce, part, writer.rank.group, name=f"{node.name}_reduced")


# --- the same op over the results of ranks ----------------------------------------------------------------------------


def _write_truth(writer: Writer, node: Node, axis: Axis) -> Node:
    """any, all."""
    op = (aten.any if op_name(node).startswith("any") else aten.all).dims
    part = writer.emit(op, _operand(writer, node, axis), dims_of(node), _keeps(node), name=node.name)
    return writer.emit(op, _of_ranks(writer, part), [0], name=f"{node.name}_of_ranks")


def _write_prod(writer: Writer, node: Node, axis: Axis) -> Node:
    result = node.meta["val"].dtype
    x = _operand(writer, node, axis, accumulator(result) if result.is_floating_point else result)
    along = [dims_of(node)[0], _keeps(node)] if op_name(node) == "prod.dim_int" else []
    part = writer.emit(aten.prod.dim_int if along else aten.prod.default, x, *along, name=node.name)
    return _cast(writer, node, writer.emit(aten.prod.dim_int, _of_ranks(writer, part), 0))


def _order(node: Node) -> float:
    """The order of a vector norm."""
    bound = bound_of(node)
    order = bound.get("ord", bound.get("p", 2))
    return 2.0 if order is None else float(order)


def _write_norm(writer: Writer, node: Node, axis: Axis) -> Node:
    """The norm of the norms of all ranks; an infinite one is the largest or smallest absolute value."""
    order, result = _order(node), node.meta["val"].dtype
    if order in (torch.inf, -torch.inf):
        absolute = writer.emit(aten.abs.default, _operand(writer, node, axis))
        return _cast(writer, node, _extremum(writer, node, absolute, order > 0, _keeps(node)))
    norm, x = aten.linalg_vector_norm.default, _operand(writer, node, axis)
    dtype = accumulator(result) if not x.meta["val"].is_complex() else None
    part = writer.emit(norm, x, order, dims_of(node), _keeps(node), dtype=dtype, name=node.name)
    return _cast(writer, node, writer.emit(norm, _of_ranks(writer, part), order, [0]))


# --- extremes ---------------------------------------------------------------------------------------------------------


def _extremum(writer: Writer, node: Node, x: Node, largest: bool, keepdim: bool) -> Node:
    rank = writer.rank
    return writer.emit(ops.extremum, x, dims_of(node), keepdim, largest, rank.world, rank.rank, rank.group)


def _write_extremum(writer: Writer, node: Node, axis: Axis) -> Node:
    """amax, amin, and max, min over all elements."""
    largest = "max" in op_name(node)
    return _extremum(writer, node, _operand(writer, node, axis), largest, _keeps(node))


def _write_extremes(writer: Writer, node: Node, axis: Axis) -> tuple[Node, Node]:
    """aminmax."""
    x = _operand(writer, node, axis)
    low, high = (_extremum(writer, node, x, largest, _keeps(node)) for largest in (False, True))
    return low, high


def _write_first(writer: Writer, node: Node, axis: Axis) -> tuple[Node, Node]:
    """max, min along a dim: (values, indices)."""
    (dim,) = dims_of(node)
    shard = writer.shard_args(first_of(node), axis)
    size = writer.size(size_of(first_of(node).meta["val"].shape[dim]))
    return _first(writer, node, _operand(writer, node, axis), (*shard, size), _keeps(node))


def _first(writer: Writer, node: Node, x: Node, where: tuple[Any, ...], keepdim: bool) -> tuple[Node, Node]:
    largest = "max" in op_name(node)
    found = writer.emit(ops.first_extremum, x, largest, *where, writer.rank.group, name=node.name)
    value, index = (writer.emit(operator.getitem, found, i) for i in (0, 1))
    if keepdim:
        value, index = (writer.emit(aten.unsqueeze.default, one, where[0]) for one in (value, index))
    return value, index


def _write_argument(writer: Writer, node: Node, axis: Axis) -> Node:
    """argmax, argmin along a dim, or of all elements in a row."""
    x, source = _operand(writer, node, axis), first_of(node).meta["val"]
    if bound_of(node).get("dim") is not None:
        return _write_first(writer, node, axis)[1]
    shard = writer.shard_args(first_of(node), axis)
    before = writer.size(sympy.prod([size_of(n) for n in source.shape[: shard.dim]]))
    outer = writer.compute(operator.mul, before, shard.outer)
    size = writer.size(sympy.prod([size_of(n) for n in source.shape]))
    row = writer.emit(aten.view.default, writer.emit(aten.contiguous.default, x), [-1])
    index = _first(writer, node, row, (*shard._replace(dim=0, outer=outer), size), False)[1]
    return writer.emit(aten.view.default, index, [1] * source.ndim) if _keeps(node) else index


# --- logsumexp, variance ----------------------------------------------------------------------------------------------


def _write_logsumexp(writer: Writer, node: Node, axis: Axis) -> Node:
    x = _operand(writer, node, axis, accumulator(node.meta["val"].dtype))
    largest = _extremum(writer, node, writer.emit(aten.detach.default, x), True, True)
    infinite = writer.emit(aten.isinf.default, largest)
    largest = writer.emit(aten.where.ScalarSelf, infinite, 0.0, largest)
    shifted = writer.emit(aten.exp.default, writer.emit(aten.sub.Tensor, x, largest))
    total = writer.emit(aten.log.default, _sum(writer, node, shifted, True, f"{node.name}_reduced"))
    result = writer.emit(aten.add.Tensor, total, largest)
    return _cast(writer, node, result if _keeps(node) else writer.emit(aten.squeeze.dims, result, dims_of(node)))


def _correction(node: Node) -> float:
    """What a variance subtracts from the number of elements."""
    bound = bound_of(node)
    given = bound.get("correction", int(bound.get("unbiased", True)))
    return 1 if given is None else given


def _write_variance(writer: Writer, node: Node, axis: Axis) -> Node | tuple[Node, ...]:
    """var, std, var_mean, std_mean.  The mean is a constant for the variance: it has no gradient there."""
    values, name = node.meta["val"], op_name(node)
    dtype = accumulator((values if isinstance(values, Tensor) else values[0]).dtype)
    x, count = _operand(writer, node, axis, dtype), _count(writer, node)
    mean = writer.emit(aten.div.Tensor, _sum(writer, node, x, True, f"{node.name}_sum"), count)
    deviation = writer.emit(aten.sub.Tensor, x, writer.emit(aten.detach.default, mean))
    squares = _sum(writer, node, writer.emit(aten.mul.Tensor, deviation, deviation), True, f"{node.name}_squares")
    degrees = writer.compute(lambda n: n - int(_correction(node)), count)
    spread = writer.emit(aten.div.Tensor, squares, degrees)
    spread = _root(writer, spread) if name.startswith("std") else spread
    results = [spread] if isinstance(values, Tensor) else [spread, mean]
    if not _keeps(node):
        results = [writer.emit(aten.squeeze.dims, one, dims_of(node)) for one in results]
    results = [_cast(writer, node, one, i) for i, one in enumerate(results)]
    return results[0] if isinstance(values, Tensor) else tuple(results)


def _root(writer: Writer, x: Node) -> Node:
    """The square root, whose gradient at 0 is 0, as that of torch.std."""
    zero = writer.emit(aten.eq.Scalar, x, 0)
    root = writer.emit(aten.sqrt.default, writer.emit(aten.where.ScalarSelf, zero, 1.0, x))
    return writer.emit(aten.where.ScalarSelf, zero, 0.0, root)


Reduce = Callable[[Writer, Node, Axis], Node | tuple[Node, ...]]
WRITES: dict[Reduce, tuple[str, ...]] = {
    _write_sum: ("sum.dim_IntList", "sum.default", "mean.dim", "mean.default", "nansum.default"),
    _write_count_nonzero: ("count_nonzero.default", "count_nonzero.dim_IntList"),
    _write_truth: ("any.default", "any.dim", "any.dims", "all.default", "all.dim", "all.dims"),
    _write_prod: ("prod.default", "prod.dim_int"),
    _write_norm: (
        "linalg_vector_norm.default", "norm.Scalar", "norm.ScalarOpt_dim", "norm.ScalarOpt_dim_dtype",
        "norm.ScalarOpt_dtype",
    ),
    _write_extremum: ("amax.default", "amin.default", "max.default", "min.default"),
    _write_extremes: ("aminmax.default",),
    _write_first: ("max.dim", "min.dim"),
    _write_argument: ("argmax.default", "argmin.default"),
    _write_logsumexp: ("logsumexp.default",),
    _write_variance: tuple(
        f"{name}.{form}" for name in ("var", "std", "var_mean", "std_mean") for form in ("default", "dim", "correction")
    ),
}  # fmt: skip
"""How each op is written."""
RULES = {name: OpRule(_reduction, reduce=write) for write, names in WRITES.items() for name in names}
