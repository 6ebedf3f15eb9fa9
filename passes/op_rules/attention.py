"""Attention calls, as far as dims go: the plan partitions those that it can.

The others run as the model wrote them: on shards of the batch, where its rows are divided, else replicated.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ringpass.nodes import args_of, bound_of
from ringpass.passes.op_rules.spec import OpRule, Placed
from ringpass.passes.propagate.factors import Dims, Note, Sweep

SDPA = torch.ops.aten.scaled_dot_product_attention.default
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
    rank, mask = value.ndim, _mask(node)
    q, k, v = (((),) * (rank - len(d)) + d for d in (sweep.dims(n) for n in args_of(node)[:3]))
    rows = [sweep.dims(mask)[:1]] if mask is not None and mask.meta["val"].ndim == rank > 2 else []
    sweep.broadcast([q[:1], k[:1], v[:1], *rows], note)
    sweep.tie(k[-2], v[-2], note)
    note.need_replication += [f for d in (*q[1:], *k[1:], *v[1:]) for f in d]  # rows of the batch alone are independent
    return tuple(d if d else sweep.new(n) for d, n in zip((*q[:-1], v[-1]), value.shape, strict=True))


def _mask(node: Node) -> Node | None:
    """The mask that an attention reads; None: it reads none, or none that is a tensor."""
    given = bound_of(node).get("attn_mask") if node.target is SDPA else None
    return given if isinstance(given, Node) else None


def _alone(placement: Placed, node: Node) -> bool:
    """An attention on shards of the batch: not one that drops at random, or whose mask is a function of all rows."""
    return node.target is SDPA and not bound_of(node).get("dropout_p")


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
    "scaled_dot_product_attention.default": OpRule(_attention, computes=True, attention=True, may_shard=_alone),
    "flex_attention": OpRule(_flex_attention, attention=True, may_shard=_alone),
}
