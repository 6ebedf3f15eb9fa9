"""Rows whose keys are all masked by a finite number: one device attends to all of these keys, and so does the ring."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ringpass import ops
from ringpass.passes.detect.detect import detect
from ringpass.schedule.site import lookup
from tests.support.marks import slow
from tests.support.sharded_ops import Case, captured_of, check_attentions, planned_programs

B, H, G, S, D = 3, 4, 2, 13, 4
LEAST = torch.finfo(torch.float64).min
FLOAT32 = torch.finfo(torch.float32).min
FILLS = (LEAST, FLOAT32, -1e30, -1e9, -1e6)
HEADS = ((B, H, S, D),) * 3
GROUPED = ((B, H, S, D), (B, G, S, D), (B, G, S, D))
Attend = Callable[..., Tensor]


def tokens() -> Tensor:
    """Padding on the left of the first row, on the right of the second; the third is padding only."""
    return torch.tensor([[0] * 4 + [1] * 9, [1] * 8 + [0] * 5, [0] * S]).bool()


def keys() -> Tensor:
    return tokens()[:, None, None]


def causal(queries: int = S, length: int = S) -> Tensor:
    return torch.arange(length) <= torch.arange(queries)[:, None]


def pairs() -> Tensor:
    """Queries are masked too, as in DeBERTa-v2."""
    return keys() & tokens()[:, None, :, None]


def added(mask: Tensor, fill: float) -> Tensor:
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, fill)


def filled(q: Tensor, k: Tensor, v: Tensor, fill: float) -> Tensor:
    return (q @ k.mT / 2.0).masked_fill(~pairs(), fill).softmax(-1) @ v


def filled_where(q: Tensor, k: Tensor, v: Tensor, fill: float) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * 0.3
    return torch.where(keys() & causal(), scores, fill).softmax(-1) @ v


def filled_twice(q: Tensor, k: Tensor, v: Tensor, fill: float) -> Tensor:
    scores = (q @ k.mT).masked_fill(~causal(), fill)
    return scores.masked_fill(~keys(), fill).softmax(-1) @ v


def added_by_hand(q: Tensor, k: Tensor, v: Tensor, fill: float) -> Tensor:
    return (q @ k.mT * 0.5 + added(keys() & causal(), fill)).softmax(-1) @ v


def added_to_capped(q: Tensor, k: Tensor, v: Tensor, fill: float) -> Tensor:
    return (2.0 * torch.tanh(q @ k.mT / 2.0) + added(keys() & causal(), fill)).softmax(-1) @ v


def added_to_sdpa(q: Tensor, k: Tensor, v: Tensor, fill: float) -> Tensor:
    k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=added(keys() & causal(), fill))


def added_twice(q: Tensor, k: Tensor, v: Tensor, fill: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=added(causal(), fill) + added(keys(), fill))


def multiplied(q: Tensor, k: Tensor, v: Tensor, fill: float) -> Tensor:
    bias = (1.0 - keys().to(torch.int64).to(q.dtype)) * fill
    return (q @ k.mT * 0.5 + bias).softmax(-1) @ v


def added_then_lifted(q: Tensor, k: Tensor, v: Tensor, fill: float) -> Tensor:
    scores = q @ k.mT + added(causal(), fill) + added(keys(), fill)
    return torch.max(scores, torch.tensor(fill, dtype=q.dtype)).softmax(-1) @ v


def beside_infinity(q: Tensor, k: Tensor, v: Tensor, fill: float) -> Tensor:
    return (q @ k.mT + added(causal(), -math.inf) + added(keys(), fill)).softmax(-1) @ v


def with_slopes(q: Tensor, k: Tensor, v: Tensor, fill: float) -> Tensor:
    distance = torch.arange(S) - torch.arange(S)[:, None]
    slopes = 2.0 ** -torch.arange(1, H + 1, dtype=q.dtype)
    return (q @ k.mT + distance * slopes[:, None, None] + added(keys() & causal(), fill)).softmax(-1) @ v


def with_a_table(q: Tensor, k: Tensor, v: Tensor, table: Tensor, fill: float) -> Tensor:
    distance = torch.arange(S) - torch.arange(S)[:, None] + S - 1
    bias = table[distance].permute(2, 0, 1) + added(keys(), fill)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


ATTENTIONS: tuple[tuple[Attend, tuple[tuple[int, ...], ...]], ...] = (
    (filled, HEADS),
    (filled_where, HEADS),
    (filled_twice, HEADS),
    (added_by_hand, HEADS),
    (added_to_capped, HEADS),
    (added_to_sdpa, GROUPED),
    (added_twice, HEADS),
    (multiplied, HEADS),
    (added_then_lifted, HEADS),
    (beside_infinity, HEADS),
    (with_slopes, HEADS),
    (with_a_table, (*HEADS, (2 * S - 1, H))),
)


def case_of(attend: Attend, shapes: tuple[tuple[int, ...], ...], fill: float) -> Case:
    return Case(attend.__name__, lambda *given: attend(*given, fill), shapes)


def check(case: Case, world: int, layout: str = "auto", **options: Any) -> list[str]:
    """Beside the plain formula: the gradients of a CPU's fused kernels are n times too large in a row of n fills."""
    with sdpa_kernel(SDPBackend.MATH):
        return check_attentions(case, layout, world, tile=4, **options)


@pytest.mark.parametrize(("attend", "shapes"), ATTENTIONS, ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.parametrize("fill", FILLS)
def test_rows_without_a_key_are_those_of_one_device(
    attend: Attend, shapes: tuple[tuple[int, ...], ...], fill: float
) -> None:
    case = case_of(attend, shapes, fill)
    for world in (2, 3):
        gathered = check(case, world)
        assert not [reason for reason in gathered if "mask of" not in reason], gathered


@pytest.mark.parametrize(
    ("attend", "fill", "calls"),
    (
        (filled, -1e9, 1),
        (filled_twice, LEAST, 1),
        (added_by_hand, -1e30, 1),
        (added_to_sdpa, FLOAT32, 1),
        (added_by_hand, -1e9, 2),
        (beside_infinity, LEAST, 2),
    ),
)
def test_equal_scores_need_no_second_attention(attend: Attend, fill: float, calls: int) -> None:
    shapes = GROUPED if attend is added_to_sdpa else HEADS
    graph = planned_programs(case_of(attend, shapes, fill), "auto", 3)[0].gm.graph
    assert len([n for n in graph.nodes if n.target is ops.ring_attention]) == calls


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.mT).masked_fill(~keys(), LEAST).softmax(-1), 0.5) @ v


def test_dropout_needs_a_second_attention() -> None:
    """It draws each weight of an even row."""
    program = planned_programs(Case("dropped", dropped, HEADS), "auto", 2)[0]
    calls = [n for n in program.gm.graph.nodes if n.target is ops.ring_attention]
    first, second = (lookup(str(n.args[5]), S, S) for n in calls)
    assert first.dropout == second.dropout == 0.5 and first.stream == second.stream


def with_minus_ten_thousand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return added_by_hand(q, k, v, -1e4)


def filled_by_minus_ten_thousand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return filled_where(q, k, v, -1e4)


@pytest.mark.parametrize("attend", (with_minus_ten_thousand, filled_by_minus_ten_thousand))
def test_moderate_fills_stay_what_they_are(attend: Attend) -> None:
    """A number of this size is rounded to 2e-12, and so is a log-sum-exp."""
    case = Case(attend.__name__, attend, HEADS)
    (site,) = detect(captured_of(case).gm)
    assert site.keyless is None and not site.unsupported
    for world in (2, 5):
        assert check(case, world, tolerance=4e-12) == []


@pytest.mark.parametrize("world", (slow(1), slow(2), 5))
@pytest.mark.parametrize("options", ({}, {"comm": "allgather"}, {"layout": "zigzag"}, {"hilbert": (3, 4)}))
@pytest.mark.parametrize("attend", (filled, added_to_sdpa))
def test_rows_without_a_key_under_options(attend: Attend, options: dict[str, Any], world: int) -> None:
    check(case_of(attend, GROUPED if attend is added_to_sdpa else HEADS, FLOAT32), world, **options)


def few_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=added(keys(), LEAST))


def three_dims(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.bmm(q, k.transpose(1, 2)).masked_fill(~(tokens()[:, None] & causal()), FLOAT32)
    return torch.bmm(scores.softmax(-1), v)


def over_all_rows_alike(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One sequence of keys for the whole batch."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=added(keys(), -1e9))


def by_data(q: Tensor, k: Tensor, v: Tensor, exists: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~(exists > 1.0)[:, None, None], LEAST).softmax(-1) @ (v * exists[:, None, :, None])


@pytest.mark.parametrize(
    ("attend", "shapes"),
    (
        (few_queries, ((B, H, 3, D), (B, H, S, D), (B, H, S, D))),
        (three_dims, ((B, S, D),) * 3),
        (over_all_rows_alike, ((B, H, S, D), (1, H, S, D), (1, H, S, D))),
        (by_data, (*HEADS, (B, S))),
    ),
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_rows_without_a_key_in_other_shapes(attend: Attend, shapes: tuple[tuple[int, ...], ...]) -> None:
    for world in (2, 3):
        check(Case(attend.__name__, attend, shapes), world)


def different_fills(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT + added(causal(), LEAST) + added(keys(), -1e9)).softmax(-1) @ v


def two_of_data(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """No key is surely masked by one alone."""
    return (q @ k.mT + added(pairs(), -1e9) + added(keys(), -1e9)).softmax(-1) @ v


def inside_a_function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.sinh((q @ k.mT).masked_fill(~keys(), -1e6) * 1e-6) * 1e6).softmax(-1) @ v


@pytest.mark.parametrize("attend", (different_fills, two_of_data, inside_a_function))
def test_fills_that_are_not_read_run_as_written(attend: Attend) -> None:
    case = Case(attend.__name__, attend, HEADS)
    (site,) = detect(captured_of(case).gm)
    assert "finite" in site.unsupported
    check(case, 2)


def test_a_fill_beside_a_sure_key_is_a_mask() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=added(causal(), -1e9))

    case = Case("causal", attend, HEADS)
    (site,) = detect(captured_of(case).gm)
    assert (str(site.mask), site.bias, site.keyless) == ("k <= q", None, None)
    assert check(case, 3) == []
