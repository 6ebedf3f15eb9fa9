"""pooling: the all-to-alls of a Ulysses degree, started when what they send is there, waited for where it is read.

    pool_tokens([q], ..)  ->  pack_heads_4to8_of_ranks_0to2, start_heads_4to8_of_ranks_0to2       after q
                              wait_heads_4to8_of_ranks_0to2, unpack_heads_4to8_of_ranks_0to2      before the first use

So that of the queries is under way while keys and values are projected, and that of a gradient beside what does not
need it.

Contract: runs before ring operators are unrolled, so that all-to-alls start at a place that does not depend on the
rank, in the same order on all ranks.  One of symbolic sizes, or that sends nothing, stays as it is.
"""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Graph, Node

from ringpass import ops
from ringpass.comm.pooling import contents
from ringpass.layouts.pooling import Pooling
from ringpass.nodes import symbolic
from ringpass.ops import pooling, primitives
from ringpass.passes.lower.gradient_sums import call, ready_after

BACK = {ops.pool_tokens: False, ops.return_tokens: True}


def start_pooling_early(graph: Graph) -> None:
    """Splits each `pool_tokens` and `return_tokens` of `graph` into its steps.  In place."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in BACK and not symbolic(node):
            _split(graph, node, BACK[node.target])


def _split(graph: Graph, node: Node, back: bool) -> None:
    given: Any = node.args[0]
    rest: tuple[Any, ...] = node.args[1:] if back else (0, *node.args[1:])
    all_heads, *about, label, group = rest
    how, values = Pooling(*about), [x.meta["val"] for x in given]
    if how.layout.replicated:
        return
    received, sent = contents(values).splits(how, back)
    name = _name(how, back)
    nodes: list[Node] = list(graph.nodes)
    order = {n: i for i, n in enumerate(nodes)}
    with graph.inserting_before(nodes[ready_after(nodes, order, given)]):
        message = call(graph, pooling.pack_heads, (given, back, *about), f"pack_{name}")
        started = [message], received, sent, f"{label} {name}", group
        buffers = call(graph, pooling.start_all_to_all, started, f"start_{name}")
        arriving = call(graph, operator.getitem, (buffers, 0), f"arriving_{name}")
    uses = [user for result in node.users for user in result.users]
    with graph.inserting_before(min(uses, key=order.__getitem__) if uses else node):
        complete = call(graph, primitives.wait, (arriving,), f"wait_{name}")
        holds = contents(values)
        shape = holds.batch, list(holds.widths), values[0].dtype, all_heads, back
        parts = call(graph, pooling.unpack_heads, (complete, *shape, *about), f"unpack_{name}")
        for result in list(node.users):
            result.replace_all_uses_with(call(graph, operator.getitem, (parts, result.args[1]), result.name))
            graph.erase_node(result)
    graph.erase_node(node)


def _name(how: Pooling, back: bool) -> str:
    """Which heads travel, and between which ranks: `heads_4to8_of_ranks_0to2`."""
    ranks = f"ranks_{how.neighbours.start}to{how.neighbours.stop}"
    return f"heads_{min(how.own)}to{max(how.own) + 1}_{'back_to' if back else 'of'}_{ranks}"
