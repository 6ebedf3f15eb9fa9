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
from ringpass.kernels import accumulator
from ringpass.passes.emission import Emitter
from ringpass.passes.factors import args_of, first_of, op_name, size_of
from ringpass.passes.pieces import Axis
from ringpass.passes.rules import LOSSES, SUMS

aten = torch.ops.aten


class Sums(Emitter):
    """Writes sums over the sequence."""

    def _write_sum(self, node: Node, axis: Axis) -> Node:
        """The local part of a sum, added over ranks.  A mean divides by the full number of elements."""
        name = op_name(node)
        if name == "cross_entropy_loss.default":
            return self._write_loss(node, axis)
        args, kwargs = self._operands(node, axis, f"operand of {name}")
        if name in LOSSES:
            return self._write_elementwise_loss(node, args, kwargs)
        if name not in SUMS:
            return self._emit(ops.reduce, self._copy(node, args, kwargs), self.rank.group, name=f"{node.name}_reduced")
        value, result = first_of(node).meta["val"], node.meta["val"]
        position = SUMS[name]
        dims = args[position] if position is not None and len(args) > position else kwargs.get("dim")
        keep = args[position + 1] if position is not None and len(args) > position + 1 else kwargs.get("keepdim", False)
        dims = list(range(value.ndim)) if dims in (None, []) else [dims] if isinstance(dims, int) else list(dims)
        part = self._emit(aten.sum.dim_IntList, args[0], dims, keep, dtype=accumulator(result.dtype), name=node.name)
        total = self._emit(ops.reduce, part, self.rank.group, name=f"{node.name}_reduced")
        if name.startswith("mean"):
            count = self._size(sympy.prod([size_of(value.shape[d]) for d in dims]))
            total = self._emit(aten.div.Tensor, total, count, name=f"{node.name}_mean")
        return total if total.meta["val"].dtype == result.dtype else self._emit(aten.to.dtype, total, result.dtype)

    def _write_elementwise_loss(self, node: Node, args: Any, kwargs: Any) -> Node:
        """The local sum of an element-wise loss, reduced; a mean divides by the full number of elements."""
        position = LOSSES[op_name(node)]
        reduction = args[position] if len(args) > position else kwargs.get("reduction", 1)
        named = {k: v for k, v in kwargs.items() if k != "reduction"}
        schema: Any = node.target
        missing = [named.pop(a.name, a.default_value) for a in schema._schema.arguments[len(args) : position]]
        summed = (*args[:position], *missing, 2, *args[position + 1 :])
        part = self._emit(node.target, *summed, name=node.name, **named)  # type: ignore[arg-type]
        total = self._emit(ops.reduce, part, self.rank.group, name=f"{node.name}_reduced")
        if reduction == 2:
            return total
        shapes = [a.meta["val"].shape for a in node.args[:2] if isinstance(a, Node)]
        count = self._size(sympy.prod([size_of(n) for n in torch.broadcast_shapes(*shapes)]))
        return self._emit(aten.div.Tensor, total, count, name=f"{node.name}_mean")

    def _write_loss(self, node: Node, axis: Axis) -> Node:
        """cross_entropy_loss: the local sum, reduced; a mean divides by the number (weight) of targets that count."""
        defaults: tuple[Any, ...] = (None, None, None, 1, -100, 0.0)
        given = args_of(node)
        logits, target, weight, reduction, ignored, smoothing = (*given, *defaults[len(given) :])
        kwargs = dict(node.kwargs)
        weight, reduction = kwargs.get("weight", weight), kwargs.get("reduction", reduction)
        ignored, smoothing = kwargs.get("ignore_index", ignored), kwargs.get("label_smoothing", smoothing)
        operands = [self._operand(x, axis, "loss") if isinstance(x, Node) else x for x in (logits, target, weight)]
        part = self._emit(aten.cross_entropy_loss.default, *operands, 2, ignored, smoothing, name=node.name)
        total = self._emit(ops.reduce, part, self.rank.group, name=f"{node.name}_reduced")
        if reduction == 2:
            return total
        counted = self._emit(aten.ne.Scalar, operands[1], ignored)
        if weight is not None:
            safe = self._emit(aten.where.ScalarOther, counted, operands[1], 0)
            weights = self._emit(aten.index.Tensor, operands[2], [safe])
            counted = self._emit(aten.where.ScalarOther, counted, weights, 0.0)
        count = self._emit(
            ops.reduce, self._emit(aten.sum.default, counted), self.rank.group, name=f"{node.name}_targets"
        )
        return self._emit(aten.div.Tensor, total, count, name=f"{node.name}_mean")
