"""Heads divided over neighbouring ranks, with their tokens pooled: the numbers of one device, for every degree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ringpass import Dilation, reference
from ringpass.errors import OptionError
from ringpass.schedule.head_shares import allowed_degrees
from tests.support.sharded_ops import Case, check_attentions

S, B, D = 37, 2, 4
HEADS = {"4": (4, 4), "7": (7, 7), "8 over 2": (8, 2), "6 over 3": (6, 3), "4 over 1": (4, 1)}


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(S)
    near = (at <= at[:, None]) & (at[:, None] - at < 9)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=near, enable_gqa=q.shape[1] != k.shape[1])


def by_head(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """A learned bias of each head."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=q.shape[1] != k.shape[1])


def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Slopes of heads, and a mask that is another one for odd heads."""
    at, heads = torch.arange(S), torch.arange(q.shape[1])[:, None, None]
    slopes = -0.1 * (heads + 1) * (at[:, None] - at).abs()
    seen = (at <= at[:, None]) | (heads % 2 == 1)
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
    return ((q @ k.mT) * 0.5 + slopes).masked_fill(~seen, -torch.inf).softmax(-1) @ v


def case(call: Callable[..., Any], heads: tuple[int, int], *others: tuple[int, ...]) -> Case:
    name = "scaled_dot_product_attention.default" if call is not alibi else "softmax.int"
    return Case(name, call, ((B, heads[0], S, D), (B, heads[1], S, D), (B, heads[1], S, D), *others))


WORLDS = (1, 2, 3, 4, 5, 6, 8)
DEGREES = [(world, degree) for world in WORLDS for degree in allowed_degrees(world, 8) if degree > 1 or world == 3]


@pytest.mark.parametrize(("world", "degree"), DEGREES)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_causal_attention(heads: tuple[int, int], world: int, degree: int) -> None:
    if degree not in allowed_degrees(world, heads[0]):
        with pytest.raises(OptionError, match=r"one of 1"):
            check_attentions(case(causal, heads), "zigzag", world, ulysses_degree=degree)
        return
    assert not check_attentions(case(causal, heads), "zigzag", world, ulysses_degree=degree)


@pytest.mark.parametrize(("world", "degree"), [(2, 2), (4, 2), (6, 3), (5, 5)])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("call", [windowed, alibi])
def test_masks_of_tokens_and_heads(call: Callable[..., Tensor], layout: str, world: int, degree: int) -> None:
    assert not check_attentions(case(call, (6, 3)), layout, world, ulysses_degree=degree)


@pytest.mark.parametrize(("world", "degree"), [(2, 2), (4, 2), (6, 3), (5, 5)])
def test_learned_bias_of_heads(world: int, degree: int) -> None:
    assert not check_attentions(case(by_head, (6, 2), (6, S, S)), "zigzag", world, ulysses_degree=degree)


@pytest.mark.parametrize("offsets", ["mod", "block"])
@pytest.mark.parametrize(("world", "degree"), [(2, 2), (4, 2), (6, 3)])
@pytest.mark.parametrize("heads", [(6, 2), (7, 7)], ids=["grouped", "7"])
def test_dilation(heads: tuple[int, int], world: int, degree: int, offsets: str) -> None:
    dilation = Dilation((16, 40), (1, 2), offsets)
    dilated = replace(case(causal, heads), wanted=partial(reference.attention, dilation=dilation, causal=True))
    options: dict[str, Any] = {"dilation": dilation, "ulysses_degree": degree}
    assert not check_attentions(dilated, "contiguous", world, **options)


@pytest.mark.parametrize(("world", "degree"), [(2, 2), (4, 2), (6, 3)])
def test_along_a_curve(world: int, degree: int) -> None:
    assert not check_attentions(case(windowed, (6, 3)), "zigzag", world, ulysses_degree=degree, hilbert=(6, 6), tile=4)
