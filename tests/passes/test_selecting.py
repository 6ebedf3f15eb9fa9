"""A few tokens of a sharded sequence, replicated: what each rank gives adds up to them, and no more moves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ringpass import ops
from ringpass.layouts.layout import Layout
from tests.support.marks import slow
from tests.support.model_parity import compiled, relative
from tests.support.models import Block
from tests.support.process_ranks import Workers
from tests.support.zoo_parity import step

ROWS, TOKENS, WIDTH = 2, 23, 32
LAST = torch.tensor([4, 22])


@pytest.mark.parametrize("layout", ("contiguous", "zigzag", "striped", "zigzag along hilbert 4x5 after 3"))
@pytest.mark.parametrize("world", (2, 3, 5))
def test_each_token_is_held_once_and_in_place(layout: str, world: int) -> None:
    x, positions = torch.randn(TOKENS), torch.tensor([[0, 22], [-1, 7]])
    order = Layout(layout, world).order
    ordered = x[order.permutation.values] if order else x
    total = torch.zeros(positions.shape)
    for rank in range(world):
        mine = torch.cat([ordered[a:b] for a, b in Layout(layout, world).ranges(rank, TOKENS)])
        rows = ops.locate(positions, TOKENS, layout, world, rank)
        total += torch.where(rows >= 0, mine[rows.clamp_min(0)], 0)
    assert torch.equal(total, x[positions])


class Head(nn.Module):
    """Two blocks, a head that `pick` gives some tokens."""

    def __init__(self, pick: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.pick = pick
        self.blocks = nn.ModuleList(Block(causal=False) for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        for block in self.blocks:
            x = block(x)
        return (self.head(self.pick(x)),)


def first(x: Tensor) -> Tensor:
    return x[:, 0]


def last(x: Tensor) -> Tensor:
    return x[:, -1]


def some_of_the_end(x: Tensor) -> Tensor:
    return x[:, -5::2]


def by_list(x: Tensor) -> Tensor:
    return x[:, [-1], :]


def by_data(x: Tensor) -> Tensor:
    return x[torch.arange(ROWS), LAST]


def sequence_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1)[3]


def taken(group: dist.ProcessGroup, pick: Callable[[Tensor], Tensor], **options: str | bool) -> float:
    """The largest relative error of the output and the gradients; `strict` refuses any gather."""
    torch.manual_seed(0)
    model, x = Head(pick).double(), torch.randn(ROWS, TOKENS, WIDTH, dtype=torch.float64)
    want, got = (step(model, run, {"x": x}) for run in (model, compiled(model, group, strict=True, **options)))
    return max(relative(got[key], want[key]) for key in want)


@pytest.mark.parametrize(
    ("pick", "ranks"),
    [(first, 2), (by_data, 3), *(slow(p, 3) for p in (first, last, some_of_the_end, by_list, sequence_first))],
)
def test_models_that_read_a_few_tokens(workers: Workers, pick: Callable[[Tensor], Tensor], ranks: int) -> None:
    layout = "zigzag" if ranks == 3 else "contiguous"
    assert max(workers.run(taken, ranks, pick, layout=layout)) < 1e-10
