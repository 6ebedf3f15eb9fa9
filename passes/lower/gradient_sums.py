"""gradient_sums: sums of gradients over ranks, started when the last gradient of a bucket is there.

    reduce_list([g0, g1, ..])  ->  start_gradients_bucket0                             after the last of g0, g1, ..
                                   wait_gradients_bucket0, unpack_gradients_bucket0    before the first use of a sum

Sums that are returned, as those of parameters, are waited for at the end of the graph.  Buckets are numbered in the
order in which they start.  Until it is waited for, a bucket holds one flat buffer, in the dtype in which gradients are
added (float32, float64), in place of its gradients.

Contract: runs before ring operators are unrolled, so that sums start between sites, at a place that does not depend on
the rank.  A `reduce_list` of symbolic sizes stays as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.fx import Graph, Node, map_arg

from ringpass import ops
from ringpass.comm.all_reduce import by_sum_dtype
from ringpass.nodes import symbolic
from ringpass.ops import gradient_sums

ORIGINS = ("placeholder", "get_attr")


def start_early(graph: Graph) -> None:
    """Splits each `reduce_list` of `graph` into its start and its wait.  In place."""
    nodes = list(graph.nodes)
    position = {node: i for i, node in enumerate(nodes)}

    def ready(node: Node) -> int:
        return ready_after(nodes, position, node.all_input_nodes)

    sums = [n for n in nodes if n.op == "call_function" and n.target is ops.reduce_list and not symbolic(n)]
    places = []
    for node in sorted(sums, key=ready):
        users = [user for result in node.users for user in result.users]
        used = [ready(user) if user in sums else position[user] for user in users]
        places.append((node, nodes[ready(node)], nodes[min(used, default=len(nodes) - 1)]))
    for number, (node, started, awaited) in enumerate(places):
        _split(graph, node, f"bucket{number}", started, awaited)
    for node in sums:
        for result in list(node.users):
            graph.erase_node(result)
        graph.erase_node(node)


def ready_after(nodes: Sequence[Node], position: Mapping[Node, int], operands: Iterable[Node]) -> int:
    """The position among `nodes` from which on all operands are there, and nothing is an input of the graph."""
    first = next(i for i, node in enumerate(nodes) if node.op not in ORIGINS)
    return max(first, *(position[x] + 1 for x in operands))


def _split(graph: Graph, node: Node, bucket: str, started: Node, used: Node) -> None:
    """Writes the start of a sum before the node `started` and its wait before the node `used`."""
    gradients: Any = node.args[0]
    silent = ops.silent(len(gradients), *node.args[1:3])  # type: ignore[arg-type]
    values = [x.meta["val"] for x in gradients]
    results = {user.args[1]: user for user in node.users}
    messages = by_sum_dtype([x.dtype for x in values])
    for dtype, mine in messages.items():
        name = bucket if len(messages) == 1 else f"{bucket}_{_name(dtype)}"
        with graph.inserting_before(started):
            quiet = [mine.index(i) for i in silent if i in mine]
            summed = [gradients[i] for i in mine], quiet, dtype, node.args[-1]
            sent = call(graph, gradient_sums.start_sum, summed, f"start_gradients_{name}")
        with graph.inserting_before(used):
            total = call(graph, gradient_sums.wait_sum, (sent, node.args[-1]), f"wait_gradients_{name}")
            layout = [values[i].numel() for i in mine], [_name(values[i].dtype) for i in mine]
            parts = call(graph, gradient_sums.unpack_gradients, (total, *layout), f"unpack_gradients_{name}")
            for k, i in enumerate(mine):
                if i in results:
                    part = call(graph, operator.getitem, (parts, k), f"gradient_{name}")
                    whole = (part, list(values[i].shape))
                    shaped = call(graph, torch.ops.aten.view.default, whole, f"gradient_{name}_view")
                    results[i].replace_all_uses_with(shaped)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def call(graph: Graph, target: Any, args: tuple[Any, ...], name: str) -> Node:
    """A new node with its fake value, where `graph` inserts."""
    node = graph.create_node("call_function", target, args, name=name)
    values = map_arg(args, lambda n: n.meta["val"])
    mode: Any = detect_fake_mode(values)
    with mode:
        node.meta["val"] = target(*values)
    return node
