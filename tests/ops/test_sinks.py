"""Attention with a sink, one more score in each row without a value: on the ring as on one device, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ringpass.ops import ring
from ringpass.reference import multiplicity
from ringpass.schedule.dilation import Dilation
from tests.support import thread_ranks
from tests.support.attention_parity import SCALE, check_ranks, of_rank, one_thread, tensors
from tests.support.sites import site

S, TILE, EXACT = 37, 8, 1e-11
SINKS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {  # shape of the leaf, its column of scores
    "x0[h]": ((4,), lambda x: x.view(1, 4, 1, 1)),
    "x0[b, h, q]": ((2, 4, S), lambda x: x[..., None]),
    "x0[0] * 2": ((1,), lambda x: x * 2),
}


def on_the_ring(
    world: int, layout: str, mask: str, sink: str, dilation: str, inputs: list[Tensor]
) -> list[list[Tensor]]:
    """[out, dq, dk, dv, the rank's partial gradient of the sink] of each rank."""
    *rows, leaf = inputs

    def job(rank: int, group: str) -> list[Tensor]:
        here = site(
            mask, S, layout, rank, world, TILE, group=group, scale=SCALE, sink=sink, learned=(0,),
            dilation=Dilation.parse(dilation) if dilation else None, heads=rows[0].shape[1],
        )  # fmt: skip
        q, k, v, grad = (of_rank(x, layout, rank, world) for x in rows)
        with torch.no_grad():
            out, lse = ring.forward(here, q, k, v, [leaf], None)
            dq, dk, dv, learned = ring.backward(here, grad, q, k, v, out, lse, [leaf], None)
        return [out, dq, dk, dv, *learned]

    return thread_ranks.run(world, job)


def dense(allowed: Tensor, counts: Tensor | float, sink: str, inputs: list[Tensor]) -> list[Tensor]:
    """The same of one device; `counts`: how many patterns hold each pair."""
    q, k, v, leaf = (inputs[i].clone().requires_grad_() for i in (0, 1, 2, 4))
    keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ keys.mT * SCALE).masked_fill(~allowed, -torch.inf) + torch.as_tensor(counts).log()
    column = SINKS[sink][1](leaf)
    weights = torch.cat([scores, column.expand(*scores.shape[:3], 1)], -1).softmax(-1)[..., :-1]
    out = weights @ values
    return [out.detach(), *torch.autograd.grad(out, (q, k, v, leaf), inputs[3])]


def inputs(sink: str) -> list[Tensor]:
    leaf = torch.randn(SINKS[sink][0], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return [*tensors(S, (4, 2), 8, torch.float64, "cpu")[:4], leaf]


def check(found: list[list[Tensor]], wanted: list[Tensor], layout: str, where: str) -> None:
    check_ranks([results[:4] for results in found], wanted[:4], layout, EXACT, where)
    total = torch.stack([results[4] for results in found]).sum(0)
    assert torch.allclose(total, wanted[4], rtol=EXACT, atol=EXACT), f"sink: {where}"


@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
def test_sinks_on_the_ring(world: int, sink: str) -> None:
    at = torch.arange(S)
    row, column = at[:, None], at[None]
    masks = {"True": row >= 0, "k < q": column < row, "k <= q & q - k < 7": (column <= row) & (row - column < 7)}
    given = inputs(sink)
    with one_thread():
        for layout in ("contiguous", "zigzag"):
            for mask, allowed in masks.items():  # the first row of the second sees its sink alone
                wanted = dense(allowed, 1.0, sink, given)
                check(on_the_ring(world, layout, mask, sink, "", given), wanted, layout, f"{layout} {mask}")


@pytest.mark.parametrize("world", [1, 3])
def test_a_sink_counts_once_over_the_patterns_of_a_dilation(world: int) -> None:
    dilation, given = Dilation((8, 16), (1, 2)), inputs("x0[h]")
    counts = multiplicity(dilation, 4, S).to(torch.float64)
    wanted = dense(torch.ones(S, S, dtype=torch.bool), counts, "x0[h]", given)
    with one_thread():
        check(on_the_ring(world, "contiguous", "True", "x0[h]", str(dilation), given), wanted, "contiguous", "dilated")
