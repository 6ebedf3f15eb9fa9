"""Reading FX nodes: their arguments, operands, values and sizes; and writing a traced function before a node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

Size = int | torch.SymInt
"""The size of a dim of a fake tensor."""


def size_of(n: Size) -> sympy.Expr:
    """A dim's size as a sympy expression."""
    return n.node.expr if isinstance(n, torch.SymInt) else sympy.Integer(n)


def hint_of(n: Size) -> int:
    """The value of a length in this compilation."""
    return int(n.node.hint) if isinstance(n, torch.SymInt) else int(n)


def tensors_of(node: Node) -> list[torch.Tensor]:
    """The fake tensors that `node` produces."""
    return [v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, torch.Tensor)]


def args_of(node: Node) -> tuple[Any, ...]:
    """`node.args` for a rule that knows its op's signature; fx's own type for them is a union of all that can be."""
    return node.args


def bound_of(node: Node) -> dict[str, Any]:
    """The arguments of an ATen op by name, but for those that have their default."""
    schema: Any = node.target
    names = [a.name for a in schema._schema.arguments]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def first_of(node: Node) -> Node:
    """The first argument of a node that takes a tensor there."""
    first = node.args[0]
    assert isinstance(first, Node)
    return first


def operands_of(node: Node) -> list[Node]:
    """The operands of `node` that are tensors or tuples of tensors."""
    return [n for n in node.all_input_nodes if tensors_of(n)]


def is_empty(node: Node) -> bool:
    """Whether a tensor has no elements, whatever its symbolic sizes are."""
    return any(isinstance(n, int) and n == 0 for n in node.meta["val"].shape)


def op_name(node: Node) -> str:
    """`add.Tensor` for aten.add.Tensor; other targets by their full name."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removeprefix("aten.")
    return getattr(target, "__name__", str(target))


def slice_of(node: Node) -> tuple[Any, ...]:
    """(dim, start, stop, step) of an `aten.slice`; dim counts from the front."""
    defaults: tuple[Any, ...] = (0, None, None, 1)
    given = args_of(node)[1:]
    dim, *bounds = (*given, *defaults[len(given) :])
    return dim % node.meta["val"].ndim, *bounds


def bytes_of(node: Node) -> int:
    """The bytes of all tensors that `node` produces, at this compilation's lengths."""
    return sum(hint_of(t.numel()) * t.element_size() for t in tensors_of(node))


KEPT_META = ("stack_trace", "nn_module_stack", "source_fn_stack", "recompute", "ac_graph_id")
"""What a node that replaces another one takes over from it."""


def tags_of(node: Node) -> Sequence[torch.Tag]:
    """What torch says of a node's op, such as that it is pointwise."""
    return getattr(node.target, "tags", ())


def mutates(node: Node) -> bool:
    """Whether a node's op changes one of its operands."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def has_effect(node: Node) -> bool:
    """Whether a node stays though nothing reads it: it mutates an input, or switches the grad or autocast mode."""
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    return mutates(node) or name in ("_set_grad_enabled", "_enter_autocast", "_exit_autocast")


# --- writing ----------------------------------------------------------------------------------------------------------


def traced(function: Callable[..., torch.Tensor], operands: Sequence[Node], pre_dispatch: bool = False) -> Graph:
    """The ATen graph of `function` on the fake values of `operands`, which are its placeholders in that order."""
    fakes = [n.meta["val"] for n in operands]
    with fakes[0].fake_mode, torch.no_grad():
        return make_fx(function, pre_dispatch=pre_dispatch)(*fakes).graph


def insert_before(node: Node, graph: Graph, operands: Sequence[Node]) -> Node:
    """Copies `graph`, with `operands` for its placeholders, before `node`; returns the node of its result."""
    placeholders = graph.find_nodes(op="placeholder")
    with node.graph.inserting_before(node):
        out = node.graph.graph_copy(graph, dict(zip(placeholders, operands, strict=True)))
    assert isinstance(out, Node)
    return out
