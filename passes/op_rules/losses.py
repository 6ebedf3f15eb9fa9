"""Losses: over local tokens, added over ranks.

    mse_loss, sum      = reduce(sum(the local losses))
    mse_loss, mean     = reduce(sum(the local losses)) / the full number of elements
    cross_entropy      = reduce(sum(the local losses)) / reduce(the number, or weight, of local targets that count)

A loss of classes, with logits (C), (N, C) or (N, C, d1, ..), needs the class dim replicated; all other dims are tied to
the target's, and any of them may be the sequence.

Contract: a reduced loss is replicated; local losses are added in float32 (float64), also those of 16-bit logits, whose
sum might exceed what 16 bits hold.
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
from ringpass.nodes import bound_of, operands_of, size_of
from ringpass.passes.op_rules.spec import GraphSize, OpRule, Writer
from ringpass.passes.propagate.axis import Axis
from ringpass.passes.propagate.factors import Dims, Note, Results, Sweep
from ringpass.precision import accumulator

aten = torch.ops.aten
NONE, MEAN, SUM = 0, 1, 2
"""The argument `reduction` of a loss."""
CHUNKED = "torch_nn._linear_cross_entropy_batch_chunked"
"""What `F.linear_cross_entropy` calls where it never holds all logits."""


def _reduction_of(node: Node) -> int:
    """How a loss is reduced; a mean if it does not say."""
    given = bound_of(node).get("reduction", MEAN)
    return {"none": NONE, "mean": MEAN, "sum": SUM}[given] if isinstance(given, str) else int(given)


# --- dims -------------------------------------------------------------------------------------------------------------


def _pointwise(sweep: Sweep, node: Node, note: Note) -> Dims:
    """A loss of each element: its mean or sum is over every dim."""
    return _reduced(node, sweep.broadcast([sweep.dims(n) for n in operands_of(node)], note), note)


def _reduced(node: Node, dims: Dims, note: Note) -> Dims:
    """The dims of a loss whose single losses have `dims`."""
    if _reduction_of(node) == NONE:
        return dims
    note.reduction += [f for d in dims for f in d]
    return ()


def _classes(sweep: Sweep, node: Node, note: Note) -> Dims | None:
    """A loss of classes: its targets are class indices, or, in the shape of the logits, numbers for each class."""
    bound = bound_of(node)
    logits, target = (list(sweep.dims(bound[name])) for name in ("self", "target"))
    at = min(1, len(logits) - 1)
    classes = logits.pop(at)
    if bound["target"].meta["val"].ndim == bound["self"].meta["val"].ndim:
        note.need_replication += target.pop(at)
    if len(logits) != len(target):
        return None
    note.need_replication += classes
    return _reduced(node, sweep.broadcast([tuple(logits), tuple(target)], note), note)


def _chunked(sweep: Sweep, node: Node, note: Note) -> Results | None:
    """Cross entropy of a linear layer of (N, features), chunk by chunk.  What it keeps for its backward is its own.

    None: of float16, in which the sum of many losses may have no number.
    """
    bound = bound_of(node)
    if bound["input"].meta["val"].dtype == torch.float16:
        return None
    (rows, features), target = sweep.dims(bound["input"]), sweep.dims(bound["target"])
    note.need_replication += [*features, *(f for d in sweep.dims(bound["linear_weight"]) for f in d)]
    losses = sweep.broadcast([(rows,), target], note)
    values = node.meta["val"]
    if isinstance(values, Tensor):
        return losses
    note.reduction += losses[0]
    return ((), *(sweep.fresh(kept.shape) for kept in values[1:]))


# --- writing ----------------------------------------------------------------------------------------------------------

Count = Callable[[Writer, Node, dict[str, Any]], GraphSize]
"""(writer, node, its local arguments by name) -> what a mean divides by."""


def _writes(count: Count) -> Callable[[Writer, Node, Axis], Node]:
    """What writes the sum of the local losses, added over ranks; a mean is divided by `count`."""

    def write(writer: Writer, node: Node, axis: Axis) -> Node:
        bound = writer.operands_by_name(node, axis, "loss")
        losses = writer.emit_by_name(node.target, {**bound, "reduction": NONE}, node.name)
        result = node.meta["val"].dtype
        part = writer.emit(aten.sum.default, losses, dtype=accumulator(result))
        total = _total(writer, node, part, bound, count)
        return total if total.meta["val"].dtype == result else writer.emit(aten.to.dtype, total, result)

    return write


def _total(writer: Writer, node: Node, part: Node, bound: dict[str, Any], count: Count) -> Node:
    """The parts of a loss, added over ranks; a mean is divided by `count`."""
    total = writer.emit(ops.reduce, part, writer.rank.group, name=f"{node.name}_reduced")
    if _reduction_of(node) == SUM:
        return total
    return writer.emit(aten.div.Tensor, total, count(writer, node, bound), name=f"{node.name}_mean")


def _elements(writer: Writer, node: Node, bound: dict[str, Any]) -> GraphSize:
    """The full number of elements, for a pointwise loss."""
    shapes = [n.meta["val"].shape for n in operands_of(node)]
    return writer.size(sympy.prod([size_of(n) for n in torch.broadcast_shapes(*shapes)]))


def _rows(writer: Writer, node: Node, bound: dict[str, Any]) -> GraphSize:
    """The full number of rows of classes."""
    shape = list(bound_of(node)["self"].meta["val"].shape)
    del shape[min(1, len(shape) - 1)]
    return writer.size(sympy.prod([size_of(n) for n in shape]))


def _targets(writer: Writer, node: Node, bound: dict[str, Any]) -> GraphSize:
    """The number (weight) of targets that count, over all ranks; all rows, where targets are probabilities."""
    target, weight, ignored = bound["target"], bound.get("weight"), bound.get("ignore_index", -100)
    if target.meta["val"].is_floating_point():
        return _rows(writer, node, bound)
    counted = writer.emit(aten.ne.Scalar, target, ignored)
    if weight is not None:
        safe = writer.emit(aten.where.ScalarOther, counted, target, 0)
        weights = writer.emit(aten.index.Tensor, weight, [safe])
        counted = writer.emit(aten.where.ScalarOther, counted, weights, 0.0)
    dtype = None if weight is None else accumulator(weight.meta["val"].dtype)
    part = writer.emit(aten.sum.default, counted, dtype=dtype)
    return writer.emit(ops.reduce, part, writer.rank.group, name=f"{node.name}_targets")


def _write_chunked(writer: Writer, node: Node, axis: Axis) -> tuple[Node, ...]:
    """The loss alone: what the local call keeps for its backward is not read by others."""
    bound = writer.operands_by_name(node, axis, "loss")
    local = writer.emit_by_name(node.target, {**bound, "reduction": "sum"}, node.name)
    part = writer.emit(operator.getitem, local, 0, name=f"{node.name}_local")
    return (_total(writer, node, part, bound, _targets),)


RULES = {
    **dict.fromkeys((
        "mse_loss.default", "l1_loss.default", "smooth_l1_loss.default", "huber_loss.default",
        "soft_margin_loss.default", "kl_div.default", "binary_cross_entropy.default",
        "binary_cross_entropy_with_logits.default",
    ), OpRule(_pointwise, reduce=_writes(_elements))),
    **dict.fromkeys((
        "cross_entropy_loss.default", "nll_loss_nd.default", "nll_loss.default", "nll_loss2d.default",
    ), OpRule(_classes, reduce=_writes(_targets))),
    **dict.fromkeys(
        ("multi_margin_loss.default", "multilabel_margin_loss.default"), OpRule(_classes, reduce=_writes(_rows))
    ),
    f"{CHUNKED}.default": OpRule(_chunked, computes=True, reduce=_write_chunked),
    f"{CHUNKED}_no_reduction.default": OpRule(_chunked, computes=True),
}  # fmt: skip
