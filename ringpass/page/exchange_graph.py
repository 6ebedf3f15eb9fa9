"""Who sends to whom, as a graph of networkx and as DOT, which Graphviz draws.

>>> steps = [{"step": 1, "receive": {"from": 1, "rows": 4, "bytes": 64}, "tiles": []}]
>>> print(as_dot(exchange_graph([{"rank": 0, "steps": steps}])))
digraph exchanges {
  0 [label="rank 0"];
  1 [label="rank 1"];
  1 -> 0 [label="step 1: 64 B"];
}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import networkx as nx


def exchange_graph(ranks: Sequence[Mapping[str, Any]]) -> nx.MultiDiGraph[int]:
    """An edge for each transfer of a schedule, from the rank that sends, with its `step`, `rows` and `bytes`."""
    graph = nx.MultiDiGraph()
    graph.add_nodes_from(rank["rank"] for rank in ranks)
    for rank in ranks:
        for step in rank["steps"]:
            if got := step.get("receive"):
                about = {"step": step["step"], "rows": got["rows"], "bytes": got["bytes"]}
                graph.add_edge(got["from"], rank["rank"], **about)
    return graph


def as_dot(graph: nx.MultiDiGraph[int], name: str = "exchanges") -> str:
    """The graph in the DOT language."""
    lines = [f'  {rank} [label="rank {rank}"];' for rank in sorted(graph.nodes)]
    for a, b, about in sorted(graph.edges(data=True), key=lambda edge: (edge[2]["step"], edge[0], edge[1])):
        lines.append(f'  {a} -> {b} [label="step {about["step"]}: {about["bytes"]} B"];')
    return "\n".join([f"digraph {name} {{", *lines, "}"])
