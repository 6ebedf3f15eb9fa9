"""The lowered graphs: every step is a named node; transfers start before the tiles that hide them."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch._inductor import comm_analysis, ir
from torch._inductor.scheduler import Scheduler
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from ringpass import ops
from ringpass.errors import UnsupportedError
from ringpass.ops import masked_steps, primitives
from ringpass.passes.lower.lower import lower
from tests.support.described_gpu import code_of
from tests.support.generated_code import TILES, check_transfers, ring_calls, transfers
from tests.support.marks import slow
from tests.support.model_parity import parity, worst
from tests.support.models import MODELS, WIDTH, Block, batch_for
from tests.support.pipeline_stages import compile_step, fake_ring, stages
from tests.support.process_ranks import Workers
from tests.support.whole_steps import whole_steps

LAYERS = 2


@pytest.fixture(scope="module")
def lowered() -> dict[str, GraphModule]:
    """Forward and backward of a padded GPT-2 on rank 1 of 4."""
    with fake_ring(1, 4):
        seen = compile_step("gpt2", 23, True)
    return {stage: graphs[0] for stage, graphs in seen.items()}


def named(gm: GraphModule) -> str:
    return "\n".join(n.name for n in gm.graph.nodes)


def test_every_step_is_a_named_node(lowered: dict[str, GraphModule]) -> None:
    forward, backward = named(lowered["forward"]), named(lowered["backward"])
    for name in (
        "permute_zigzag",
        "send_step1_to_rank2",
        "receive_step1_from_rank0",
        "wait_step1",
        "mask_step0",
        "merge_step1",
    ):
        assert name in forward, name
    for step in range(4):
        assert f"attention_step{step}_q" in forward and f"attention_backward_step{step}_q" in backward
    for step in (1, 2, 3):
        for name in (
            f"send_gradients_step{step}_to",
            f"receive_gradients_step{step}_from",
            f"wait_gradients_step{step}",
        ):
            assert name in backward, name
    assert "mask_step0" in backward and "receive_step2_from_rank3" in backward


@pytest.mark.parametrize("stage", ("forward", "backward"))
def test_nothing_is_left_rolled(lowered: dict[str, GraphModule], stage: str) -> None:
    targets = {n.target for n in lowered[stage].graph.nodes}
    assert not targets & {ops.ring_attention, ops.ring_attention_backward, ops.replicate}
    assert torch.ops.aten.scaled_dot_product_attention.default not in targets


@pytest.mark.parametrize("stage", ("forward", "backward"))
def test_transfers_start_before_the_tiles_that_hide_them(lowered: dict[str, GraphModule], stage: str) -> None:
    nodes = list(lowered[stage].graph.nodes)
    at = {n: i for i, n in enumerate(nodes)}
    exchanges = [n for n in nodes if n.target is primitives.exchange]
    assert exchanges
    hidden = 0
    for exchange in exchanges:
        (received,) = exchange.users
        waits = [u for u in received.users if u.target is primitives.wait]
        tiles = [u for u in received.users if u.target in TILES]
        assert len(waits) == 1 and set(received.users) == {*waits, *tiles}
        assert all(at[exchange] < at[tile] < at[waits[0]] for tile in tiles)
        hidden += bool(tiles)
    assert hidden >= len(exchanges) - sum(n.name.startswith("receive_gradients_step3") for n in exchanges)


Sizes = dict[str, set[int]]
"""How many ranks each collective has, by the name of its op."""


def generate(unroll_limit: int) -> tuple[dict[str, tuple[str, GraphModule]], Sizes]:
    """The code that Inductor generates on rank 1 of 3, each stage with its graph, and its collectives' ranks."""
    sizes: Sizes = {}
    codegen = Scheduler.codegen

    def estimating(scheduler: Scheduler) -> None:
        for node in (scheduled.node for scheduled in scheduler.nodes):
            if isinstance(node, ir._CollectiveKernel) and not isinstance(node, ir._WaitKernel):
                comm_analysis.estimate_nccl_collective_runtime(node)
                name = str(node.op_overload)
                sizes.setdefault(name, set()).add(comm_analysis.get_collective_group_size(node))
        codegen(scheduler)

    with fake_ring(1, 3), stages() as seen, patch.object(Scheduler, "codegen", estimating):
        options: Any = {"layout": "zigzag", "unroll_limit": unroll_limit}
        run: Any = torch.compile(MODELS["nanogpt"].make(), backend="ring_dilated", options=options)
        codes = code_of(lambda: run(**batch_for("nanogpt", 23)))
    return {stage: (code, seen[stage][0]) for stage, code in zip(("forward", "backward"), codes, strict=True)}, sizes


@pytest.fixture(scope="module")
def unrolled() -> tuple[dict[str, tuple[str, GraphModule]], Sizes]:
    return generate(128)


@pytest.fixture(scope="module")
def generated(unrolled: tuple[dict[str, tuple[str, GraphModule]], Sizes]) -> dict[str, tuple[str, GraphModule]]:
    """The code of forward and backward, each with its lowered graph."""
    return unrolled[0]


@pytest.mark.parametrize(("stage", "tile", "tiles"), [("forward", TILES[0], 6), ("backward", TILES[1], 10)])
def test_generated_code_overlaps_in_order(
    generated: dict[str, tuple[str, GraphModule]], stage: str, tile: Any, tiles: int
) -> None:
    code, graph = generated[stage]
    check_transfers(code, graph)
    assert [call.op for call in ring_calls(code)].count(tile.name().split("::")[1].split(".")[0]) == tiles


def test_generated_code_that_waits_at_once_is_found(generated: dict[str, tuple[str, GraphModule]]) -> None:
    code, graph = generated["forward"]
    lines = code.splitlines()
    first = transfers(code)[0]
    wait = lines.pop(first.wait - 1)
    lines.insert(first.start + 1, wait)  # after the line that names what is received
    with pytest.raises(AssertionError):
        check_transfers("\n".join(lines), graph)


def check_sizes(sizes: Sizes, *attention: str) -> None:
    """That Inductor finds the number of ranks by the last argument; errors but TypeError would stop a compilation."""
    assert {f"ringpass.{name}.default" for name in (*attention, "start_sum")} <= set(sizes)
    assert all(found == {3} for found in sizes.values()), sizes


def test_inductor_can_estimate_the_time_of_every_collective(
    unrolled: tuple[dict[str, tuple[str, GraphModule]], Sizes],
) -> None:
    check_sizes(unrolled[1], "exchange")


@pytest.mark.slow
def test_inductor_can_estimate_the_time_of_a_rolled_attention() -> None:
    check_sizes(generate(0)[1], "ring_attention", "ring_attention_backward")


def test_every_op_names_its_group_last() -> None:
    for name in torch.ops.ringpass:
        arguments = [a.name for a in getattr(torch.ops.ringpass, name).default._schema.arguments]
        assert "group" not in arguments[:-1], name


def test_one_rank_with_nothing_asked_is_plain_inductor() -> None:
    codes = []
    for backend in ("inductor", "ring_dilated"):
        torch._dynamo.reset()
        run: Any = torch.compile(Block(causal=True), backend=backend)
        code = code_of(lambda: run(torch.randn(2, 23, WIDTH)))  # noqa: B023
        codes.append(["\n".join(line for line in c.splitlines() if not line.startswith("#")) for c in code])
    assert codes[0] == codes[1] and len(codes[0]) == 2


@pytest.mark.parametrize("limit", (0, slow(10_000)))
@pytest.mark.parametrize(("name", "padding"), [("gpt2", True), slow("cross", False)])
def test_rolled_and_unrolled_numbers(workers: Workers, name: str, padding: bool, limit: int) -> None:
    error, where = worst(workers.run(parity, 4, name, 23, True, padding, unroll_limit=limit, tile=4))
    assert error < 1e-10, where


def test_leftover_wait_is_refused() -> None:
    """An exchange that is never waited for would hold its buffer for ever: the ops pair up in every lowered graph."""
    with fake_ring(2, 5):
        seen = compile_step("nanogpt", 23, False)
    for stage in ("forward", "backward"):
        nodes: list[Node] = list(seen[stage][0].graph.nodes)
        assert (
            sum(n.target is primitives.exchange for n in nodes) == sum(n.target is primitives.wait for n in nodes) > 0
        )


def test_layers_with_one_mask_share_their_block_lists() -> None:
    with fake_ring(1, 4), whole_steps():
        seen = compile_step("gpt2", 23, True)
    for stage, step in (("forward", masked_steps.attention_step), ("backward", masked_steps.attention_step_backward)):
        nodes: list[Node] = list(seen[stage][0].graph.nodes)
        lists = [n for n in nodes if n.target is masked_steps.block_lists]
        calls = [n for n in nodes if n.target is step]
        assert len(lists) == 4 and len(calls) == 4 * LAYERS  # one for each step of the ring
        assert not any(n.target in TILES for n in nodes)
        assert [n.name for n in lists] == sorted(n.name for n in lists) and "block_lists_step0" in lists[0].name
        assert all(len(x.users) == LAYERS for n in lists for x in n.users)


def test_an_attention_that_was_not_partitioned_is_refused(lowered: dict[str, GraphModule]) -> None:
    x = torch.empty(1, 2, 5, 4)

    def attend(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    inner = make_fx(attend, pre_dispatch=True)(x)
    graph = Graph()
    graph.output(graph.create_node("get_attr", "body"))
    nested = GraphModule({"body": inner}, graph)
    for left in (inner.graph, nested.graph):
        with pytest.raises(UnsupportedError, match="1 attention ops are left after partitioning where the plan has 0"):
            lower(left, 128, 0)
        lower(left, 128, 1)


class NoAttention(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def test_graphs_without_attention_are_left_alone() -> None:
    with fake_ring(0, 2):
        x = torch.ones(3)
        assert torch.equal(
            torch.compile(NoAttention(), backend="ring_dilated", options={"compiler": "aot_eager"})(x), x * 2
        )


@pytest.mark.parametrize("ranks", (slow(1), 2, slow(3), slow(5)))
def test_gathered_keys_give_the_same_numbers(workers: Workers, ranks: int) -> None:
    for name, padding, limit in (("gpt2", True, 10_000), ("cross", False, 0)):
        results = workers.run(parity, ranks, name, 23, True, padding, comm="allgather", unroll_limit=limit, tile=4)
        error, where = worst(results)
        assert error < 1e-10, where
