"""Attention calls, as far as dims go: the plan partitions those that it can, the others run replicated."""

from __future__ import annotations

import re

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ringpass.nodes import args_of
from ringpass.passes.op_rules.spec import OpRule
from ringpass.passes.propagate.factors import Dims, Note, Sweep

LOWERED = re.compile(r"(scaled_dot_product|flex_attention)(?!.*backward)")
"""Names of forward attention ops, also after AOTAutograd has replaced them by fused ones."""


def _attention(sweep: Sweep, node: Node, note: Note) -> Dims:
    return _output(sweep, node, note, node.meta["val"])


def _flex_attention(sweep: Sweep, node: Node, note: Note) -> tuple[Dims, ...]:
    """Its output, and two numbers per row: log-sum-exp and maximum."""
    out = _output(sweep, node, note, node.meta["val"][0])
    return out, out[:-1], out[:-1]


def _output(sweep: Sweep, node: Node, note: Note, value: Tensor) -> Dims:
    """The dims of the queries, with the width of the values; where keys broadcast a dim of the queries, a new one."""
    rank = value.ndim
    q, k, v = (((),) * (rank - len(d)) + d for d in (sweep.dims(n) for n in args_of(node)[:3]))
    sweep.broadcast([q[:1], k[:1], v[:1]], note)
    sweep.tie(k[-2], v[-2], note)
    return tuple(d if d else sweep.new(n) for d, n in zip((*q[:-1], v[-1]), value.shape, strict=True))


def attentions(graph: Graph) -> list[Node]:
    """The attention ops of a graph and of the graphs inside it, forward ones only."""
    found = []
    for node in graph.nodes:
        if node.op == "call_function" and LOWERED.search(str(node.target)):
            found.append(node)
        elif node.op == "get_attr" and isinstance(graph.owning_module, GraphModule):
            inner = getattr(graph.owning_module, str(node.target).split(".")[0], None)
            found += attentions(inner.graph) if isinstance(inner, GraphModule) else []
    return found


RULES = {
    "scaled_dot_product_attention.default": OpRule(_attention, computes=True, attention=True),
    "flex_attention": OpRule(_flex_attention, attention=True),
}
