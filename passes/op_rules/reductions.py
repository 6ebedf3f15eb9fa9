"""sums: an op that sums over the sequence -> its local part, added over ranks.

    sum(x)            = reduce(sum(x_local))
    mean(x)           = reduce(sum(x_local)) / the full number of elements
    cross_entropy     = reduce(the local sum) / reduce(the number of local targets that count)

Contract: the result is whole; sums are added in float32 (float64).
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import Node

from ringpass import ops
from ringpass.nodes import bound_of, first_of, op_name, size_of
from ringpass.passes.op_rules.table import LOSSES, SUMS, dims_of
from ringpass.passes.partition.emitter import Emitter
from ringpass.passes.plan.axes import Axis
from ringpass.precision import accumulator

aten = torch.ops.aten
SUMMED = 2  # the `reduction` of a loss that is a sum


class Sums(Emitter):
    """Writes sums over the sequence."""

    def _write_sum(self, node: Node, axis: Axis) -> Node:
        """The local part of a sum, added over ranks.  A mean divides by the full number of elements."""
        name = op_name(node)
        if name == "cross_entropy_loss.default":
            return self._write_loss(node, axis)
        if name in LOSSES:
            return self._write_elementwise_loss(node, axis)
        args, kwargs = self._operands(node, axis, f"operand of {name}")
        if name not in SUMS:
            return self._emit(ops.reduce, self._copy(node, args, kwargs), self.rank.group, name=f"{node.name}_reduced")
        value, result = first_of(node).meta["val"], node.meta["val"]
        dims, keep = dims_of(node), bound_of(node).get("keepdim", False)
        part = self._emit(aten.sum.dim_IntList, args[0], dims, keep, dtype=accumulator(result.dtype), name=node.name)
        total = self._emit(ops.reduce, part, self.rank.group, name=f"{node.name}_reduced")
        if name.startswith("mean"):
            count = self._size(sympy.prod([size_of(value.shape[d]) for d in dims]))
            total = self._emit(aten.div.Tensor, total, count, name=f"{node.name}_mean")
        return total if total.meta["val"].dtype == result.dtype else self._emit(aten.to.dtype, total, result.dtype)

    def _summed_loss(self, node: Node, axis: Axis) -> tuple[dict[str, Any], Node]:
        """The arguments of a loss by name, and its sum."""
        bound = self._operands_by_name(node, axis, "loss")
        part = self._emit_bound(node.target, {**bound, "reduction": SUMMED}, node.name)
        return bound, self._emit(ops.reduce, part, self.rank.group, name=f"{node.name}_reduced")

    def _write_elementwise_loss(self, node: Node, axis: Axis) -> Node:
        """The local sum of an element-wise loss, reduced; a mean divides by the full number of elements."""
        bound, total = self._summed_loss(node, axis)
        if bound.get("reduction", 1) == SUMMED:
            return total
        shapes = [a.meta["val"].shape for a in node.args[:2] if isinstance(a, Node)]
        count = self._size(sympy.prod([size_of(n) for n in torch.broadcast_shapes(*shapes)]))
        return self._emit(aten.div.Tensor, total, count, name=f"{node.name}_mean")

    def _write_loss(self, node: Node, axis: Axis) -> Node:
        """cross_entropy_loss: the local sum, reduced; a mean divides by the number (weight) of targets that count."""
        bound, total = self._summed_loss(node, axis)
        if bound.get("reduction", 1) == SUMMED:
            return total
        target, weight, ignored = bound["target"], bound.get("weight"), bound.get("ignore_index", -100)
        counted = self._emit(aten.ne.Scalar, target, ignored)
        if weight is not None:
            safe = self._emit(aten.where.ScalarOther, counted, target, 0)
            weights = self._emit(aten.index.Tensor, weight, [safe])
            counted = self._emit(aten.where.ScalarOther, counted, weights, 0.0)
        count = self._emit(
            ops.reduce, self._emit(aten.sum.default, counted), self.rank.group, name=f"{node.name}_targets"
        )
        return self._emit(aten.div.Tensor, total, count, name=f"{node.name}_mean")
