"""Tiles that share a kernel call: thin ones of the same query rows, and stacks of one shape, row after row."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from ringpass import patterns
from ringpass.layouts.layout import Layout
from ringpass.masks.expr import parse
from ringpass.masks.intervals import FULL, PARTIAL
from ringpass.ops import primitives, ring
from ringpass.ops.accumulate import LABEL
from ringpass.schedule.cost import _begins_launch, refine
from ringpass.schedule.launches import STACK, Launch, launches
from ringpass.schedule.program import program
from ringpass.schedule.proof import prove
from ringpass.schedule.site import Site
from ringpass.schedule.tiles import CAUSAL_TILE, THIN, TILE, Problem, Tile, tiling
from tests.support import sites, thread_ranks
from tests.support.attention_parity import SCALE, check_ranks, of_rank, one_thread

TOKENS, HEADS, WIDTH, SEED = 43, 2, 4, torch.tensor(5)
COLUMNS = "k < 4 | k >= 12 & k < 16 | k >= 30 & k < 33"
KINDS = {"nothing": "", "a bias": "-0.1 * (q - k)", "a learned bias": f"x0[h, q - k + {TOKENS}]", "dropout": ""}


def site(kind: str, rank: int, world: int, group: str, layout: str) -> Site:
    learned, dropped = (0,) if "learned" in kind else (), 0.3 if kind == "dropout" else 0.0
    scores = {"bias": KINDS[kind], "scale": SCALE, "dropout": dropped, "stream": 1, "learned": learned}
    return sites.site(COLUMNS, TOKENS, layout, rank, world, 12, group=group, **scores)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense(kind: str, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, table: Tensor) -> list[Tensor]:
    """[out, dq, dk, dv, dtable] by the dense matrix of scores."""
    whole = site(kind, 0, 1, "", "contiguous")
    spans = 2, HEADS, [0, TOKENS], [0, TOKENS]
    inputs = [x.clone().requires_grad_() for x in (q, k, v, table)]
    scores = inputs[0] @ inputs[1].mT * SCALE
    at = torch.arange(TOKENS)
    apart = at.view(-1, 1) - at
    scores = scores + (inputs[3][:, apart + TOKENS] if "learned" in kind else 0.0)
    scores = scores - (0.1 * apart if kind == "a bias" else 0.0)
    weights = scores.masked_fill(~primitives.mask_tile([], q, COLUMNS, *spans), -torch.inf).softmax(-1)
    if kind == "dropout":
        kept = primitives.keep_tile(SEED, whole.stream, whole.dropout, whole.dropout_indices, *spans)
        weights = weights * kept / (1 - whole.dropout)
    out = weights @ inputs[2]
    return [out.detach(), *torch.autograd.grad(out, inputs, grad, materialize_grads=True)]


@pytest.mark.parametrize("world", (1, 2, 3))
@pytest.mark.parametrize("kind", KINDS)
def test_they_give_the_same_numbers(kind: str, world: int) -> None:
    q, k, v, grad = (random(2, HEADS, TOKENS, WIDTH, seed=i) for i in range(4))
    table = random(HEADS, 2 * TOKENS, seed=4)
    for text in (COLUMNS, KINDS[kind]):
        parse(text or "True")  # once for all threads

    def job(rank: int, group: str) -> list[Tensor]:
        here = site(kind, rank, world, group, "zigzag")
        mine = [of_rank(x, "zigzag", rank, world) for x in (q, k, v, grad)]
        leaves = [table] if "learned" in kind else []
        with torch.no_grad():
            out, lse = ring.forward(here, mine[0], mine[1], mine[2], leaves, SEED)
            dq, dk, dv, learned = ring.backward(here, mine[3], mine[0], mine[1], mine[2], out, lse, leaves, SEED)
        return [out, dq, dk, dv, *learned]

    with one_thread():
        found, wanted = thread_ranks.run(world, job), dense(kind, q, k, v, grad, table)
    assert (
        max(len(launch.tiles) for rank in range(world) for launch in of_site(site(kind, rank, world, "", "zigzag"), q))
        > 1
    )
    check_ranks([x[:4] for x in found], wanted[:4], "zigzag", 1e-11, kind)
    if "learned" in kind:
        torch.testing.assert_close(sum(x[4] for x in found), wanted[4])


def of_site(here: Site, q: Tensor) -> list[Launch]:
    return [launch for step in here.program.steps for launch in here.launches(step.tiles, q.shape[0])]


def problem(mask: patterns.Pattern | str, tokens: int, tile: int, world: int = 1) -> Problem:
    here = Layout("contiguous", world)
    return Problem(str(mask), tokens, tokens, here, here, tile)


def test_global_keys_join_the_window() -> None:
    p = problem(patterns.window(351, 351) | patterns.global_tokens(64), 8192, 512)
    prove(p)
    together = [launch.tiles for launch in launches(program(p, 0).steps[0].tiles, stack=0)]
    thin = [some for some in together if len(some) == 1 and some[0].k[1] - some[0].k[0] == 64 and some[0].q[1] > 64]
    assert sum(len(some) == 2 for some in together) > 10 and not [t for (t,) in thin if t.q[1] - t.q[0] == 512]


@pytest.mark.parametrize("most", (TILE, 300))
def test_no_call_is_larger_than_it_may_be(most: int) -> None:
    p = problem(patterns.random_blocks(4096, 64, 24), 4096, 64)
    tiles = program(p, 0).steps[0].tiles
    together = [launch.tiles for launch in launches(tiles, most, stack=0)]
    assert sorted(str(t) for some in together for t in some) == sorted(map(str, tiles))
    widths = [[t.k[1] - t.k[0] for t in some] for some in together]
    assert max(map(len, widths)) > 1 and all(len(some) == 1 or sum(some) <= most for some in widths)
    assert all({t.q for t in some} == {some[0].q} for some in together)
    assert all(len(some) == 1 or min(some) < THIN for some in widths)


def test_tiles_are_as_fine_as_blocks() -> None:
    """A tile of blocks of 64 that is larger than these has to be computed in full."""
    p = problem(patterns.random_blocks(8192, 64, 8), 8192, TILE)
    assert refine([p], "cpu") == 64
    fine = replace(p, tile=64)
    assert _begins_launch(tiling(fine)).sum() == len(launches(program(fine, 0).steps[0].tiles, stack=0)) == 8192 // 64


def test_the_price_counts_calls() -> None:
    lonely = tiling(problem("True", 4096, 64))
    assert _begins_launch(lonely).tolist() == [True]
    assert _begins_launch(tiling(problem("False", 4096, 64))).tolist() == []
    columns = "k < 200 | " + " | ".join(f"k >= {i} & k < {i + 200}" for i in range(300, 2700, 300))
    assert _begins_launch(tiling(problem(columns, 4096, 64))).sum() == 2  # 1,800 keys, in calls of 1,024


# --- stacks -----------------------------------------------------------------------------------------------------------

STACKED = {
    "window": "k <= q & q - k < 25",
    "window on both sides": "abs(q - k) <= 13",
    "local + global": "abs(q - k) <= 13 | k < 4 | q < 4",
    "local + global, large tiles": "abs(q - k) <= 50 | k < 4 | q < 4",
    "blocks": "q // 16 == k // 16",
    "blocks and those before": "q // 16 - k // 16 <= 1 & q // 16 >= k // 16",
}


def step(mask: str, rank: int, world: int, group: str, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    here = windowed(mask, rank, world, group)
    out, lse = ring.forward(here, q, k, v, [], None)
    dq, dk, dv, _ = ring.backward(here, grad, q, k, v, out, lse, [], None)
    return [out, dq, dk, dv]


def windowed(mask: str, rank: int, world: int, group: str) -> Site:
    tile = 64 if mask == STACKED["local + global, large tiles"] else 16
    return sites.site(mask, 8 * TOKENS, "contiguous", rank, world, tile, group=group, scale=SCALE)


def made(batch: int) -> list[Tensor]:
    """q, k, v and the gradient of out, of more query heads than key heads."""
    return [random(batch, heads, 8 * TOKENS, WIDTH, seed=i) for i, heads in enumerate((4, 2, 2, 4))]


def by_sdpa(mask: str, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    """[out, dq, dk, dv] of torch's attention under the boolean mask."""
    allowed = primitives.mask_tile([], q, mask, 1, 1, [0, q.shape[2]], [0, k.shape[2]])
    a, b, c = inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    out = F.scaled_dot_product_attention(a, b, c, attn_mask=allowed, scale=SCALE, enable_gqa=True)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


@pytest.mark.parametrize("world", (1, 2, 3))
@pytest.mark.parametrize("name", STACKED)
@pytest.mark.parametrize("batch", (1, 2))
def test_stacks_give_the_same_numbers(batch: int, name: str, world: int) -> None:
    whole, mask = made(batch), STACKED[name]
    parse(mask)  # once for all threads

    def job(rank: int, group: str) -> list[Tensor]:
        with torch.no_grad():
            return step(mask, rank, world, group, *(of_rank(x, "contiguous", rank, world) for x in whole))

    with one_thread():
        found, wanted = thread_ranks.run(world, job), by_sdpa(mask, *whole)
    every = [launch for rank in range(world) for launch in of_site(windowed(mask, rank, world, ""), whole[0])]
    assert max(launch.count for launch in every) > (3 if "large" not in name else world < 3)
    assert world > 1 or ("large" in name) == any(0 in x.shifts for x in every if x.count > 1), "keys that all share"
    check_ranks(found, wanted, "contiguous", 1e-11, mask)


@pytest.mark.parametrize("mask", STACKED.values(), ids=STACKED)
def test_a_traced_graph_has_the_same_stacks(mask: str) -> None:
    whole = made(1)
    with torch.no_grad():
        graph = make_fx(partial(step, mask, 0, 1, ""))(*whole)
        found = graph(*whole)
    tiles = [n for n in graph.graph.nodes if n.target == primitives.attention_tile]
    here = windowed(mask, 0, 1, "")
    stacks = of_site(here, whole[0])
    assert [n.args[0].meta["val"].shape[0] for n in tiles] == [launch.count for launch in stacks]
    assert {n.meta[LABEL] for n in tiles} >= {f"attention_{ring._name(here, here.program.steps[0], x)}" for x in stacks}
    assert any("_stack" in n.meta[LABEL] for n in tiles)
    check_ranks([found], by_sdpa(mask, *whole), "contiguous", 1e-11, mask)


TILES = st.builds(
    lambda q, n, k, m, kind: Tile((q, q + n), (k, k + (n if kind == CAUSAL_TILE else m)), kind),
    *(st.integers(0, 40), st.integers(1, 4), st.integers(0, 40), st.integers(1, 4)),
    st.sampled_from((FULL, PARTIAL, CAUSAL_TILE)),
)


@given(st.lists(TILES, max_size=8), st.integers(1, 4), st.integers(0, 6), st.integers(0, 64))
def test_each_tile_is_in_one_call(some: list[Tile], times: int, by: int, stack: int) -> None:
    """Any tiles, and the same again on the rows that follow."""
    tiles = [moved(tile, i * (tile.q[1] - tile.q[0]), i * by) for tile in some for i in range(times)]
    found = launches(tiles, stack=stack)
    assert sorted(map(str, tiles)) == sorted(str(tile) for launch in found for tile in one_by_one(launch))
    for launch in found:
        assert launch.count == 1 or (launch.kind != PARTIAL and launch.q[1] - launch.q[0] <= stack)
        assert {row for tile in one_by_one(launch) for row in range(*tile.q)} == {*range(*launch.q)}
        keys = [{row for spans in launch.k for span in spans for row in range(*span)}]
        assert keys == [{row for tile in one_by_one(launch) for row in range(*tile.k)}]


def one_by_one(launch: Launch) -> list[Tile]:
    along = list(zip(launch.tiles, launch.shifts, strict=True))
    return [moved(tile, i * launch.rows, i * shift) for i in range(launch.count) for tile, shift in along]


def moved(tile: Tile, rows: int, keys: int) -> Tile:
    return Tile((tile.q[0] + rows, tile.q[1] + rows), (tile.k[0] + keys, tile.k[1] + keys), tile.kind)


def test_no_stack_where_scores_depend_on_tokens() -> None:
    plain = sites.site("q // 8 == k // 8", 64, tile=8, scale=SCALE)
    q = random(1, 2, 64, 4, seed=0)
    batch = q.expand(STACK // 16, -1, -1, -1)  # is a stack itself
    cases: tuple[tuple[dict[str, Any], Tensor, int], ...] = (
        ({}, q, 8),
        ({}, batch, 2),
        ({"bias": "-0.1 * k"}, q, 1),
        ({"dropout": 0.5}, q, 1),
    )
    for other, queries, count in cases:
        here = replace(plain, **other)
        assert max(launch.count for launch in of_site(here, queries)) == count
