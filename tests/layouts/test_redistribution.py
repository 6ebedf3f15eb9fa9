"""Tokens that ranks want and do not hold travel, once each, in one message per pair; the transpose adds them up."""

from __future__ import annotations

import random
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ringpass import ops
from ringpass.comm import collectives
from ringpass.comm.collectives import Shard
from ringpass.layouts import redistribution
from ringpass.layouts.layout import Layout
from ringpass.layouts.ranges import Ranges, spread
from tests.support import thread_ranks
from tests.support.process_ranks import Workers

F64: Any = {"dtype": torch.float64}


def random_assignment(world: int, tokens: int, seed: int) -> tuple[list[Ranges], list[Ranges]]:
    """Random ranges: what each rank holds, each token once, and what each wants, as it comes."""
    draw = random.Random(seed)
    owners = [draw.randrange(world) for _ in range(tokens)]
    cuts = [i for i in range(1, tokens) if owners[i] != owners[i - 1]]
    spans = list(zip([0, *cuts], [*cuts, tokens], strict=True))
    held = [tuple(s for s in spans if owners[s[0]] == rank) for rank in range(world)]
    wanted = []
    for _ in range(world):
        starts = sorted(draw.randrange(tokens) for _ in range(draw.randrange(4)))
        wanted.append(tuple((a, draw.randint(a, tokens)) for a in starts))
    return held, wanted


def pick(x: Tensor, ranges: Ranges) -> Tensor:
    return torch.cat([x[:, :0], *(x[:, a:b] for a, b in ranges)], 1)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("world", range(1, 6))
def test_forth_and_back(world: int, seed: int) -> None:
    held, wanted = random_assignment(world, 23, seed)
    x = torch.randn(2, 23, 3, **F64)
    grads = [torch.randn_like(pick(x, ranges)) for ranges in wanted]

    def job(rank: int, group: str) -> tuple[Tensor, Tensor]:
        where = held, wanted, rank, group
        return collectives.move(pick(x, held[rank]), *where), collectives.move_back(grads[rank], *where)

    full = x.clone().requires_grad_()
    for ranges, grad in zip(wanted, grads, strict=True):
        pick(full, ranges).backward(grad)
    total = torch.zeros_like(x) if full.grad is None else full.grad
    for rank, (found, back) in enumerate(thread_ranks.run(world, job)):
        assert torch.equal(found, pick(x, wanted[rank]))
        torch.testing.assert_close(back, pick(total, held[rank]), rtol=0, atol=1e-14)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_nothing_travels_twice_or_in_vain(world: int) -> None:
    for seed in range(20):
        held, wanted = random_assignment(world, 31, seed)
        sides = [[{*spread(r)} for r in side] for side in (held, wanted)]
        for rank in range(world):
            found = redistribution.among(tuple(held), tuple(wanted), rank)
            needed = [len(sides[1][rank] & has) if other != rank else 0 for other, has in enumerate(sides[0])]
            assert list(found.received) == needed


def test_ranks_that_hold_what_they_want_send_nothing() -> None:
    def job(rank: int, group: str) -> Tensor:
        held = [((0, 4),), ((4, 9),)]
        return collectives.move(torch.arange(9.0).view(1, 9, 1)[:, slice(*held[rank][0])], held, held, rank, group)

    with patch.object(dist, "all_to_all_single", None):
        assert torch.equal(torch.cat(thread_ranks.run(2, job), 1).view(-1), torch.arange(9.0))


def test_what_nobody_holds_cannot_be_wanted() -> None:
    with pytest.raises(AssertionError, match="no rank holds"):
        redistribution.redistribution([np.arange(3), np.arange(4, 6)], [np.arange(4), np.arange(2)], 0)


LAYOUTS = ("contiguous", "zigzag", "striped", "zigzag along hilbert 4x5 after 3", "chunks 1,0,1")


@pytest.mark.parametrize("other", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_redistribute(layout: str, other: str) -> None:
    """Of a dim that is (2, S, 3) merged, on three ranks and two."""
    tokens, world = 23, 2 if "chunks" in layout + other else 3
    x = torch.randn(5, 2 * tokens * 3, **F64)

    def shard_of(full: Tensor, name: str, rank: int) -> Tensor:
        at = torch.from_numpy(redistribution.held_by(Layout(name, world), rank, tokens))
        return full.view(5, 2, tokens, 3)[:, :, at].reshape(5, -1)

    def job(rank: int, group: str) -> tuple[Tensor, Tensor]:
        local = shard_of(x, layout, rank).requires_grad_()
        out = ops.redistribute(local, 1, 2, tokens, layout, other, world, rank, group)
        out.backward(shard_of(x, other, rank).square())
        assert local.grad is not None
        with FakeTensorMode() as mode:
            fake = ops.redistribute(mode.from_tensor(local), 1, 2, tokens, layout, other, world, rank, group)
        assert fake.shape == out.shape
        return out.detach(), local.grad

    for rank, (out, grad) in enumerate(thread_ranks.run(world, job)):
        assert torch.equal(out, shard_of(x, other, rank)) and torch.equal(grad, shard_of(x, layout, rank).square())


def test_a_rank_without_tokens() -> None:
    """torch.chunk leaves the last of five ranks none of 11 tokens."""
    x = torch.randn(2, 11, 3, **F64)

    def job(rank: int, group: str) -> tuple[Tensor, Tensor]:
        local = x[:, redistribution.held_by(Layout("chunked", 5), rank, 11)].requires_grad_()
        out = ops.redistribute(local, 1, 1, 11, "chunked", "zigzag", 5, rank, group)
        out.sum().backward()
        assert local.grad is not None and torch.equal(local.grad, torch.ones_like(local))
        return out, collectives.gather(local.detach(), Shard(1, 1, 11, "chunked", 5, rank), group)

    for rank, (out, full) in enumerate(thread_ranks.run(5, job)):
        assert torch.equal(out, x[:, redistribution.held_by(Layout("zigzag", 5), rank, 11)]) and torch.equal(full, x)


def on_gloo(group: dist.ProcessGroup) -> float:
    """The largest error of a redistribute, complex and not."""
    name, rank, worst = group.group_name, group.rank(), 0.0
    for dtype in (torch.float64, torch.complex64, torch.int64):
        x = torch.arange(46).view(2, 23).to(dtype)
        where = [Shard(1, 1, 23, layout, group.size(), rank) for layout in ("zigzag", "contiguous")]
        local, want = (collectives.take(x, shard) for shard in where)
        args = local, 1, 1, 23, "zigzag", "contiguous", group.size(), rank, name
        worst = max(worst, (ops.redistribute(*args) - want).abs().max().item())
    return worst


def test_on_gloo(workers: Workers) -> None:
    assert workers.run(on_gloo, 3) == [0.0] * 3


@pytest.mark.parametrize("world", range(2, 6))
@pytest.mark.parametrize("name", ("contiguous", "zigzag", "striped"))
def test_a_shift_by_one_moves_one_token_of_each_range(name: str, world: int, tokens: int = 1000) -> None:
    slices = [Layout(f"{name} cut {cut}", world) for cut in (-1, 1)]  # x[:, 1:] and x[:, :-1] of a sequence of 1,001
    for rank in range(world):
        move = redistribution.between(slices[1].name, slices[0].name, world, tokens, rank)
        assert sum(move.received) <= len(slices[0].ranges(rank, tokens))
