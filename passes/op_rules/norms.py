"""Norms whose statistics may run over tokens: batch norm, group norm, instance norm.

    mean      = reduce(sum(x_local)) / n
    variance  = reduce(sum((x_local - mean) ** 2)) / n
    result    = (x_local - mean) / sqrt(variance + eps) * weight + bias

Contract: channels are needed replicated; the result is on the axis of the operand.  Statistics are the same on every
rank, and so are the running ones after their update.  They are computed in float32 (float64).
"""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch.fx import Node

from ringpass import ops
from ringpass.nodes import bound_of, first_of, op_name, size_of
from ringpass.passes.op_rules.spec import GraphSize, OpRule, Writer, same_call
from ringpass.passes.propagate.axis import Axis
from ringpass.passes.propagate.factors import Dims, Note, Sweep
from ringpass.precision import accumulator

aten = torch.ops.aten


def _norm(sweep: Sweep, node: Node, note: Note) -> Dims | None:
    """None: an instance norm that keeps running statistics, or uses them."""
    bound, dims = bound_of(node), sweep.dims(first_of(node))
    if op_name(node).startswith("instance") and (bound.get("running_mean") is not None or not bound["use_input_stats"]):
        return None
    note.need_replication += dims[1]
    return dims


def _write_batch_norm(writer: Writer, node: Node, axis: Axis) -> Node:
    """Statistics of each channel; those of the training set, where it does not train, are there already."""
    bound = writer.operands_by_name(node, axis, f"operand of {op_name(node)}")
    if not bound["training"]:
        return same_call(writer, node, axis)
    dims = [d for d in range(node.meta["val"].ndim) if d != 1]
    shape = node.meta["val"].shape
    count = writer.size(sympy.prod([size_of(shape[d]) for d in dims]))
    x, mean, squares = _normalised(writer, node, bound["input"], dims, count, bound["eps"])
    if bound["running_mean"] is not None:
        unbiased = writer.emit(aten.div.Tensor, squares, writer.compute(lambda n: n - 1, count))
        _update(writer, bound["running_mean"], mean, bound["momentum"])
        _update(writer, bound["running_var"], unbiased, bound["momentum"])
    return _scaled(writer, node, x, bound)


def _update(writer: Writer, running: Node, new: Node, momentum: float) -> None:
    """Moves a running statistic, which is an input, towards the new one."""
    row = writer.emit(aten.to.dtype, writer.emit(aten.view.default, new, [-1]), running.meta["val"].dtype)
    detached = writer.emit(aten.detach.default, row)
    writer.emit(aten.copy_.default, running, writer.emit(aten.lerp.Scalar, running, detached, momentum))


def _write_group_norm(writer: Writer, node: Node, axis: Axis) -> Node:
    """Statistics of each group of channels of each element of the batch."""
    if writer.shard_args(node, axis).dim == 0:
        return same_call(writer, node, axis)
    bound = writer.operands_by_name(node, axis, f"operand of {op_name(node)}")
    batch, channels, *rest = writer.local_shape(node, axis)
    groups = bound.get("num_groups", channels)
    each = writer.compute(operator.floordiv, channels, groups)
    x = writer.emit(aten.reshape.default, bound["input"], [batch, groups, each, *rest])
    count = writer.size(sympy.prod([size_of(n) for n in node.meta["val"].shape[1:]]))
    count = writer.compute(operator.floordiv, count, groups)
    x, *_ = _normalised(writer, node, x, list(range(2, 3 + len(rest))), count, bound.get("eps", 1e-5))
    return _scaled(writer, node, writer.emit(aten.view.default, x, [batch, channels, *rest]), bound)


def _normalised(
    writer: Writer, node: Node, x: Node, dims: list[int], count: GraphSize, eps: float
) -> tuple[Node, Node, Node]:
    """(`x` less its mean over `dims` and ranks, divided by its spread, the mean, the sum of squared deviations)."""
    rank, dtype = writer.rank, accumulator(node.meta["val"].dtype)
    x = x if x.meta["val"].dtype == dtype else writer.emit(aten.to.dtype, x, dtype)
    mean = writer.emit(aten.div.Tensor, _total(writer, x, dims, f"{node.name}_sum"), count)
    deviation = writer.emit(aten.sub.Tensor, x, writer.emit(aten.detach.default, mean))  # the mean's part is 0
    squares = _total(writer, writer.emit(aten.mul.Tensor, deviation, deviation), dims, f"{node.name}_squares")
    spread = writer.emit(aten.add.Tensor, writer.emit(aten.div.Tensor, squares, count), eps)
    statistics = [mean, writer.emit(aten.rsqrt.default, spread)]
    used = writer.emit(ops.replicate, statistics, 0, rank.rank, rank.group, name=f"{node.name}_statistics")
    shift, scale = (writer.emit(operator.getitem, used, i) for i in range(2))
    centred = writer.emit(aten.sub.Tensor, x, shift)
    return writer.emit(aten.mul.Tensor, centred, scale), mean, squares


def _total(writer: Writer, x: Node, dims: list[int], name: str) -> Node:
    """The sum over `dims` and ranks."""
    return writer.emit(ops.reduce, writer.emit(aten.sum.dim_IntList, x, dims, True), writer.rank.group, name=name)


def _scaled(writer: Writer, node: Node, x: Node, bound: dict[str, Any]) -> Node:
    """`x` times the weight of each channel plus its bias, in the dtype of the op's result."""
    result = node.meta["val"]
    channels = [-1, *[1] * (result.ndim - 2)]
    for op, name in ((aten.mul.Tensor, "weight"), (aten.add.Tensor, "bias")):
        if bound.get(name) is not None:
            x = writer.emit(op, x, writer.emit(aten.view.default, bound[name], channels))
    return x if x.meta["val"].dtype == result.dtype else writer.emit(aten.to.dtype, x, result.dtype)


RULES = {
    "batch_norm.default": OpRule(_norm, computes=True, write=_write_batch_norm),
    "group_norm.default": OpRule(_norm, computes=True, write=_write_group_norm),
    "instance_norm.default": OpRule(_norm, computes=True, write=_write_group_norm),
}
