"""Sequences that are worked through in sections: each rank computes its own tokens of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.sharded_ops import Case, check_on_shards

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
    "loss of rows, one row last": (loss_of_rows(12, "sum"), ((ROWS, TOKENS, WIDTH), (VOCAB, WIDTH))),
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
    "tiled, nested": (tiled(lambda x: [d for c in x.chunk(2, 1) for d in c.chunk(3, 1)]), HIDDEN),
}


@pytest.mark.parametrize("world", (2, 3, 5))
@pytest.mark.parametrize("layout", ("contiguous", "zigzag"))
@pytest.mark.parametrize("name", CASES)
def test_nothing_is_gathered(name: str, layout: str, world: int) -> None:
    call, shapes = CASES[name]
    case = Case("slice.Tensor", call, shapes)
    assert check_on_shards(case, layout, world, TOKENS) == []
