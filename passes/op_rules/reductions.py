"""Reductions and losses.

    sum(x)            = reduce(sum(x_local))
    mean(x)           = reduce(sum(x_local)) / the full number of elements
    cross_entropy     = reduce(the local sum) / reduce(the number of local targets that count)

Reductions that are no sums (max, var, ..) need what they reduce replicated.

Contract: the result is replicated; sums are added in float32 (float64).
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from ringpass import ops
from ringpass.nodes import args_of, bound_of, first_of, op_name, operands_of, size_of
from ringpass.passes.op_rules.along_dims import dims_of
from ringpass.passes.op_rules.spec import OpRule, Writer
from ringpass.passes.propagate.axis import Axis
from ringpass.passes.propagate.factors import Dims, Factors, Note, Results, Sweep
from ringpass.precision import accumulator

aten = torch.ops.aten
SUM = 2  # the `reduction` of a loss that is a sum; 1 is a mean, 0 none


# --- reductions -------------------------------------------------------------------------------------------------------


def _reduced(sweep: Sweep, node: Node) -> tuple[Results, Factors]:
    """(dims of the result, the factors that are reduced)."""
    dims, reduced = sweep.dims(first_of(node)), dims_of(node)
    values = node.meta["val"] if isinstance(node.meta["val"], tuple | list) else [node.meta["val"]]
    keeps = values[0].ndim == len(dims)
    out = tuple(() if d in reduced else f for d, f in enumerate(dims) if keeps or d not in reduced)
    factors = tuple(f for d in reduced for f in dims[d])
    return out if isinstance(node.meta["val"], Tensor) else (out,) * len(values), factors


def _reduction(sweep: Sweep, node: Node, note: Note) -> Results:
    out, factors = _reduced(sweep, node)
    note.need_replication += factors
    return out


def _sum(sweep: Sweep, node: Node, note: Note) -> Results:
    out, factors = _reduced(sweep, node)
    note.reduction += factors
    return out


def _write_sum(writer: Writer, node: Node, axis: Axis) -> Node:
    """The sum of local tokens, added over ranks.  A mean divides by the full number of elements."""
    args, _ = writer.operands(node, axis, f"operand of {op_name(node)}")
    value, result = first_of(node).meta["val"], node.meta["val"]
    dims, keepdim = dims_of(node), bound_of(node).get("keepdim", False)
    dtype = accumulator(result.dtype)
    part = writer.emit(aten.sum.dim_IntList, args[0], dims, keepdim, dtype=dtype, name=node.name)
    total = writer.emit(ops.reduce, part, writer.rank.group, name=f"{node.name}_reduced")
    if op_name(node).startswith("mean"):
        count = writer.size(sympy.prod([size_of(value.shape[d]) for d in dims]))
        total = writer.emit(aten.div.Tensor, total, count, name=f"{node.name}_mean")
    return total if total.meta["val"].dtype == result.dtype else writer.emit(aten.to.dtype, total, result.dtype)


# --- losses -----------------------------------------------------------------------------------------------------------


def _loss(sweep: Sweep, node: Node, note: Note) -> Dims:
    """A pointwise loss: its mean or sum is over every dim."""
    dims = sweep.broadcast([sweep.dims(n) for n in operands_of(node)], note)
    if bound_of(node).get("reduction", 1) == 0:
        return dims
    note.reduction += [f for d in dims for f in d]
    return ()


def _cross_entropy(sweep: Sweep, node: Node, note: Note) -> Dims | None:
    """Logits (N, C) or (C), targets (N): the class dim is needed replicated, the mean or sum is over N."""
    logits, target = (sweep.dims(n) for n in args_of(node)[:2])
    if len(logits) != 2 or len(target) != 1:
        return None
    note.need_replication += logits[1]
    rows = sweep.tie(logits[0], target[0], note) if logits[0] and target[0] else logits[0]
    if bound_of(node).get("reduction", 1) == 0:
        return (rows,)
    note.reduction += rows
    return ()


def _summed_loss(writer: Writer, node: Node, axis: Axis) -> tuple[dict[str, Any], Node]:
    """The arguments of a loss by name, and its sum over all tokens."""
    bound = writer.operands_by_name(node, axis, "loss")
    part = writer.emit_by_name(node.target, {**bound, "reduction": SUM}, node.name)
    return bound, writer.emit(ops.reduce, part, writer.rank.group, name=f"{node.name}_reduced")


def _write_loss(writer: Writer, node: Node, axis: Axis) -> Node:
    """The local sum of a pointwise loss, reduced; a mean divides by the full number of elements."""
    bound, total = _summed_loss(writer, node, axis)
    if bound.get("reduction", 1) == SUM:
        return total
    shapes = [a.meta["val"].shape for a in node.args[:2] if isinstance(a, Node)]
    count = writer.size(sympy.prod([size_of(n) for n in torch.broadcast_shapes(*shapes)]))
    return writer.emit(aten.div.Tensor, total, count, name=f"{node.name}_mean")


def _write_cross_entropy(writer: Writer, node: Node, axis: Axis) -> Node:
    """The local sum, reduced; a mean divides by the number (weight) of targets that count."""
    bound, total = _summed_loss(writer, node, axis)
    if bound.get("reduction", 1) == SUM:
        return total
    target, weight, ignored = bound["target"], bound.get("weight"), bound.get("ignore_index", -100)
    counted = writer.emit(aten.ne.Scalar, target, ignored)
    if weight is not None:
        safe = writer.emit(aten.where.ScalarOther, counted, target, 0)
        weights = writer.emit(aten.index.Tensor, weight, [safe])
        counted = writer.emit(aten.where.ScalarOther, counted, weights, 0.0)
    part = writer.emit(aten.sum.default, counted)
    count = writer.emit(ops.reduce, part, writer.rank.group, name=f"{node.name}_targets")
    return writer.emit(aten.div.Tensor, total, count, name=f"{node.name}_mean")


RULES = {
    **dict.fromkeys(
        ("sum.dim_IntList", "sum.default", "mean.dim", "mean.default"), OpRule(_sum, reduce=_write_sum)
    ),
    **dict.fromkeys((
        "amax.default", "amin.default", "any.dim", "all.dim", "argmax.default", "argmin.default", "max.dim", "min.dim",
        "var.correction", "std.correction", "logsumexp.default", "prod.dim_int", "any.default", "all.default",
        "max.default", "min.default", "var.dim", "norm.ScalarOpt_dim", "linalg_vector_norm.default", "std.dim",
        "var_mean.correction", "std_mean.correction",
    ), OpRule(_reduction)),
    **dict.fromkeys((
        "mse_loss.default", "l1_loss.default", "smooth_l1_loss.default", "huber_loss.default",
        "soft_margin_loss.default", "kl_div.default", "binary_cross_entropy.default",
        "binary_cross_entropy_with_logits.default",
    ), OpRule(_loss, reduce=_write_loss)),
    "cross_entropy_loss.default": OpRule(_cross_entropy, reduce=_write_cross_entropy),
}  # fmt: skip
