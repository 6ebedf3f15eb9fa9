"""Ops that make a tensor from sizes: constants, counters, random numbers."""

from __future__ import annotations

from typing import Any

from torch.fx import Node, map_arg

from ringpass.nodes import op_name
from ringpass.passes.op_rules.spec import OpRule, Reads, Writer
from ringpass.passes.propagate.axis import Axis
from ringpass.passes.propagate.factors import Dims, Note, Sweep

SHAPE = {
    "zeros.default": 0, "ones.default": 0, "full.default": 0,
    "new_zeros.default": 1, "new_ones.default": 1, "new_full.default": 1,
}  # fmt: skip
"""Ops that make tensors of one number, and the position of their sizes among the arguments."""


def _fresh(sweep: Sweep, node: Node, note: Note) -> Dims:
    return sweep.fresh(node.meta["val"].shape)


def _operands(writer: Writer, node: Node, reason: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Sizes, and a tensor that lends dtype and device, of whatever tokens."""
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: writer.either(n, reason))
    return args, kwargs


def _write_replicated(writer: Writer, node: Node, reason: str) -> Node:
    args, kwargs = _operands(writer, node, reason)
    return writer.copy(node, args, kwargs)


def _write_constant(writer: Writer, node: Node, axis: Axis) -> Node:
    """The same constant at the local size."""
    args, kwargs = _operands(writer, node, f"operand of {op_name(node)}")
    shape, position = writer.local_shape(node, axis), SHAPE[op_name(node)]
    return writer.copy(node, (*args[:position], shape, *args[position + 1 :]), kwargs)


RULES = {
    **dict.fromkeys((
        "arange.default", "arange.start", "arange.start_step", "empty.memory_format", "new_empty.default",
        "scalar_tensor.default", "eye.default", "eye.m", "linspace.default", "randn.default", "rand.default",
    ), OpRule(_fresh, reads=Reads.NONE, write_replicated=_write_replicated)),
    **dict.fromkeys(SHAPE, OpRule(
        _fresh, reads=Reads.NONE, expands=True, write=_write_constant, write_replicated=_write_replicated,
        constant=True,
    )),
}  # fmt: skip
