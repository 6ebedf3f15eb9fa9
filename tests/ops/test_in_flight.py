"""What is in flight or not yet merged is a constant number of blocks, in any order that a compiler may choose."""

from __future__ import annotations

import gc
from typing import Any
from unittest.mock import patch

import networkx as nx
import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.multiprocessing.reductions import StorageWeakRef

from ringpass import Dilation
from ringpass.ops import primitives, ring
from ringpass.patterns import causal, sink, window
from tests.support import thread_ranks
from tests.support.attention_parity import SCALE, of_rank, one_thread
from tests.support.pattern_models import SelfAttention
from tests.support.pipeline_stages import fake_ring, stages
from tests.support.sites import site

WORLD, TOKENS = 8, 128
CASES: dict[str, dict[str, Any]] = {
    "causal in zigzag": {"layout": "zigzag"},
    "causal in stripes": {"layout": "striped", "tile": 8},
    "window and sink": {"layout": "zigzag", "mask": causal() & (window(40) | sink(4)), "tile": 4},
    "dilation": {"layout": "contiguous", "segment_lengths": [16, 128], "dilation_rates": [1, 4]},
}


def lowered(options: dict[str, Any]) -> dict[str, GraphModule]:
    chosen = {"compiler": "aot_eager", "outputs": "local", "unroll_limit": 10_000, **options}
    with fake_ring(3, WORLD), stages() as seen:
        run = torch.compile(SelfAttention(causal=True), backend="ring_dilated", options=chosen)
        run(torch.randn(1, TOKENS, 8)).sum().backward()
    return {stage: seen[stage][0] for stage in ("forward", "backward")}


def before(gm: GraphModule) -> dict[Node, set[Node]]:
    """For each node, those that run before it in any order that keeps data dependencies and the order of starts.

    Code generation keeps the starts in graph order, and a wait writes the buffer that its readers read.
    """
    graph: Any = nx.DiGraph()
    last: Node | None = None
    for node in gm.graph.nodes:
        graph.add_node(node)
        graph.add_edges_from((operand, node) for operand in node.all_input_nodes)
        if node.target is primitives.exchange:
            graph.add_edges_from([(last, node)] if last is not None else [])
            last = node
    return {node: nx.ancestors(graph, node) for node in graph}


def wait_of(exchange: Node) -> Node:
    (received,) = exchange.users
    return next(user for user in received.users if user.target is primitives.wait)


@pytest.mark.parametrize("name", CASES)
def test_two_exchanges_are_in_flight(name: str) -> None:
    for stage, gm in lowered(CASES[name]).items():
        earlier = before(gm)
        exchanges = [node for node in gm.graph.nodes if node.target is primitives.exchange]
        for kind in (0, 1):  # keys, gradients
            some = [x for x in exchanges if x.args[5] % 2 == kind]
            assert len(some) > 2 or (kind == 1 and stage == "forward")
            for first, third in zip(some, some[2:], strict=False):
                assert wait_of(first) in earlier[third], (stage, first, third)
            for first, second in zip(some, some[1:], strict=False):
                assert kind == 0 or wait_of(first) in earlier[second], (stage, first, second)


@pytest.mark.parametrize("name", CASES)
def test_results_are_merged_before_the_next_but_one_launch(name: str) -> None:
    """Of launches in graph order, all that a launch gave is merged or added before the next but one runs."""
    for gm in lowered(CASES[name]).values():
        earlier = before(gm)
        kinds = primitives.attention_tile, primitives.attention_tile_backward
        tiles = [n for n in gm.graph.nodes if n.target in kinds]
        assert len(tiles) > 4
        for first, third in zip(tiles, tiles[2:], strict=False):
            assert first in earlier[third]
            assert not waiting(first, third, earlier), (first, third)


def waiting(first: Node, third: Node, earlier: dict[Node, set[Node]]) -> set[Node]:
    """The merges, sums and messages that take what `first` gave, and that may run after `third`.

    What opens a sum is the sum, and waits for nothing.
    """
    taken = {primitives.merge: 2, torch.ops.aten.add.Tensor: 1, primitives.pack: 0}  # the first operand that is new
    found, reached = set(), [first]
    while reached:
        node = reached.pop()
        for user in node.users:
            if user.target in taken:
                found |= {user} if node in _nodes(user.args[taken[user.target] :]) else set()
            elif not (isinstance(user.target, torch._ops.OpOverload) and user.target.namespace == "ringpass"):
                reached.append(user)
    return {x for x in found if x not in earlier[third]}


def _nodes(args: Any) -> list[Node]:
    return [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, Node)]


@pytest.mark.parametrize("name", ["causal in zigzag", "dilation"])
def test_each_set_of_rows_is_packed_once(name: str) -> None:
    for gm in lowered(CASES[name]).values():
        keys = [n for n in gm.graph.nodes if n.op == "call_function" and "pack" in str(n.target)]
        packed = [repr(n.args) for n in keys]
        assert len(packed) == len(set(packed))
        if name == "causal in zigzag":
            assert sum(n.name.startswith("pack_keys") for n in keys) == 1


LOOPS: dict[str, dict[str, Any]] = {
    "causal": {"mask": "k <= q"},
    "window and sink": {"mask": "k <= q & (q - k < 40 | k < 4)", "tile": 4},
    "dilation": {"mask": "True", "layout": "contiguous", "dilation": Dilation((16, 128), (1, 4)), "heads": 2},
}


def watching(alive: list[list[int]]) -> Any:
    """`Mailboxes.start` that notes the bytes of a rank's received buffers that are alive when it starts an exchange."""
    real, seen = thread_ranks.Mailboxes.start, [list[tuple[StorageWeakRef, int]]() for _ in range(WORLD)]

    def start(self: Any, sent: Any, dst: Any, received: Tensor, src: Any, tag: int, group: str, label: str) -> Any:
        rank = int(group.removeprefix(thread_ranks.NAME))
        seen[rank].append((StorageWeakRef(received.untyped_storage()), received.nbytes))
        alive[rank].append(sum(size for ref, size in seen[rank] if not ref.expired()))
        return real(self, sent, dst, received, src, tag, group, label)

    return patch.object(thread_ranks.Mailboxes, "start", start)


@pytest.mark.parametrize("name", LOOPS)
def test_the_loop_holds_three_blocks(name: str) -> None:
    """While it runs rolled: one block in use, one in flight, and in the backward the gradients of one."""
    about = {"layout": "zigzag", "tile": 16, **LOOPS[name]}

    def job(rank: int, group: str) -> None:
        here = site(tokens=TOKENS, rank=rank, world=WORLD, group=group, scale=SCALE, **about)
        x = of_rank(torch.ones(1, 2, TOKENS, 4), about["layout"], rank, WORLD)
        out, lse = ring.forward(here, x, x, x, [], None)
        ring.backward(here, x, x, x, x, out, lse, [], None)

    alive: list[list[int]] = [[] for _ in range(WORLD)]
    gc.disable()  # reference counts alone must free a block
    try:
        with one_thread(), watching(alive), torch.no_grad():
            thread_ranks.run(WORLD, job)
    finally:
        gc.enable()
    block = 2 * of_rank(torch.ones(1, 2, TOKENS, 4), about["layout"], 0, WORLD).nbytes
    assert block / 4 < max(max(sizes) for sizes in alive) <= 3 * block, [max(sizes) / block for sizes in alive]
