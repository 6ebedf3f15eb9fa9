"""Pointwise ops: each element of the result depends on the elements at its index alone.

Ops that torch tags as pointwise need no entry here; `NAMES` are those without the tag.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ringpass import ops
from ringpass.nodes import args_of, first_of, op_name, operands_of, tensors_of
from ringpass.passes.op_rules import routing
from ringpass.passes.op_rules.spec import OpRule, Reads, ShardArgs, Writer
from ringpass.passes.propagate.axis import Axis
from ringpass.passes.propagate.factors import Dims, Note, Results, Sweep

aten = torch.ops.aten
NAMES = {
    "to.dtype", "to.dtype_layout", "to.device", "_to_copy.default", "contiguous.default", "clone.default",
    "alias.default", "detach.default", "lift_fresh_copy.default", "lift_fresh.default",
    "zeros_like.default", "ones_like.default", "full_like.default", "fill.Scalar", "masked_fill.Scalar",
    "masked_fill.Tensor", "copy.default", "where.ScalarOther", "where.ScalarSelf", "where.Scalar", "where.self",
    "gelu.default", "silu.default", "relu.default", "relu6.default", "leaky_relu.default", "elu.default",
    "hardtanh.default", "hardswish.default", "mish.default", "softplus.default", "selu.default", "celu.default",
    "log_sigmoid.default", "prelu.default", "square.default", "rsub.Scalar", "rsub.Tensor", "float_power.Tensor_Scalar",
    "bitwise_not.default", "logical_not.default", "clamp.default", "clamp.Tensor", "isfinite.default",
    "isinf.default", "isnan.default", "nan_to_num.default", "min.other", "max.other", "empty_like.default",
    "__and__.Tensor", "__and__.Scalar", "__or__.Tensor", "__or__.Scalar", "real.default", "imag.default",
    "conj.default", "_conj.default", "resolve_conj.default", "resolve_neg.default", "polar.default", "complex.default",
}  # fmt: skip
ELEMENTWISE = {
    "mul", "add", "sub", "truediv", "neg", "pow", "tanh", "sigmoid", "exp", "log", "erf", "sqrt", "rsqrt", "abs",
    "relu", "square", "reciprocal", "radd", "rmul", "rsub", "set_grad_enabled",
}  # fmt: skip
"""Python-level calls in the bodies of an autograd.Function that are pointwise."""


def pointwise(sweep: Sweep, node: Node, note: Note) -> Results:
    """The dims of the operands, broadcast against each other; a dim that none of them has is new.

    Several results, such as those of `frexp`, are alike.
    """
    if len(operands_of(node)) == 1:
        routing.counts_too(sweep, node)
    dims = sweep.broadcast([sweep.dims(n) for n in operands_of(node)], note)
    values = tensors_of(node)
    dims = tuple(d if d else sweep.new(n) for d, n in zip(dims, values[0].shape, strict=True))
    return dims if isinstance(node.meta["val"], Tensor) else (dims,) * len(values)


def _floor_divide(sweep: Sweep, node: Node, note: Note) -> Results:
    return routing.divided(sweep, node, note) or pointwise(sweep, node, note)


def _broadcast_tensors(sweep: Sweep, node: Node, note: Note) -> tuple[Dims, ...]:
    dims = sweep.broadcast([sweep.dims(n) for n in operands_of(node)], note)
    return (dims,) * len(node.meta["val"])


# --- dtype of another tensor ------------------------------------------------------------------------------------------


def _first_operand(sweep: Sweep, node: Node, note: Note) -> Dims:
    return sweep.dims(first_of(node))


def _write_cast(writer: Writer, node: Node, axis: Axis) -> Node:
    x = writer.sharded(first_of(node), axis)
    return writer.emit(aten.to.dtype, x, node.meta["val"].dtype, name=node.name)


def _write_replicated_cast(writer: Writer, node: Node, reason: str) -> Node:
    x = writer.replicated(first_of(node), reason)
    return writer.emit(aten.to.dtype, x, node.meta["val"].dtype, name=node.name)


# --- autograd.Function ------------------------------------------------------------------------------------------------


def _function(sweep: Sweep, node: Node, note: Note) -> tuple[Dims, ...] | None:
    """An autograd.Function whose forward and backward are pointwise, on tensors of one shape; None: another one."""
    shape = node.meta["val"][0].shape
    bodies: Any = [getattr(node.graph.owning_module, str(body.target)) for body in args_of(node)[:2]]
    for inner in [n for body in bodies for n in body.graph.nodes if n.op != "output"]:
        value = inner.meta.get("example_value")
        name = inner.target if isinstance(inner.target, str) else getattr(inner.target, "__name__", "")
        known = inner.op == "placeholder" or (inner.op.startswith("call") and name.strip("_") in ELEMENTWISE)
        if not known or (isinstance(value, Tensor) and value.shape != shape):
            return None
    dims = sweep.broadcast([sweep.dims(n) for n in operands_of(node)], note)
    return (dims,) * len(node.meta["val"])


def _write_function(writer: Writer, node: Node, axis: Axis) -> Node:
    """The same call; its results are like its operands."""
    args, kwargs = writer.operands(node, axis, f"operand of {op_name(node)}")
    new = writer.copy(node, args, kwargs)
    new.meta["val"] = (args[2].meta["val"],) * len(node.meta["val"])
    return new


# --- dropout ----------------------------------------------------------------------------------------------------------


def _drops(node: Node) -> bool:
    """Whether a dropout drops anything."""
    _, rate, train = args_of(node)
    return bool(train and rate != 0)


def _write_dropout(writer: Writer, node: Node, axis: Axis) -> Node:
    x = writer.sharded(first_of(node), axis)
    return _emit_dropout(writer, node, x, writer.shard_args(node, axis)) if _drops(node) else x


def _write_replicated_dropout(writer: Writer, node: Node, reason: str) -> Node:
    args, kwargs = writer.operands(node, None, reason)
    if not _drops(node):
        return writer.copy(node, args, kwargs)
    return _emit_dropout(writer, node, args[0], writer.replicated_args())


def _emit_dropout(writer: Writer, node: Node, x: Node, shard_args: ShardArgs) -> Node:
    """A dropout whose mask depends on the index of each element in the full tensor, not on the rank."""
    rate = float(args_of(node)[1])
    return writer.emit(ops.dropout, x, writer.seed, rate, writer.next_stream(), *shard_args, name=node.name)


POINTWISE = OpRule(pointwise)
_CAST = OpRule(_first_operand, reads=Reads.FIRST, write=_write_cast, write_replicated=_write_replicated_cast)
RULES = {
    **dict.fromkeys(NAMES, POINTWISE),
    "detach.default": OpRule(pointwise, detaches=True),
    "floor_divide.default": OpRule(_floor_divide),
    "broadcast_tensors.default": OpRule(_broadcast_tensors),
    "type_as.default": _CAST,
    "to.other": _CAST,
    "autograd_function_apply": OpRule(_function, write=_write_function),
    "dropout.default": OpRule(
        pointwise,
        draws=_drops,
        write=_write_dropout,
        write_replicated=_write_replicated_dropout,
    ),
}
