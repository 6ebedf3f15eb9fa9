"""Thin full tiles of the same rows share a kernel call: their keys are taken together, their gradients given apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ringpass import patterns, primitives, ring
from ringpass.layout import Layout
from ringpass.mask import parse
from ringpass.passes.balance import _begins_call, refine
from ringpass.passes.verify import prove
from ringpass.schedule import THIN, TILE, Problem, calls, program, tiling
from ringpass.site import Site
from tests import thread_ranks
from tests.dense_ring import SCALE, check_ranks, of_rank, one_thread

TOKENS, HEADS, WIDTH, SEED = 43, 2, 4, torch.tensor(5)
COLUMNS = "k < 4 | k >= 12 & k < 16 | k >= 30 & k < 33"
KINDS = {"nothing": "", "a bias": "-0.1 * (q - k)", "a learned bias": f"x0[h, q - k + {TOKENS}]", "dropout": ""}


def site(kind: str, rank: int, world: int, group: str, layout: str) -> Site:
    learned, dropped = (0,) if "learned" in kind else (), 0.3 if kind == "dropout" else 0.0
    layouts = layout, layout
    scores = KINDS[kind], SCALE, dropped, 1
    return Site(COLUMNS, *scores, TOKENS, TOKENS, *layouts, 12, rank, world, group, learned=learned)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense(kind: str, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, table: Tensor) -> list[Tensor]:
    """[out, dq, dk, dv, dtable] by the whole matrix of scores."""
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
        kept = primitives.keep_tile(SEED, whole.stream, whole.dropout, whole.coins, *spans)
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
    sites = [site(kind, rank, world, "", "zigzag") for rank in range(world)]
    assert max(len(some) for here in sites for step in here.program.steps for some in ring._calls(here, step.tiles)) > 1
    check_ranks([x[:4] for x in found], wanted[:4], "zigzag", 1e-11, kind)
    if "learned" in kind:
        torch.testing.assert_close(sum(x[4] for x in found), wanted[4])


def problem(mask: patterns.Pattern | str, tokens: int, tile: int, world: int = 1) -> Problem:
    here = Layout("contiguous", world)
    return Problem(str(mask), tokens, tokens, here, here, tile)


def test_global_keys_join_the_window() -> None:
    p = problem(patterns.window(351, 351) | patterns.global_tokens(64), 8192, 512)
    prove(p)
    together = calls(program(p, 0).steps[0].tiles)
    thin = [some for some in together if len(some) == 1 and some[0].k[1] - some[0].k[0] == 64 and some[0].q[1] > 64]
    assert sum(len(some) == 2 for some in together) > 10 and not [t for (t,) in thin if t.q[1] - t.q[0] == 512]


@pytest.mark.parametrize("most", (TILE, 300))
def test_no_call_is_larger_than_it_may_be(most: int) -> None:
    p = problem(patterns.random_blocks(4096, 64, 24), 4096, 64)
    tiles = program(p, 0).steps[0].tiles
    together = calls(tiles, most)
    assert sorted(str(t) for some in together for t in some) == sorted(map(str, tiles))
    widths = [[t.k[1] - t.k[0] for t in some] for some in together]
    assert max(map(len, widths)) > 1 and all(len(some) == 1 or sum(some) <= most for some in widths)
    assert all({t.q for t in some} == {some[0].q} for some in together)
    assert all(len(some) == 1 or min(some) < THIN for some in widths)


def test_tiles_are_as_fine_as_blocks() -> None:
    """A tile of blocks of 64 that is larger than these has to be computed whole."""
    p = problem(patterns.random_blocks(8192, 64, 8), 8192, TILE)
    assert refine([p], "cpu") == 64
    fine = replace(p, tile=64)
    assert _begins_call(tiling(fine)).sum() == len(calls(program(fine, 0).steps[0].tiles)) == 8192 // 64


def test_the_price_counts_calls() -> None:
    lonely = tiling(problem("True", 4096, 64))
    assert _begins_call(lonely).tolist() == [True]
    assert _begins_call(tiling(problem("False", 4096, 64))).tolist() == []
    columns = "k < 200 | " + " | ".join(f"k >= {i} & k < {i + 200}" for i in range(300, 2700, 300))
    assert _begins_call(tiling(problem(columns, 4096, 64))).sum() == 2  # 1,800 keys, in calls of 1,024
