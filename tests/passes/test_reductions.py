"""Reductions over a partitioned sequence: those of one device, forward and backward, with nothing gathered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ringpass.passes.op_rules import reductions
from tests.support.sharded_ops import B, Case, D, S, check_on_shards

aten = torch.ops.aten
FIRST = (S, B, D)


def equals(x: Tensor) -> Tensor:
    """Few different numbers, so that the largest is there several times, on several ranks."""
    return x - x.detach() + (x.detach() * 2).round().clamp(-1, 1)


def at(x: Tensor, index: Tensor) -> Tensor:
    """Something with a gradient that shows `index`."""
    return x.sum() * index


CASES: list[tuple[str, Callable[[Tensor], Any]]] = [
    ("amax.default", lambda x: x.amax(1)),
    ("amax.default", lambda x: equals(x).amax(1, keepdim=True)),
    ("amax.default", lambda x: equals(x).amax((1, 2))),
    ("amax.default", lambda x: equals(x).view(-1, D).amax(0)),
    ("amax.default", lambda x: x.masked_fill(x.detach() < 9, float("-inf")).amax(1).exp()),
    ("amin.default", lambda x: equals(x).amin((0, 1))),
    ("max.default", lambda x: equals(x).max()),
    ("min.default", lambda x: equals(x).min()),
    ("aminmax.default", lambda x: torch.stack(equals(x).aminmax(dim=1))),
    ("aminmax.default", lambda x: torch.stack(equals(x).aminmax())),
    ("max.dim", lambda x: equals(x).max(1).values),
    ("max.dim", lambda x: at(x, equals(x).max(1, keepdim=True).indices)),
    ("max.dim", lambda x: equals(x).mT.max(-1, keepdim=True).values),
    ("max.dim", lambda x: x.view(-1, D).max(0).values),
    ("max.dim", lambda x: at(x, equals(x).flatten(1).max(1).indices)),
    ("min.dim", lambda x: sum(equals(x).min(1))),
    ("argmax.default", lambda x: at(x, equals(x).argmax(1))),
    ("argmax.default", lambda x: at(x, equals(x).argmax())),
    ("argmin.default", lambda x: at(x, x.argmin(None, keepdim=True))),
    ("argmin.default", lambda x: at(x, equals(x).view(-1, D).argmin(0, keepdim=True))),
    ("any.dim", lambda x: at(x, (x > 1.5).any(1))),
    ("any.dims", lambda x: at(x, torch.any(x > 2, (0, 1), keepdim=True))),
    ("any.default", lambda x: at(x, (x > 9).any())),
    ("all.dim", lambda x: at(x, (x > -3).all(1, keepdim=True))),
    ("all.default", lambda x: at(x, (x > -9).all())),
    ("count_nonzero.default", lambda x: at(x, (x > 0).count_nonzero(1))),
    ("count_nonzero.dim_IntList", lambda x: at(x, equals(x).count_nonzero((0, 1)))),
    ("sum.dim_IntList", lambda x: at(x, (x > 0).sum(1))),
    ("sum.default", lambda x: at(x, (x > 0).sum())),
    ("mean.default", lambda x: x.mean()),
    ("mean.dim", lambda x: x.mean((1, 2))),
    ("all.dims", lambda x: at(x, torch.all(x > -9, (0, 1)))),
    ("min.dim", lambda x: x.view(B, -1).min(-1).values),
    ("nansum.default", lambda x: torch.where(x > 1, torch.nan, x).nansum(1)),
    ("nansum.default", lambda x: torch.where(x > 1, torch.nan, x).nanmean((0, 1))),
    ("logsumexp.default", lambda x: x.logsumexp(1)),
    ("logsumexp.default", lambda x: (x * 400).logsumexp((0, 1), keepdim=True)),
    ("logsumexp.default", lambda x: x.masked_fill(x < 1, float("-inf")).logsumexp((1, 2))),
    ("prod.dim_int", lambda x: x.prod(1)),
    ("prod.dim_int", lambda x: (x * (x.detach() < 1.8)).prod(1, keepdim=True)),
    ("prod.default", lambda x: x.prod()),
    *[(f"{name}.{form}", call) for name in ("var", "std") for form, call in {
        "dim": lambda x, name=name: getattr(aten, name).dim(x, [1], False),
        "default": lambda x, name=name: getattr(aten, name).default(x * 1e3),
        "correction": lambda x, name=name: getattr(x, name)((0, 1), correction=1, keepdim=True),
    }.items()],
    *[(f"{name}.{form}", call) for name in ("var_mean", "std_mean") for form, call in {
        "dim": lambda x, name=name: torch.stack(getattr(aten, name).dim(x, [1], False)),
        "default": lambda x, name=name: torch.stack(getattr(aten, name).default(x)),
        "correction": lambda x, name=name: torch.stack(getattr(torch, name)(x, (1, 2), correction=1, keepdim=True)),
    }.items()],
    ("std.correction", lambda x: (x * 0 + 3).std(1, correction=0)),
    *[("linalg_vector_norm.default", lambda x, p=p: torch.linalg.vector_norm(x, p, 1))
      for p in (1, 2, 3, float("inf"), float("-inf"))],
    ("linalg_vector_norm.default", lambda x: torch.linalg.vector_norm(equals(x), float("inf"), (0, 1), keepdim=True)),
    ("linalg_vector_norm.default", lambda x: x.norm()),
    ("linalg_vector_norm.default", lambda x: torch.nn.functional.normalize(x, dim=1)),
    ("norm.Scalar", lambda x: aten.norm.Scalar(x, 3)),
    ("norm.ScalarOpt_dim", lambda x: aten.norm.ScalarOpt_dim(x, None, [1])),
    ("norm.ScalarOpt_dtype", lambda x: aten.norm.ScalarOpt_dtype(x, 1, dtype=torch.float64)),
    ("norm.ScalarOpt_dim_dtype", lambda x: aten.norm.ScalarOpt_dim_dtype(x, 2, [1], True, dtype=torch.float64)),
]  # fmt: skip


@pytest.mark.parametrize(("op", "call"), CASES, ids=[f"{i} {op}" for i, (op, _) in enumerate(CASES)])
def test_reduction_over_tokens(op: str, call: Callable[[Tensor], Any]) -> None:
    assert check_on_shards(Case(op, call), "zigzag", 3) == []


def test_every_rule_has_a_case() -> None:
    assert reductions.RULES.keys() == {op for op, _ in CASES}


ONE_OF_EACH = [
    ("amax.default", lambda x: equals(x).amax(0)), ("max.dim", lambda x: equals(x).max(0).values),
    ("argmax.default", lambda x: at(x, equals(x).argmax())), ("logsumexp.default", lambda x: x.logsumexp(0)),
    ("prod.dim_int", lambda x: x.prod(0)),
    ("var_mean.correction", lambda x: torch.stack(torch.var_mean(x, (0, 1), correction=1))),
    ("any.dim", lambda x: at(x, (x > 1.5).any(0))), ("linalg_vector_norm.default", lambda x: x.norm(dim=0)),
    ("nansum.default", lambda x: x.nansum(0)), ("count_nonzero.default", lambda x: at(x, (x > 0).count_nonzero(0))),
]  # fmt: skip


@pytest.mark.parametrize("world", (2, 5))
@pytest.mark.parametrize("layout", ("contiguous", "striped", "chunks 4,0,1,0,0,1,3,0"))
def test_reduction_in_other_layouts(layout: str, world: int) -> None:
    """The last layout leaves a rank of five without tokens."""
    name = layout if world == 5 else layout.replace("4", "1").replace("3", "1")
    for op, call in ONE_OF_EACH:
        assert check_on_shards(Case(op, call, (FIRST,)), name, world) == [], op


@pytest.mark.parametrize(
    ("op", "call"),
    [
        ("linalg_vector_norm.default", lambda x: torch.linalg.vector_norm(x, 0, 1) * x.sum(1)),
        ("linalg_vector_norm.default", lambda x: torch.linalg.vector_norm(x, -2, 1)),
        ("var.correction", lambda x: x.var(1, correction=3)),
    ],
)
def test_what_does_not_combine_gets_all_tokens(op: str, call: Callable[[Tensor], Any]) -> None:
    """Of a part of the channels."""
    assert check_on_shards(Case(op, call), "zigzag", 3) == []
