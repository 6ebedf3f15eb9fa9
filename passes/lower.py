"""lower: the forward and backward graphs that AOTAutograd derived -> the graphs that are compiled.

`ringpass::replicate` has done its work once autograd has run: it is an identity, and leaves the graph.  The ring attention ops
stay rolled: one node each, whose body is the loop of `ringpass.ring`.

Contract: runs on the forward and on the backward graph of every compilation, nested graphs included; `uuid` names the
source of this pass and the rank, so that no compile cache serves one rank's graph to another.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch.fx import Graph, GraphModule

from ringpass import ops


def lower(graph: Graph) -> None:
    """Rewrites `graph` in place."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is ops.replicate:
            for user in list(node.users):
                assert user.target is operator.getitem, user
                user.replace_all_uses_with(node.args[0][user.args[1]])
                graph.erase_node(user)
            graph.erase_node(node)


def lower_module(gm: GraphModule, show: Callable[[GraphModule], None]) -> GraphModule:
    """Lowers a graph module and every graph module inside it, then shows it."""
    for module in gm.modules():
        if isinstance(module, GraphModule):
            lower(module.graph)
            module.recompile()
    show(gm)
    return gm


def has_leftover(graph: Graph) -> bool:
    """Whether a node of `graph` is a `replicate`, which no compiled graph may hold."""
    return any(n.op == "call_function" and n.target is ops.replicate for n in graph.nodes)


assert torch.ops.ringpass.replicate.default is ops.replicate
