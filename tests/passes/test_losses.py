"""Losses over a partitioned sequence: those of one device, with nothing gathered.

Each case computes a loss whose rows are the tokens, in each layout that torch documents for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.sharded_ops import Case, check_on_shards, rank_programs

B, C, S = 2, 5, 23
SHAPE = (B, C, S)
REDUCTIONS = ("mean", "sum", "none")
WEIGHT = torch.linspace(0.3, 2.0, C, dtype=torch.float64)  # no sum of these is exact in float32


def labels(*shape: int, classes: int = C) -> Tensor:
    """Classes, the last of which is often ignored."""
    return (torch.arange(torch.Size(shape).numel()) * 7 % 11 % classes).view(shape)


def chances(x: Tensor, dim: int = 1) -> Tensor:
    """Probabilities of classes along `dim`, without a gradient."""
    return (x.detach() * 3).softmax(dim)


def signs(*shape: int) -> Tensor:
    return 1.0 - 2 * (labels(*shape) % 2)


def check(op: str, call: Callable[..., Any], shapes: tuple[tuple[int, ...], ...], world: int = 3) -> None:
    assert check_on_shards(Case(op, call, shapes), "zigzag", world, S) == []


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(S, C), (B, C, S), (S, C, 3), (B, C, S, 2), (B, C, 3, S), (1, C, 2, 2, S)], ids=str)
def test_cross_entropy_of_each_layout(shape: tuple[int, ...], reduction: str) -> None:
    target = labels(shape[0], *shape[2:])
    for given in (
        {}, {"ignore_index": 2}, {"weight": WEIGHT, "ignore_index": 4}, {"label_smoothing": 0.1},
        {"weight": WEIGHT, "label_smoothing": 0.3, "ignore_index": 1},
    ):  # fmt: skip
        call = lambda x, given=given: F.cross_entropy(x, target, reduction=reduction, **given)  # noqa: E731
        check("cross_entropy_loss.default", call, (shape,))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(S, C), (B, C, S), (B, C, S, 2), (S, C, 3)], ids=str)
def test_cross_entropy_of_class_probabilities(shape: tuple[int, ...], reduction: str) -> None:
    for given in ({}, {"weight": WEIGHT}, {"label_smoothing": 0.2}, {"weight": WEIGHT, "label_smoothing": 0.2}):
        call = lambda x, y, given=given: F.cross_entropy(x, y.softmax(1), reduction=reduction, **given)  # noqa: E731
        check("cross_entropy_loss.default", call, (shape, shape))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(S, C), (B, C, S), (B, C, S, 2), (B, C, 2, 2, S)], ids=str)
def test_nll_loss_of_each_layout(shape: tuple[int, ...], reduction: str) -> None:
    target = labels(shape[0], *shape[2:])
    for given in ({}, {"weight": WEIGHT, "ignore_index": 3}, {"ignore_index": -1}):
        call = lambda x, given=given: F.nll_loss(x.log_softmax(1), target, reduction=reduction, **given)  # noqa: E731
        check("nll_loss_nd.default", call, (shape,))


def test_tokens_merged_with_the_batch() -> None:
    def flat(x: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy((x @ w).flatten(0, 1), labels(B, S).flatten(), label_smoothing=0.1, ignore_index=0)

    check("cross_entropy_loss.default", flat, ((B, S, 4), (4, C)))
    check("nll_loss_nd.default", lambda x: F.nll_loss(x.view(-1, C), labels(B, S).view(-1)), ((B, S, C),))


@pytest.mark.parametrize("world", (2, 5))
def test_cross_entropy_over_other_numbers_of_ranks(world: int) -> None:
    call = lambda x: F.cross_entropy(x, labels(B, S), WEIGHT, ignore_index=2, label_smoothing=0.1)  # noqa: E731
    check("cross_entropy_loss.default", call, (SHAPE,), world)


def test_no_target_of_a_rank_counts() -> None:
    target = torch.where(torch.arange(S) < S // 3, labels(S), -100)
    for layout in ("contiguous", "zigzag"):
        case = Case("cross_entropy_loss.default", lambda x: F.cross_entropy(x, target), ((S, C),))
        assert check_on_shards(case, layout, 5, S) == []


POINTWISE: dict[str, Callable[..., Any]] = {
    "mse_loss.default": F.mse_loss,
    "kl_div.default": lambda x, y, reduction: F.kl_div(x.log_softmax(-1), y.softmax(-1), reduction=reduction),
    "binary_cross_entropy_with_logits.default": lambda x, y, reduction: F.binary_cross_entropy_with_logits(
        x, y.sigmoid(), torch.arange(1.0, 5.0), reduction, pos_weight=torch.arange(2.0, 6.0)),
    "poisson_nll_loss": lambda x, y, reduction: F.poisson_nll_loss(x, y.detach().exp(), full=True, reduction=reduction),
    "hinge_embedding_loss": lambda x, y, reduction: F.hinge_embedding_loss(
        x - y, signs(B, S, 4), margin=0.7, reduction=reduction),
    "margin_ranking_loss": lambda x, y, reduction: F.margin_ranking_loss(
        x, y, signs(B, S, 4), 0.1, reduction=reduction),
    "triplet_margin_loss": lambda x, y, reduction: F.triplet_margin_loss(x, y, x * y, 0.3, reduction=reduction),
    "cosine_embedding_loss": lambda x, y, reduction: F.cosine_embedding_loss(
        x.view(-1, 4), y.view(-1, 4), signs(B * S), 0.1, reduction=reduction),
    "multilabel_soft_margin_loss": lambda x, y, reduction: F.multilabel_soft_margin_loss(
        x, (y.detach() > 0).double(), reduction=reduction),
    "multi_margin_loss": lambda x, y, reduction: F.multi_margin_loss(
        (x * y).view(-1, 4), labels(B * S, classes=4), weight=WEIGHT[:4], reduction=reduction),
    "multilabel_margin_loss": lambda x, y, reduction: F.multilabel_margin_loss(
        (x * y).view(-1, 4), labels(B * S, 4, classes=4) - 1, reduction=reduction),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss")  # of kl_div
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", POINTWISE)
def test_loss_of_each_element_or_row(name: str, reduction: str) -> None:
    call = lambda x, y: POINTWISE[name](x, y, reduction=reduction)  # noqa: E731
    shown = name if name.endswith("default") else "mul.Tensor"  # torch writes the others as several ops
    check(shown, call, ((B, S, 4), (B, S, 4)))


@pytest.mark.parametrize("shape", [(B, S, 4), (S, 4)], ids=str)
def test_kl_div_divided_by_the_batch(shape: tuple[int, ...]) -> None:
    call = lambda x, y: F.kl_div(x.log_softmax(-1), y.log_softmax(-1), reduction="batchmean", log_target=True)  # noqa: E731
    check("kl_div.default", call, (shape, shape))


def test_gaussian_nll_loss() -> None:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        spread = y.exp().clamp_min(1e-6)  # what F.gaussian_nll_loss computes after its checks of the values
        return (0.5 * (spread.log() + (x - y) ** 2 / spread)).mean()

    check("mean.default", loss, ((B, S, 4), (B, S, 4)))


def test_16_bit_losses_are_added_in_float32() -> None:
    """Their sum has no number in float16; their mean has."""
    case = Case("cross_entropy_loss.default", lambda x: F.cross_entropy(x.half(), labels(B, S)), (SHAPE,))
    graph = rank_programs(case, "zigzag", 3, S)[0].gm.graph
    sums = [n for n in graph.nodes if n.target in (torch.ops.aten.sum.default, torch.ops.ringpass.reduce.default)]
    assert sums and all(n.meta["val"].dtype in (torch.float32, torch.int64) for n in sums)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "options", (None, torch.nn.LinearCrossEntropyOptions(batch_chunk_size=4)), ids=("whole", "chunked")
)
def test_linear_cross_entropy(options: Any, reduction: str) -> None:
    for given in ({}, {"weight": WEIGHT, "ignore_index": 3}):
        call = lambda x, w, b, given=given: F.linear_cross_entropy(  # noqa: E731
            x.view(-1, 4), w, labels(B * S), linear_bias=b, reduction=reduction, options=options, **given
        )
        check("mul.Tensor", call, ((B, S, 4), (C, 4), (C,)))
