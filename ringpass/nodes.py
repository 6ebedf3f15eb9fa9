"""Reading FX nodes: their arguments, operands, values and sizes; and writing a traced function before a node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

Size = int | torch.SymInt
"""The size of a dim of a fake tensor."""


def size_of(n: Size | sympy.Expr) -> sympy.Expr:
    """A dim's size as a sympy expression."""
    return n.node.expr if isinstance(n, torch.SymInt) else sympy.sympify(n, strict=True)


def symbolic(node: Node) -> bool:
    """Whether an operand of `node` is, or has, a symbolic size."""
    values = pytree.tree_leaves([n.meta["val"] for n in node.all_input_nodes])
    sizes = [s for v in values for s in (v.shape if isinstance(v, torch.Tensor) else [v])]
    return any(isinstance(s, torch.SymInt) for s in sizes)


def hint_of(n: Size) -> int:
    """The value of a length in this compilation; 1 for one that depends on data."""
    return int(1 if n.node.hint is None else n.node.hint) if isinstance(n, torch.SymInt) else int(n)


def tensors_of(node: Node) -> list[torch.Tensor]:
    """The fake tensors that `node` produces."""
    return [v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, torch.Tensor)]


def args_of(node: Node) -> tuple[Any, ...]:
    """`node.args` for code that knows the op's signature; fx types them as a union of everything they may be."""
    return node.args


def bound_of(node: Node) -> dict[str, Any]:
    """The arguments of an ATen op by name, without those that have their default."""
    schema = schema_of(node)
    assert schema is not None, node
    names = [a.name for a in schema.arguments]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def defaults_of(node: Node) -> dict[str, Any]:
    """The defaults of the arguments of an ATen op by name."""
    schema = schema_of(node)
    return {a.name: a.default_value for a in schema.arguments if a.has_default_value()} if schema else {}


def schema_of(node: Node) -> torch.FunctionSchema | None:
    """The schema of the op that `node` calls; None if it calls something else."""
    return node.target._schema if isinstance(node.target, OpOverload) else None


def first_of(node: Node) -> Node:
    """The first argument of a node that takes a tensor there."""
    first = node.args[0]
    assert isinstance(first, Node)
    return first


def operands_of(node: Node) -> list[Node]:
    """The operands of `node` that are tensors or tuples of tensors."""
    return [n for n in node.all_input_nodes if tensors_of(n)]


def is_empty(node: Node) -> bool:
    """Whether the tensor that `node` produces has no elements, whatever its symbolic sizes are."""
    return any(isinstance(n, int) and n == 0 for n in node.meta["val"].shape)


def op_name(node: Node) -> str:
    """`add.Tensor` for aten.add.Tensor, `ringpass.gather.default` for an op of another library.

    The `__name__` of a target that is a function; else the target as text.
    """
    target = node.target
    if isinstance(target, OpOverload):
        return str(target).removeprefix("aten.")
    return getattr(target, "__name__", str(target))


def slice_of(node: Node) -> tuple[Any, ...]:
    """(dim, start, stop, step) of an `aten.slice`; dim counts from the front."""
    defaults: tuple[Any, ...] = (0, None, None, 1)
    given = args_of(node)[1:]
    dim, *bounds = (*given, *defaults[len(given) :])
    return dim % node.meta["val"].ndim, *bounds


def source_line(node: Node | None) -> str:
    """The model's line that a node comes from, and its text; empty where that is not known."""
    lines = (node.meta.get("stack_trace") or "").strip().splitlines() if node is not None else []
    files = [i for i, line in enumerate(lines) if line.strip().startswith("File ")]
    return " ".join(line.strip() for line in lines[files[-1] : files[-1] + 2]) if files else ""


def bytes_of(node: Node) -> int:
    """Size in bytes of the tensors that `node` produces, in this compilation."""
    return sum(hint_of(t.numel()) * t.element_size() for t in tensors_of(node))


KEPT_META = ("stack_trace", "nn_module_stack", "source_fn_stack", "recompute", "ac_graph_id")
"""The entries of `meta` that a node takes over from the node that it replaces."""


MODE_SWITCHES = ("_set_grad_enabled", "_enter_autocast", "_exit_autocast")
"""Names of the functions that switch the grad and autocast modes of the nodes after them."""


def tags_of(node: Node) -> Sequence[torch.Tag]:
    """What torch says of a node's op, such as that it is pointwise."""
    return getattr(node.target, "tags", ())


def mutates(node: Node) -> bool:
    """Whether a node's op changes one of its operands."""
    schema = schema_of(node)
    return schema is not None and bool(schema.is_mutable)


def has_effect(node: Node) -> bool:
    """Whether `node` stays though nothing reads it: it mutates an input, or switches grad mode or autocast."""
    if node.op != "call_function":
        return False
    return mutates(node) or getattr(node.target, "__name__", "") in MODE_SWITCHES


def returned_or_written(node: Node) -> bool:
    """Whether the program must hand on this very input: it is an output, or changed in place."""
    return any(user.op == "output" or has_effect(user) for user in node.users)


def outside_no_grad(node: Node, keeps: bool) -> bool:
    """Whether the nodes after this one are outside the model's no_grad regions; `keeps`: whether this one is."""
    switches = node.target is torch._C._set_grad_enabled
    return bool(node.args[0]) or not torch.is_grad_enabled() if switches else keeps


# --- writing ----------------------------------------------------------------------------------------------------------


def traced(function: Callable[..., Any], operands: Sequence[Node], pre_dispatch: bool = False) -> Graph:
    """The ATen graph of `function` on the fake values of `operands`, which are its placeholders in that order."""
    fakes = [n.meta["val"] for n in operands]
    with fakes[0].fake_mode, torch.no_grad():
        return make_fx(function, pre_dispatch=pre_dispatch)(*fakes).graph


def insert_before(node: Node, graph: Graph, operands: Sequence[Node]) -> Any:
    """Copies `graph`, with `operands` for its placeholders, before `node`; returns its result, one node or several."""
    placeholders = graph.find_nodes(op="placeholder")
    with node.graph.inserting_before(node):
        return node.graph.graph_copy(graph, dict(zip(placeholders, operands, strict=True)))
