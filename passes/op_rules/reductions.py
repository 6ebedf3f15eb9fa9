"""Reductions and losses.

    sum(x)            = reduce(sum(x_local))
    mean(x)           = reduce(sum(x_local)) / the full number of elements
    cross_entropy     = reduce(the local sum) / reduce(the number of local targets that count)

Reductions that are no sums (max, var, ..) need what they reduce replicated.

Contract: the result is replicated; sums are added in float32 (float64).
"""

from __future__ import annotations

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from ringpass import ops
from ringpass.nodes import bound_of, first_of, op_name, size_of
from ringpass.passes.op_rules.along_dims import dims_of
from ringpass.passes.op_rules.spec import OpRule, Writer
from ringpass.passes.propagate.axis import Axis
from ringpass.passes.propagate.factors import Factors, Note, Results, Sweep
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
    dtype = accumulator(result.dtype) if result.is_floating_point() else result.dtype
    part = writer.emit(aten.sum.dim_IntList, args[0], dims, keepdim, dtype=dtype, name=node.name)
    total = writer.emit(ops.reduce, part, writer.rank.group, name=f"{node.name}_reduced")
    if op_name(node).startswith("mean"):
        count = writer.size(sympy.prod([size_of(value.shape[d]) for d in dims]))
        total = writer.emit(aten.div.Tensor, total, count, name=f"{node.name}_mean")
    return total if total.meta["val"].dtype == result.dtype else writer.emit(aten.to.dtype, total, result.dtype)


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
}  # fmt: skip
