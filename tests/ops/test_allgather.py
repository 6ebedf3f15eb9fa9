"""All keys gathered beside the local tiles, and served together: the same numbers as the ring's, in fewer calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ringpass.layouts.layout import Layout
from ringpass.ops import primitives
from ringpass.schedule.program import program, remote_step
from ringpass.schedule.tiles import Problem
from tests.support.marks import slow
from tests.support.pattern_models import SelfAttention
from tests.support.pipeline_stages import fake_ring, stages
from tests.support.repository import ROOT
from tests.support.sharded_ops import Case, check_attentions

B, H, G, S, D = 2, 4, 2, 37, 4
MASKS = ("True", "k <= q", "q - k < 7 & k <= q", "k <= q & (q - k < 9 | k < 3)", "k < 5")


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(S)
    near = (at <= at[:, None]) & (at[:, None] - at < 9)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=near, enable_gqa=True)


@pytest.mark.parametrize("world", [slow(1), 2, 3, slow(4), slow(5)])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("call", [causal, windowed])
def test_numbers_are_those_of_one_device(call: Callable[..., Tensor], layout: str, world: int) -> None:
    case = Case("scaled_dot_product_attention.default", call, ((B, H, S, D), (B, G, S, D), (B, G, S, D)))
    assert not check_attentions(case, layout, world, comm="allgather")


@pytest.mark.parametrize("world", [3, slow(2), slow(5), 8])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("mask", MASKS)
def test_the_remote_step_has_the_pairs_of_the_ring(mask: str, layout: str, world: int) -> None:
    problem = Problem(mask, 83, 83, Layout(layout, world), Layout(layout, world), tile=8)
    for rank in range(world):
        remote = remote_step(problem, rank)
        found = sum((t.q[1] - t.q[0]) * (t.k[1] - t.k[0]) for t in remote.tiles) if remote else 0
        steps = program(problem, rank).steps[1:]
        assert found == sum((t.q[1] - t.q[0]) * (t.k[1] - t.k[0]) for step in steps for t in step.tiles)
        used = {token for step in steps for a, b in step.tokens for token in range(a, b)}
        assert used == ({token for a, b in remote.tokens for token in range(a, b)} if remote else set())


def forward_nodes(comm: str) -> list[str]:
    """What rank 3 of 8 does in a forward, in graph order: the gather, its wait and the tiles."""
    options: Any = {"compiler": "aot_eager", "layout": "zigzag", "comm": comm, "unroll_limit": 10_000}
    options["outputs"] = "local"
    with fake_ring(3, 8), stages() as seen:
        run = torch.compile(SelfAttention(causal=True), backend="ring_dilated", options=options)
        run(torch.randn(1, 128, 8)).sum().backward()
    kinds = {primitives.start_gather: "gather", primitives.wait: "wait", primitives.attention_tile: "tile"}
    return [kinds[n.target] for n in seen["forward"][0].graph.nodes if n.target in kinds]


def test_the_gather_runs_beside_the_local_tiles_and_the_rest_takes_few_calls() -> None:
    nodes = forward_nodes("allgather")
    assert nodes[0] == "gather" and nodes[1] == "tile" and nodes.count("gather") == nodes.count("wait") == 1
    remote = nodes[nodes.index("wait") :].count("tile")
    assert remote == 2  # both chunks of the rank see one range of keys each, but for its own
    assert forward_nodes("ring").count("tile") > nodes.count("tile")


class EightHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(64, 192)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).view(*x.shape[:2], 3, 8, 8).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)


WAYS: dict[str, dict[str, Any]] = {
    "ring": {"comm": "ring"},
    "all-gather": {"comm": "allgather"},
    **{f"U = {degree}": {"ulysses_degree": degree} for degree in (2, 4, 8)},
}


@pytest.mark.parametrize("way", WAYS)
def test_kernel_calls_are_those_that_the_docs_list(way: str) -> None:
    """Calls of the attention kernel on rank 3 of 8, forward and backward, as docs/ulysses.md has them."""
    options: Any = {
        "compiler": "aot_eager",
        "layout": "zigzag",
        "unroll_limit": 10_000,
        "outputs": "local",
        **WAYS[way],
    }
    with fake_ring(3, 8), stages() as seen:
        run = torch.compile(EightHeads(), backend="ring_dilated", options=options)
        run(torch.randn(1, 8192, 64)).sum().backward()
    forward, backward = (
        [n.target for n in seen[stage][0].graph.nodes].count(target)
        for stage, target in (
            ("forward", primitives.attention_tile), ("backward", primitives.attention_tile_backward)
        )
    )  # fmt: skip
    assert f"| {way} | {forward} | {backward} |" in (ROOT / "docs/ulysses.md").read_text()
