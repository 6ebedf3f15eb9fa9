"""Norms whose statistics run over a partitioned sequence: those of one device, with nothing gathered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.sharded_ops import B, Case, H, S, check_on_shards

C = 4
SHAPES = ((B, C, S), (C,), (C,))


def trained(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    return F.batch_norm(x, None, None, weight, bias, training=True)


CASES: list[tuple[str, Callable[..., Any], tuple[tuple[int, ...], ...]]] = [
    ("batch_norm.default", trained, SHAPES),
    ("batch_norm.default", trained, ((S, C), (C,), (C,))),
    ("batch_norm.default", lambda x: trained(x.view(-1, C)), ((B, S, C),)),
    ("batch_norm.default", lambda x: trained(x.mT, bias=torch.ones(C, dtype=x.dtype)).mT, ((B, S, C),)),
    ("batch_norm.default", trained, ((B, C, H, S), (C,))),
    ("batch_norm.default", lambda x, w: F.batch_norm(x, torch.ones(C).double(), torch.full((C,), 2.0).double(), w),
     ((B, C, S), (C,))),
    ("group_norm.default", lambda x, w, b: F.group_norm(x, 2, w, b), SHAPES),
    ("group_norm.default", lambda x: F.group_norm(x, 1, eps=0.1), ((B, C, S, H),)),
    ("group_norm.default", lambda x: F.group_norm(x, 2), ((S, C, H),)),
    ("group_norm.default", lambda x: F.group_norm(x.mT, C).mT, ((B, S, C),)),
    ("instance_norm.default", F.instance_norm, ((B, C, S),)),
    ("instance_norm.default", lambda x, w, b: F.instance_norm(x, weight=w, bias=b), ((B, C, H, S), (C,), (C,))),
]  # fmt: skip


@pytest.mark.parametrize("world", (3, 5))
@pytest.mark.parametrize(("op", "call", "shapes"), CASES, ids=[f"{i} {op}" for i, (op, *_) in enumerate(CASES)])
def test_norm_over_tokens(op: str, call: Callable[..., Any], shapes: tuple[tuple[int, ...], ...], world: int) -> None:
    assert check_on_shards(Case(op, call, shapes), "zigzag", world) == []


def test_channels_are_needed_whole() -> None:
    """All of them, of a part of the batch."""
    assert check_on_shards(Case("group_norm.default", lambda x: F.group_norm(x, 1), ((B, S, 3),)), "zigzag", 3) == []


@pytest.mark.parametrize("shape", [(B, C, S), (S, C), (B, C, S, H)], ids=str)
def test_running_statistics_are_those_of_all_tokens(shape: tuple[int, ...]) -> None:
    def call(x: Tensor) -> tuple[Tensor, ...]:
        mean, variance = torch.zeros(C, dtype=x.dtype), torch.ones(C, dtype=x.dtype)
        y = F.batch_norm(x, mean, variance, training=True, momentum=0.3)
        return y, mean + 0 * x.sum(), variance + 0 * x.sum()

    assert check_on_shards(Case("batch_norm.default", call, (shape,)), "zigzag", 3) == []
