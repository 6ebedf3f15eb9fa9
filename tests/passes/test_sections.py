"""Sequences that are worked through in sections: each rank computes its own tokens of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ringpass.layouts.layout import Layout
from tests.support import thread_ranks
from tests.support.marks import slow
from tests.support.sharded_ops import Case, after_product, check_on_shards, inputs, rank_programs

ROWS, TOKENS, WIDTH, VOCAB = 2, 31, 4, 7
Call = Callable[..., Any]
HIDDEN = ((ROWS, TOKENS, WIDTH), (VOCAB, WIDTH))
ONE = ((1, TOKENS, WIDTH), (VOCAB, WIDTH))


def labels(rows: int) -> Tensor:
    at = torch.arange(rows * TOKENS).view(rows, TOKENS)
    return torch.where(at % 5 == 0, -100, at * 3 % VOCAB)


def mixed(h: Tensor, weight: Tensor) -> Tensor:
    """A layer before: what is worked through are values that ranks compute."""
    return h @ (weight.mT @ weight)


def loss_of_rows(size: int, reduction: str = "sum") -> Call:
    """A cross entropy of merged rows, in slices of `size`."""

    def call(h: Tensor, head: Tensor) -> Any:
        flat, wanted = mixed(h, head).reshape(-1, WIDTH), labels(h.shape[0]).reshape(-1)
        starts = range(0, len(flat), size)
        total: Any = sum(
            F.cross_entropy(F.linear(flat[i : i + size], head), wanted[i : i + size], reduction=reduction)
            for i in starts
        )
        return total / (wanted != -100).sum()

    return call


def loss_of_tokens(split: Callable[[Tensor], Any]) -> Call:
    """A cross entropy of parts of the tokens of each sample."""

    def call(h: Tensor, head: Tensor) -> Any:
        parts = zip(split(mixed(h, head)), split(labels(h.shape[0])), strict=True)
        total: Any = sum(
            F.cross_entropy(F.linear(c, head).flatten(0, 1), y.flatten(), reduction="sum") for c, y in parts
        )
        return total

    return call


def tiled(split: Callable[[Tensor], Any], dim: int = 1) -> Call:
    """A feed-forward layer, part by part, and its residual."""

    def call(h: Tensor, up: Tensor) -> Tensor:
        h = mixed(h, up)
        return h + torch.cat([F.gelu(F.linear(c, up)) @ up for c in split(h)], dim)

    return call


CASES: dict[str, tuple[Call, tuple[tuple[int, ...], ...]]] = {
    "loss of rows": (loss_of_rows(13), HIDDEN),
    "loss of rows, mean": (loss_of_rows(13, "mean"), HIDDEN),
    "loss of rows, the last alone": (loss_of_rows(61), HIDDEN),
    "loss of rows, two rows last": (loss_of_rows(12), HIDDEN),
    "loss of one sample's rows": (loss_of_rows(7), ONE),
    "loss, split": (loss_of_tokens(lambda x: x.split(9, 1)), HIDDEN),
    "loss, sizes": (loss_of_tokens(lambda x: x.split([4, 11, 14, 2], 1)), HIDDEN),
    "loss, half and more": (loss_of_tokens(lambda x: x.split([18, 13], 1)), HIDDEN),
    "loss, narrow": (loss_of_tokens(lambda x: [x.narrow(1, i, 10) for i in range(0, 30, 10)]), HIDDEN),
    "tiled, chunk": (tiled(lambda x: x.chunk(4, 1)), HIDDEN),
    "tiled, two": (tiled(lambda x: x.chunk(2, 1)), HIDDEN),
    "tiled, slices": (tiled(lambda x: [x[:, i : i + 10] for i in range(0, TOKENS, 10)]), HIDDEN),
    "tiled, one token last": (tiled(lambda x: x.split(6, 1)), HIDDEN),
    "tiled, tensor_split": (tiled(lambda x: x.tensor_split(4, 1)), HIDDEN),
    "tiled, at": (tiled(lambda x: x.tensor_split((3, 14, 20), 1)), HIDDEN),
    "tiled, unbound": (tiled(lambda x: x.view(-1, 5, 6, WIDTH).unbind(1)), ((ROWS, 30, WIDTH), (VOCAB, WIDTH))),
    "tiled, selected": (
        tiled(lambda x: [x.view(-1, 3, 10, WIDTH)[:, i] for i in range(3)]),
        ((ROWS, 30, WIDTH), (VOCAB, WIDTH)),
    ),
    "tiled, nested": (tiled(lambda x: [d for c in x.chunk(2, 1) for d in c.chunk(3, 1)]), HIDDEN),
}


@pytest.mark.parametrize("world", (slow(2), 3, slow(5)))
@pytest.mark.parametrize("layout", ("contiguous", "zigzag"))
@pytest.mark.parametrize("name", CASES)
def test_nothing_is_gathered(name: str, layout: str, world: int) -> None:
    call, shapes = CASES[name]
    case = Case("slice.Tensor", call, shapes)
    assert check_on_shards(case, layout, world, shapes[0][1]) == []


def over(combine: Callable[[list[Tensor], Tensor], Any]) -> Call:
    """What is made of thirds of the tokens and all of them."""
    return lambda h, weight: combine([F.linear(c, weight) for c in mixed(h, weight).tensor_split(3, 1)], h)


OTHERS: dict[str, Call] = {
    "softmax over tokens": over(lambda parts, h: torch.cat([c.softmax(1) for c in parts], 1)),
    "a token of each": over(lambda parts, h: torch.stack([c[:, 0] * c[:, -1] for c in parts], 1)),
    "the most of each": over(lambda parts, h: torch.stack([c.amax(1) for c in parts], 1)),
    "means": over(lambda parts, h: sum(c.mean(1) for c in parts)),
    "some joined": over(lambda parts, h: (torch.cat(parts[:2], 1).sin(), parts[2].cos())),
    "in another order": over(lambda parts, h: torch.cat(parts[::-1], 1).sin()),
    "against each other": over(lambda parts, h: parts[1] * parts[2] * 2),  # a sine of large numbers is ill-conditioned
    "shifted": over(lambda parts, h: [c[:, 1:] - c[:, :-1] for c in parts]),
    "padded": over(lambda parts, h: [F.pad(c, (0, 0, 2, 0)).sin() for c in parts]),
    "padded and joined": over(lambda parts, h: torch.cat([F.pad(c, (0, 0, 1, -1)) * c for c in parts], 1)),
    "neighbours": over(lambda parts, h: [F.conv1d(c.mT, torch.ones(2, VOCAB, 3).double(), padding=1) for c in parts]),
    "products of tokens": over(lambda parts, h: [c.mT @ c for c in parts]),
    "scores": over(lambda parts, h: [c @ parts[0].mT for c in parts]),
    "running sums": over(lambda parts, h: [c.cumsum(1) for c in parts]),
    "merged rows": over(lambda parts, h: [c.flatten(0, 1).sin() for c in parts]),
    "tokens and channels": over(lambda parts, h: [c.flatten(1).sin() for c in parts]),
    "rows of merged rows": over(lambda parts, h: [c.flatten(0, 1)[3:].sin().sum(0) for c in parts]),
    "added to new tokens": over(lambda parts, h: torch.cat([parts[0][:, :1] * 0, *parts], 1).sin()),
}


@pytest.mark.parametrize("world", (slow(2), 5))
@pytest.mark.parametrize("name", OTHERS)
def test_other_ops_on_sections_are_exact(name: str, world: int) -> None:
    check_on_shards(Case("slice.Tensor", OTHERS[name], HIDDEN), "contiguous", world, TOKENS)


def flops(run: Callable[..., Any], case: Case) -> int:
    """Those of products of matrices in a forward and a backward of a case."""
    with FlopCounterMode(display=False) as counter:
        sum(y.sum() for y in run(*inputs(case))).backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("name", ("loss of rows", "loss, sizes", "tiled, chunk", "tiled, nested"))
def test_each_rank_computes_its_share(name: str) -> None:
    """Of the FLOPs of one device, but those of the weights' product."""
    call, shapes = CASES[name]
    case, weights = Case("slice.Tensor", call, shapes), Case("mT", lambda w: w.mT @ w, shapes[1:])
    alone, whole = flops(weights.call, weights), flops(after_product(case), case)
    for world in (2, 5):
        made = rank_programs(case, "contiguous", world, TOKENS)

        def job(rank: int, group: str, made: Any = made) -> int:
            return flops(lambda *xs: made[rank].gm(*xs)[:1], case)

        held = [Layout("contiguous", world).length(rank, TOKENS) / TOKENS for rank in range(world)]
        assert thread_ranks.run(world, job) == pytest.approx([alone + (whole - alone) * share for share in held])
