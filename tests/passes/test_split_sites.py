"""Few queries over keys that are divided: each rank attends to its own keys, the results are merged over ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ringpass import ops
from ringpass.errors import ScheduleError
from ringpass.layouts.layout import Layout
from ringpass.ops import ring
from ringpass.schedule.program import program
from ringpass.schedule.proof import check, prove
from ringpass.schedule.site import SITES, Site
from ringpass.schedule.tiles import Problem
from tests.support import thread_ranks
from tests.support.attention_parity import SCALE, of_rank
from tests.support.marks import slow
from tests.support.programs import changed
from tests.support.sharded_ops import Case, check_attentions, planned_programs

B, H, G, S, D = 2, 4, 2, 23, 4


def pooled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def class_token(x: Tensor, w: Tensor) -> Tensor:
    """The first token's query, after a layer of attention over all tokens, and what is done with its output."""
    h = F.scaled_dot_product_attention(x, x, x) @ w
    return torch.tanh(F.scaled_dot_product_attention(h[:, :, :1], h, h)) @ w


def last_token(x: Tensor, w: Tensor) -> Tensor:
    """One query that may see the keys up to it alone."""
    h = F.scaled_dot_product_attention(x, x, x, is_causal=True) @ w
    at = torch.arange(S)
    return F.scaled_dot_product_attention(h[:, :, 15:16], h, h, attn_mask=(at <= 15)[None])


def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    exists = torch.arange(S) < torch.tensor([[9], [S]])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=exists[:, None, None], enable_gqa=True)


def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)


def keyless(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Batch 1 sees no key under a finite fill: the mean of all values."""
    exists = torch.arange(S) < torch.tensor([[9], [0]])
    k, v = (x.repeat_interleave(H // G, 1) for x in (k, v))
    return (q @ k.mT / 2.0).masked_fill(~exists[:, None, None], -1e9).softmax(-1) @ v


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(H // G, 1) for x in (k, v))
    return (q @ k.mT / math.sqrt(D)).softmax(-1) @ v


SDPA, SOFTMAX = "scaled_dot_product_attention.default", "softmax.int"
QKV = tuple[tuple[int, ...], ...]


def shapes(n: int) -> QKV:
    return (B, H, n, D), (B, G, S, D), (B, G, S, D)


CASES = {
    "one query": Case(SDPA, pooled, shapes(1)),
    "three latents": Case(SDPA, pooled, shapes(3)),
    "class token": Case(SDPA, class_token, ((B, H, S, D), (D, D))),
    "last token": Case(SDPA, last_token, ((B, H, S, D), (D, D))),
    "padding": Case(SDPA, padded, shapes(2)),
    "learned bias": Case(SDPA, biased, (*shapes(2), (H, 2, S))),
    "no key": Case(SOFTMAX, keyless, shapes(2)),
    "by hand": Case(SOFTMAX, by_hand, shapes(1)),
}


GRID = [
    ("zigzag", 3), ("contiguous", 2), *(slow("contiguous", n) for n in (1, 3, 4, 5)),
    *(slow("zigzag", n) for n in (1, 2, 4, 5)),
]  # fmt: skip


def rings(programs: list[Any]) -> list[list[Site]]:
    """The sites of each rank's attentions."""
    calls = [[n for n in p.gm.graph.nodes if n.target is ops.ring_attention] for p in programs]
    return [[SITES[n.args[5]] for n in of_rank] for of_rank in calls]


@pytest.mark.parametrize(("layout", "world"), GRID)
@pytest.mark.parametrize("name", CASES)
def test_few_queries_gather_no_keys(name: str, layout: str, world: int) -> None:
    assert not check_attentions(CASES[name], layout, world)


@pytest.mark.parametrize("name", CASES)
def test_the_site_is_split(name: str) -> None:
    for rank, sites in enumerate(rings(planned_programs(CASES[name], "zigzag", 3))):
        assert sites[-1].split and sites[-1].rank == rank
        assert [x.split for x in sites[:-1] if name in ("class token", "last token")] in ([], [False])


def latents(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """Latent queries on an axis of their own, between attentions among themselves, read a long sequence."""
    q = F.scaled_dot_product_attention(q, q, q) @ w
    h = F.scaled_dot_product_attention(q, k @ w, v @ w)
    return F.scaled_dot_product_attention(h, h, h)


@pytest.mark.parametrize(("layout", "world"), GRID)
def test_latents_of_their_own_axis_move_instead_of_keys(layout: str, world: int) -> None:
    many = (B, G, 300, D)
    case = Case(SDPA, latents, ((B, G, 13, D), many, many, (D, D)))
    assert not check_attentions(case, layout, world)
    if world > 1:
        for sites in rings(planned_programs(case, layout, world)):
            assert [x.split for x in sites] == [False, True, False]


def test_all_ranks_get_the_same_bits() -> None:
    """In float32 too, where the order of sums shows, so what follows from the output is equal on all ranks."""
    layout, world = Layout("zigzag", 4), 4
    problem = Problem("True", 3, S, Layout("replicated", world), layout)
    q, k, v = (torch.randn(B, n, tokens, D) for n, tokens in ((H, 3), (G, S), (G, S)))

    def job(rank: int, group: str) -> list[Tensor]:
        here = Site(problem, rank, group, SCALE)
        mine, values = (of_rank(x, "zigzag", rank, world) for x in (k, v))
        with torch.no_grad():
            out, lse = ring.forward(here, q, mine, values, [], None)
            return [out, lse, ring.backward(here, out, q, mine, values, out, lse, [], None)[0]]

    first, *others = thread_ranks.run(world, job)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    want = F.scaled_dot_product_attention(q, k, v, scale=SCALE, enable_gqa=True)
    torch.testing.assert_close(first[0], want)


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("mask", ["True", "k <= q", "k < 9", "bool(x0[b, k])"])
def test_schedules_are_proved_over_the_keys_of_all_ranks(mask: str, world: int) -> None:
    problem = Problem(mask, 3, 37, Layout("replicated", world), Layout("zigzag", world), tile=8)
    proof = prove(problem)
    assert (proof.exchanges, proof.moved) == (0, 0)
    if mask == "True":
        assert sum(program(problem, rank).area for rank in range(world)) == 3 * 37
    programs = [program(problem, rank) for rank in range(world)]
    with pytest.raises(ScheduleError, match="no tile covers"):
        check(changed(programs, 0, 0, tiles=programs[0].steps[0].tiles[1:]))


def test_a_sink_counts_once() -> None:
    """One more score per row, whose gradient one rank alone gives."""
    world, sink = 3, torch.randn(H, dtype=torch.float64)
    problem = Problem("True", 2, S, Layout("replicated", world), Layout("zigzag", world))
    q, k, v, grad = (
        torch.randn(B, n, tokens, D, dtype=torch.float64) for n, tokens in ((H, 2), (H, S), (H, S), (H, 2))
    )

    def job(rank: int, group: str) -> list[Tensor]:
        here = Site(problem, rank, group, SCALE, sink="x0[h]", learned=(0,))
        mine, values = (of_rank(x, "zigzag", rank, world) for x in (k, v))
        with torch.no_grad():
            out, lse = ring.forward(here, q, mine, values, [sink], None)
            dq, _, _, (dsink,) = ring.backward(here, grad, q, mine, values, out, lse, [sink], None)
        return [out, dq, dsink]

    found = thread_ranks.run(world, job)
    wanted, leaf = q.clone().requires_grad_(), sink.clone().requires_grad_()
    scores = torch.cat([wanted @ k.mT * SCALE, leaf.view(1, H, 1, 1).expand(B, H, 2, 1)], -1)
    want = scores.softmax(-1)[..., :-1] @ v
    dq, dsink = torch.autograd.grad(want, (wanted, leaf), grad)
    for out, got, _ in found:
        torch.testing.assert_close(out, want.detach())
        torch.testing.assert_close(got, dq)
    torch.testing.assert_close(torch.stack([x[2] for x in found]).sum(0), dsink)
