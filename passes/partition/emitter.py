"""emission: what every writer of a rank's program needs: nodes with their fakes, and sizes in terms of local lengths.

    emit(target, *args)        a call, with its fake value and the source line of the captured node that it comes from
    size(expr)                 a size as an int, or as a node computed from the graph's symbolic inputs
    length(axis)               L, the number of this rank's tokens; local_shape(node): its shape with L for S

Contract: nothing here reads what the rank is but through its local lengths and the arguments of boundary operators.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Graph, Node, Proxy, map_arg
from torch.fx.proxy import GraphAppendingTracer
from torch.utils.checkpoint import CheckpointPolicy

from ringpass import ops
from ringpass.errors import UnsupportedError
from ringpass.nodes import KEPT_META, bound_of, size_of
from ringpass.passes.capture.capture import Captured
from ringpass.passes.op_rules.spec import Rank
from ringpass.passes.partition.placement import PlacementPlan
from ringpass.passes.propagate.axis import Axis
from ringpass.passes.propagate.factors import product


class Emitter:
    """The graph that is being written."""

    def __init__(self, captured: Captured, placement: PlacementPlan, rank: Rank) -> None:
        self.captured, self.placement, self.rank = captured, placement, rank
        self.graph = Graph()
        self.sizes: dict[Any, Any] = {}
        self.lengths: dict[int, Any] = {}
        self.origin: Node | None = None  # the captured node being written

    def operand(self, node: Node, axis: Axis | None, reason: str) -> Any:
        raise NotImplementedError

    def operands(self, node: Node, axis: Axis | None, reason: str) -> tuple[Any, Any]:
        return map_arg((node.args, node.kwargs), lambda n: self.operand(n, axis, reason))

    def operands_by_name(self, node: Node, axis: Axis, reason: str) -> dict[str, Any]:
        return {k: self.operand(x, axis, reason) if isinstance(x, Node) else x for k, x in bound_of(node).items()}

    # --- sizes ------------------------------------------------------------------------------------------------------

    def shard_args(self, node: Node, axis: Axis) -> tuple[Any, ...]:
        """(dim, outer, tokens, layout, world, rank) of `node` on `axis`, as the boundary operators take them."""
        for dim, factors in enumerate(self.placement.sweep.dims(node)):
            for position, factor in enumerate(factors):
                if self.placement.axis_of.get(factor) is axis:
                    outer = self.size(product(factors[:position]))
                    return dim, outer, self.tokens(axis), axis.layout.name, self.rank.world, self.rank.rank
        raise AssertionError(f"{node} has no dim on {axis}")

    def local_shape(self, node: Node, axis: Axis) -> list[Any]:
        shape = [size_of(n) for n in node.meta["val"].shape]
        for dim, factors in enumerate(self.placement.sweep.dims(node)):
            if any(self.placement.axis_of.get(f) is axis for f in factors):
                rest = self.size(sympy.cancel(shape[dim] / size_of(axis.tokens)))
                length = self.length(axis)
                shape[dim] = length if rest == 1 else self.compute(operator.mul, rest, length)
            else:
                shape[dim] = self.size(shape[dim])
        return shape

    def tokens(self, axis: Axis) -> Any:
        return self.size(size_of(axis.tokens))

    def length(self, axis: Axis) -> Any:
        """L, the number of local tokens."""
        if axis.index not in self.lengths:
            self.lengths[axis.index] = self.compute(lambda s: axis.layout.length(self.rank.rank, s), self.tokens(axis))
        return self.lengths[axis.index]

    def size(self, expr: Any) -> Any:
        """A size expression as an int, or as a node computed from the graph's symbolic inputs."""
        expr = sympy.sympify(expr)
        if expr.is_number:
            return int(expr)
        if expr not in self.sizes:
            self.sizes[expr] = self._size_node(expr)
        return self.sizes[expr]

    def _size_node(self, expr: Any) -> Any:
        if expr.is_Symbol:
            for node in self.graph.nodes:
                value = node.meta.get("val")
                if node.op == "placeholder" and isinstance(value, torch.SymInt) and value.node.expr == expr:
                    return node
            raise UnsupportedError(f"the size {expr} is no input of the graph")
        known = {sympy.Add: operator.add, sympy.Mul: operator.mul}
        name = type(expr).__name__
        fn = next((f for kind, f in known.items() if isinstance(expr, kind)), None)
        fn = fn or {
            "FloorDiv": operator.floordiv,
            "PythonMod": operator.mod,
            "Mod": operator.mod,
            "Max": torch.sym_max,
            "Min": torch.sym_min,
        }.get(name)
        if fn is None:
            raise UnsupportedError(f"cannot compute the size {expr} in the graph: {name}")
        first, *rest = [self.size(a) for a in expr.args]
        for other in rest:
            first = self.compute(fn, first, other)
        return first

    def compute(self, fn: Callable[..., Any], *args: Any) -> Any:
        """`fn` on ints and size nodes; the arithmetic is written into the graph."""
        if not any(isinstance(a, Node) for a in args):
            return fn(*args)
        tracer = GraphAppendingTracer(self.graph)
        out = fn(*(Proxy(a, tracer) if isinstance(a, Node) else a for a in args))
        for node in self.graph.nodes:
            if "val" not in node.meta and node.op == "call_function":
                node.meta["val"] = node.target(*fakes(node.args))
        return out.node if isinstance(out, Proxy) else out

    # --- emission ---------------------------------------------------------------------------------------------------

    def copy(self, node: Node, args: Any, kwargs: Any) -> Node:
        """The same call on new operands; what is no ATen op (higher-order ops, mode switches) keeps the fake it had."""
        if isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem:
            return self.emit(node.target, *args, name=node.name, **kwargs)
        new = self.graph.create_node(node.op, node.target, args, kwargs, name=node.name)
        new.meta.update(node.meta)
        return new

    def emit(self, target: Callable[..., Any], *args: Any, name: str | None = None, **kwargs: Any) -> Node:
        """Appends a call, with its fake value and the meta of the node that it comes from."""
        node = self.graph.create_node("call_function", target, args, kwargs, name=name)
        with self.captured.fake_mode, enable_python_dispatcher(), torch.no_grad():  # which symbolic amounts need
            node.meta["val"] = target(*fakes(args), **fakes(kwargs))
        if self.origin is not None:
            node.meta.update({k: self.origin.meta[k] for k in KEPT_META if k in self.origin.meta})
        if target in ops.COMMUNICATING and "recompute" in node.meta:
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        return node

    def emit_by_name(self, target: Any, arguments: dict[str, Any], name: str | None = None) -> Node:
        """A call of an ATen op with its arguments by name."""
        listed = target._schema.arguments
        args = [arguments.get(a.name, a.default_value) for a in listed if not a.kwarg_only]
        named = {a.name: arguments[a.name] for a in listed[len(args) :] if a.name in arguments}
        return self.emit(target, *args, name=name, **named)

    def placeholder(self, name: str, meta: dict[str, Any]) -> Node:
        node = self.graph.placeholder(name)
        node.meta.update(meta)
        return node


def fakes(args: Any) -> Any:
    return map_arg(args, lambda n: n.meta["val"])
