"""emitter: the graph of a rank's program: nodes with their fake values, and sizes in terms of local lengths.

    emit(target, *args)        a call, with its fake value and the source line of the captured node that it comes from
    size(expr)                 a size as an int, or as a node computed from the graph's symbolic inputs
    length(axis)               L, the number of this rank's tokens; local_shape(node): its shape with L for S

Contract: the rank enters the graph only by its local lengths and by the arguments of boundary operators.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Graph, Node, Proxy, map_arg
from torch.fx.proxy import GraphAppendingTracer
from torch.utils.checkpoint import CheckpointPolicy

from ringpass import ops
from ringpass.errors import UnsupportedError
from ringpass.nodes import KEPT_META, size_of
from ringpass.passes.capture.capture import Captured
from ringpass.passes.op_rules.spec import GraphSize, Rank, ShardArgs
from ringpass.passes.partition.placement_plan import PlacementPlan
from ringpass.passes.propagate.axis import Axis
from ringpass.passes.propagate.factors import Factors, product

ARITHMETIC: dict[str, Callable[..., Any]] = {
    "Add": operator.add, "Mul": operator.mul, "FloorDiv": operator.floordiv, "Mod": operator.mod,
    "PythonMod": operator.mod, "Max": torch.sym_max, "Min": torch.sym_min,
}  # fmt: skip
"""What computes each kind of size expression, by the class's name: sympy's and torch's own."""


class Emitter:
    """The graph that is being written."""

    def __init__(self, captured: Captured, placement: PlacementPlan, rank: Rank) -> None:
        self.captured, self.placement, self.rank = captured, placement, rank
        self.graph = Graph()
        self.sizes: dict[sympy.Expr, GraphSize] = {}
        self.lengths: dict[int, GraphSize] = {}  # of the axis of each index
        self.origin: Node | None = None  # the captured node being written

    # --- sizes ------------------------------------------------------------------------------------------------------

    def shard_args(self, node: Node, axis: Axis) -> ShardArgs:
        """Where the tokens of `node` on `axis` are, as the boundary operators take it."""
        for dim, factors in enumerate(self.placement.sweep.dims(node)):
            for position, factor in enumerate(factors):
                if self.placement.is_of(factor, axis):
                    outer = self.size(product(factors[:position]))
                    return ShardArgs(dim, outer, self.tokens(axis), axis.layout.name, self.rank.world, self.rank.rank)
        raise AssertionError(f"{node} has no dim on {axis}")

    def local_shape(self, node: Node, axis: Axis) -> list[GraphSize]:
        """The shape of `node` with the L local tokens of `axis` for all S."""
        dims = zip(node.meta["val"].shape, self.placement.sweep.dims(node), strict=True)
        return [self._local_size(size_of(n), factors, axis) for n, factors in dims]

    def _local_size(self, size: sympy.Expr, factors: Factors, axis: Axis) -> GraphSize:
        if not any(self.placement.is_of(f, axis) for f in factors):
            return self.size(size)
        rest, length = self.size(sympy.cancel(size / size_of(axis.tokens))), self.length(axis)
        return length if rest == 1 else self.compute(operator.mul, rest, length)

    def tokens(self, axis: Axis) -> GraphSize:
        """S, the number of all tokens of `axis`."""
        return self.size(size_of(axis.tokens))

    def length(self, axis: Axis) -> GraphSize:
        """L, the number of this rank's tokens of `axis`."""
        if axis.index not in self.lengths:
            self.lengths[axis.index] = self.compute(lambda s: axis.layout.length(self.rank.rank, s), self.tokens(axis))
        return self.lengths[axis.index]

    def size(self, expr: sympy.Expr) -> GraphSize:
        """A size expression as an int, or as a node computed from the graph's symbolic inputs.

        Raises UnsupportedError for a symbol that is no input, and for arithmetic that has no node.
        """
        expr = sympy.sympify(expr, strict=True)
        if expr.is_number:
            return int(expr)
        if expr not in self.sizes:
            self.sizes[expr] = self._input_size(expr) if expr.is_Symbol else self._computed_size(expr)
        return self.sizes[expr]

    def _input_size(self, symbol: sympy.Symbol) -> Node:
        node: Node
        for node in self.graph.find_nodes(op="placeholder"):
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt) and value.node.expr == symbol:
                return node
        raise UnsupportedError(f"the size {symbol} is no input of the graph")

    def _computed_size(self, expr: sympy.Expr) -> GraphSize:
        name = type(expr).__name__
        if name not in ARITHMETIC:
            raise UnsupportedError(f"cannot compute the size {expr} in the graph: {name}")
        first, *rest = [self.size(a) for a in expr.args]
        for other in rest:
            first = self.compute(ARITHMETIC[name], first, other)
        return first

    def compute(self, fn: Callable[..., Any], *args: GraphSize) -> GraphSize:
        """`fn` of ints and size nodes; its arithmetic is written into the graph."""
        if not any(isinstance(a, Node) for a in args):
            return int(fn(*args))
        tracer = GraphAppendingTracer(self.graph)
        out = fn(*(Proxy(a, tracer) if isinstance(a, Node) else a for a in args))
        for node in self.graph.nodes:
            if "val" not in node.meta and node.op == "call_function":
                node.meta["val"] = node.target(*fakes(node.args))
        return out.node if isinstance(out, Proxy) else int(out)

    # --- nodes ------------------------------------------------------------------------------------------------------

    def copy(self, node: Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Node:
        """Appends the call of `node` with other arguments.

        What is no ATen op (higher-order ops, mode switches) keeps the fake value that it had.
        """
        if isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem:
            return self.emit(node.target, *args, name=node.name, **kwargs)
        new = self.graph.create_node(node.op, node.target, args, dict(kwargs), name=node.name)
        new.meta.update(node.meta)
        return new

    def emit(self, target: Callable[..., Any], *args: Any, name: str | None = None, **kwargs: Any) -> Node:
        """Appends a call, with its fake value and the metadata of the captured node that it comes from."""
        node = self.graph.create_node("call_function", target, args, kwargs, name=name)
        with self.captured.fake_mode, enable_python_dispatcher(), torch.no_grad():  # which symbolic amounts need
            node.meta["val"] = target(*fakes(args), **fakes(kwargs))
        if self.origin is not None:
            node.meta.update({k: self.origin.meta[k] for k in KEPT_META if k in self.origin.meta})
        if target in (*ops.COMMUNICATING, ops.host_copy) and "recompute" in node.meta:
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        return node

    def emit_by_name(self, target: Any, arguments: dict[str, Any], name: str | None = None) -> Node:
        """Appends a call of an ATen op with its arguments by name."""
        listed = target._schema.arguments
        args = [arguments.get(a.name, a.default_value) for a in listed if not a.kwarg_only]
        named = {a.name: arguments[a.name] for a in listed[len(args) :] if a.name in arguments}
        return self.emit(target, *args, name=name, **named)

    def placeholder(self, name: str, meta: dict[str, Any]) -> Node:
        """Appends an input."""
        node = self.graph.placeholder(name)
        node.meta.update(meta)
        return node


def fakes(args: Any) -> Any:
    """A tree of arguments with the fake value of each node in its place."""
    return map_arg(args, lambda n: n.meta["val"])
